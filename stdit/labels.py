"""Class labels by number and by name."""

from collections.abc import Iterable, Sequence
from typing import Any

from stdit.files import printable


def label_values(given: Any) -> list:
    """The labels of a call, numbers or names, as a list: of one, or of those in a sequence, an array or a tensor."""
    plain = given.tolist() if hasattr(given, "tolist") else given
    return [plain] if isinstance(plain, str | bytes) or not isinstance(plain, Iterable) else list(plain)


def check_names(names: Any) -> None:
    """Raise ValueError for names of classes that are not a list of texts, or None."""
    if names is not None and not isinstance(names, list | tuple):
        raise ValueError(
            f"class_names={printable(repr(names))[:100]} is not a list; write a list of one name per class."
        )
    if not_text := [name for name in names or () if not isinstance(name, str)]:
        raise ValueError(f"class_names has {not_text[0]!r}, which is not a name; write it as text.")


def label_number(value: Any, num_classes: int, names: Sequence[str] | None) -> int:
    """Number of a label that is given as number or name; ValueError if it is neither, unknown or out of range."""
    value = value.tolist() if hasattr(value, "tolist") else value
    number = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    if not number and not isinstance(value, str):
        raise ValueError(f"class label {value!r} is neither a whole number nor a name.")
    if isinstance(value, str) and names:
        if value in names:  # before names that contain it
            return list(names).index(value)
        for i, name in enumerate(names):  # ImageNet's names are lists: "tench, Tinca tinca"
            if value in name.split(", "):
                return i
    if isinstance(value, str) and not value.lstrip("-").isdecimal():
        choices = (
            f"Choose one of: {printable(', '.join(names))}." if names else f"Use a number from 0 to {num_classes - 1}."
        )
        raise ValueError(f"class label {value!r} is unknown. {choices}")
    if not 0 <= int(value) <= num_classes:
        raise ValueError(
            f"class label {value} is out of range. Use 0 to {num_classes - 1}, or {num_classes} for no label."
        )
    return int(value)

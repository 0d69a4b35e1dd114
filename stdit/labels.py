"""Class labels by number and by name."""

from collections.abc import Sequence

from stdit.files import printable


def label_number(value: int | str, num_classes: int, names: Sequence[str] | None) -> int:
    """Number of a label that is given as number or name; ValueError if it is unknown or out of range."""
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

"""Class labels as people write them, numbers or names, turned into class indices."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

# A model has a row of weights per class, so that a stray label (an id, a date) would decide how much memory it takes.
MAX_CLASSES = 100_000


class Classes(NamedTuple):
    """The classes of the rows of a table.

    indices: of every row, None without classes. names: in the order of the indices, None if the labels are numbers.
    """

    indices: Sequence[int | None]
    num_classes: int
    names: list[str] | None


def number_classes(labels: Sequence[Any], place: Callable[[int], str]) -> Classes:
    """Turn labels into class indices: whole numbers are used as they are; if any label is a name, all count as names.

    Names are numbered in alphabetical order. place(i): where label i stands, for messages. Raises ValueError for a label
    that is neither, that is negative, and for classes beyond `MAX_CLASSES`.
    """
    texts = [label.strip() if isinstance(label, str) else label for label in labels]
    numbers = [_whole(text) for text in texts]
    for i, (text, number) in enumerate(zip(texts, numbers, strict=True)):
        if number is None and not (isinstance(text, str) and _is_encodable(text)):
            raise ValueError(f"{place(i)}: label {text!r} is neither a whole number nor a name; correct it.")
    indices = [number for number in numbers if number is not None]
    if len(indices) == len(texts):
        lowest, highest = min(indices), max(indices)
        if lowest < 0:
            raise ValueError(f"{place(indices.index(lowest))}: label {lowest} is negative; number the classes from 0.")
        if highest >= MAX_CLASSES:
            raise ValueError(
                f"{place(indices.index(highest))}: label {highest} is too large for the number of a class (at most "
                f"{MAX_CLASSES - 1}); number the classes from 0, or make it a name, such as 'c{highest}'."
            )
        return Classes(indices, highest + 1, None)
    names = sorted({str(text) for text in texts})
    if len(names) > MAX_CLASSES:
        raise ValueError(
            f"{place(0)}: there are {len(names)} different labels, more than {MAX_CLASSES} classes; a text that differs "
            "from clip to clip belongs into the column 'caption'."
        )
    order = {name: i for i, name in enumerate(names)}
    return Classes([order[str(text)] for text in texts], len(names), names)


def _whole(label: Any) -> int | None:
    """The whole number that a label is, also as text and as 4.0 (as spreadsheets and pandas write 4); None if it is none."""
    if isinstance(label, str) and re.fullmatch(r"[+-]?\d{1,18}(\.0*)?", label):
        return int(label.partition(".")[0])
    if isinstance(label, float) and label.is_integer():
        return int(label)
    return label if isinstance(label, int) and not isinstance(label, bool) else None


def _is_encodable(text: str) -> bool:
    """Whether a text can be written as UTF-8, which half a surrogate pair cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)

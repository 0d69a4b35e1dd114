"""Check the numbers of a config against ranges, in the notation of intervals, and write them in messages."""

import operator
from typing import Any


def check_ranges(section: str, values: Any, ranges: dict[str, str], **remedies: str) -> None:
    """Raise ValueError, with the key and the range, for an attribute of `values` outside its range.

    section: the prefix of keys in messages ("train"), or "". ranges: attribute -> an interval such as "[1, inf)" or
    "(0, 1]". Neither nan nor an infinite number is in any range, None is in all; in a list every number is checked.
    remedies: attribute -> the end of its message.
    """
    for name, interval in ranges.items():
        given = getattr(values, name)
        for number in given if isinstance(given, list | tuple) else [given]:
            if number is not None and not _contains(interval, number):
                key = f"{section}.{name}" if section else name
                null = " or null" if getattr(type(values), name, given) is None else ""  # the default of its field
                remedy = f"; {remedies[name]}" if name in remedies else ""
                raise ValueError(f"{key} must be {_described(interval)}{null}, got {given}{remedy}.")


def exact(number: float) -> str:
    """A number as the shortest text that stands for it alone: 2 for 2.0, and 3.0000001 with all its digits."""
    return repr(float(number)).removesuffix(".0")


def whole_number(name: str, value: Any, least: int | None = 1, remedy: str = "") -> int:
    """A count as an int, from whatever is a whole number; ValueError for anything else, also for True, and below `least`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:  # also of tensors of floats
        number = None
    if number is None:
        raise ValueError(f"{name} must be a whole number, got {value!r}{remedy}.")
    if least is not None and number < least:
        raise ValueError(f"{name} must be >= {least}, got {number}{remedy}.")
    return number


def real_number(name: str, value: Any) -> Any:
    """The value, if it is a number (also of numpy, or a tensor of one); ValueError for anything else, such as text."""
    if isinstance(value, bool) or not hasattr(value, "__float__") or getattr(value, "ndim", 0) > 0:
        raise ValueError(f"{name} must be a number, got {value!r}.")
    return value


def _ends(interval: str) -> tuple[float, float]:
    low, high = interval[1:-1].split(",")
    return float(low), float(high)


def _contains(interval: str, number: float) -> bool:
    low, high = _ends(interval)
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    return above and below


def _described(interval: str) -> str:
    if not interval.endswith("inf)"):
        return f"in {interval}"
    low = interval[1:].partition(",")[0]
    return f"{'>=' if interval[0] == '[' else '>'} {low}"

"""Look up a variant by name."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def pick(table: Mapping[str, T], name: str, what: str) -> T:
    """Look up an entry of a table; ValueError, with the nearest name, for an unknown name.

    what: the noun for the name in the message.
    """
    if isinstance(name, str) and name in table:
        return table[name]
    raise ValueError(f"Unknown {what} {name!r}.{nearest(name, table)} Choose one of: {', '.join(sorted(table))}.")


def nearest(name: str, names: Iterable[str], *, cutoff: float = 0.6) -> str:
    """A question for a message, whether the nearest of some names was meant; empty if none is near.

    cutoff: the least share of letters in common, from 0 to 1.
    """
    close = difflib.get_close_matches(str(name).replace("+", "p"), list(names), n=1, cutoff=cutoff)  # dpm++ is dpmpp
    return f" Did you mean {close[0]!r}?" if close else ""

"""Look up a variant by name."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def pick(table: Mapping[str, T], name: str, what: str) -> T:
    """Look up an entry of a table; ValueError, with the nearest name, for an unknown name.

    what: the noun for the name in the message.
    """
    if isinstance(name, str) and name in table:
        return table[name]
    close = difflib.get_close_matches(str(name).replace("+", "p"), list(table), n=1)  # dpm++ is dpmpp
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"Unknown {what} {name!r}.{hint} Choose one of: {', '.join(sorted(table))}.")

"""Write files atomically: under a temporary name in the same folder, then renamed."""

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """A context manager that yields a temporary path, and renames it to `path` if the block ends without an error.

    The temporary file has the suffix of `path`, since writers choose a format by it. After an error it is removed.
    """
    path = Path(path)
    tmp = path.with_name(_temporary(path.name))
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def _temporary(name: str) -> str:
    """A hidden name of this process for a file; a hash stands for a name so long that a system takes no longer one."""
    known = name if len(os.fsencode(name)) <= 200 else f"{zlib.crc32(os.fsencode(name)):08x}{Path(name).suffix[-16:]}"
    return f".{os.getpid()}-{known}"


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8 atomically."""
    with atomic_write(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write plain values as a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def printable(text: str) -> str:
    """A text with its control characters escaped, so that one from a stranger does nothing to a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)

"""Write files atomically: under a temporary name in the same folder, then renamed."""

import json
import os
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
    tmp = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8 atomically."""
    with atomic_write(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write plain values as a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")

"""Write files atomically: under a temporary name in the same folder, then renamed."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout


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


@contextmanager
def claimed(paths: Iterable[Path]) -> Iterator[None]:
    """A context manager that keeps files for this process; ValueError if another process is about to write one of them.

    The claim on a file is a lock next to it, which the system lets go if this process is killed.
    """
    with ExitStack() as claims:
        for path in paths:
            digest = hashlib.sha256(path.name.encode()).hexdigest()[:16]  # a lock's name is never too long
            file = path.with_name(f".{digest}.lock")
            lock = FileLock(file)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise ValueError(f"{path} is being written by another process; choose another --output.") from None
            claims.callback(_let_go, lock, file)
        yield


def _let_go(lock: BaseFileLock, file: Path) -> None:
    lock.release()
    with suppress(OSError):  # another process has taken it
        file.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8 atomically."""
    with atomic_write(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write plain values as a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")

"""Locks in a folder of cached latents, by which the processes that read or write there keep its files."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal
from uuid import uuid4

from filelock import FileLock, Timeout

from stdit.data.config import DataConfig
from stdit.data.stores import is_url

Role = Literal["reader", "writer"]


@contextmanager
def lock_of(folder: Path, role: Role) -> Iterator[Path]:
    """A context manager of a lock of this process, which the system lets go if the process is killed."""
    file = folder / f".{role}-{uuid4().hex}.lock"
    with ExitStack() as held:
        with suppress(OSError):  # what only may be read there nobody can update
            held.enter_context(FileLock(file))
        try:
            yield file
        finally:
            with suppress(OSError):
                file.unlink(missing_ok=True)


def is_locked(folder: Path, role: Role, *, besides: Path | None = None) -> bool:
    """Whether processes have such locks, besides the one with this file."""
    return any(_is_held(file) for file in folder.glob(f".{role}-*.lock") if file != besides)


def _is_held(file: Path) -> bool:
    """Whether a process has a lock; one that was killed has left its file, which is removed."""
    try:
        with FileLock(file, timeout=0):
            file.unlink(missing_ok=True)
            return False
    except Timeout:
        return True


@contextmanager
def reading(config: DataConfig) -> Iterator[None]:
    """A context manager within which no update removes files of the cached latents that a config names."""
    roots: Sequence[str] = [config.root, *(one.root for one in config.datasets if one.root)]
    with ExitStack() as held:
        for root in dict.fromkeys(roots):
            if not is_url(root) and Path(root, "cache.json").is_file():
                held.enter_context(lock_of(Path(root), "reader"))
        yield

"""Locks in a folder of cached latents, by which the processes that read or write there keep its files."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal
from uuid import uuid4

from filelock import FileLock

from stdit.data.config import DataConfig
from stdit.data.stores import is_url
from stdit.warn import warn_user

Role = Literal["reader", "writer"]


@contextmanager
def lock_of(folder: Path, role: Role) -> Iterator[Path]:
    """A context manager of a lock of this process, which the system lets go if the process is killed.

    A reader that cannot lock there is warned; a writer gets a ValueError.
    """
    file = folder / f".{role}-{uuid4().hex}.lock"
    with ExitStack() as held:
        try:
            held.enter_context(FileLock(file, timeout=1))
        except (OSError, NotImplementedError) as error:  # Timeout is one: some systems have no locks
            if role == "writer":
                raise ValueError(
                    f"{folder} cannot be locked ({error}); write the cache to a folder on a file system that has locks."
                ) from error
            warn_user(
                f"{folder} cannot be locked here ({error}): if its cache is brought up to date while it is read, files of it may be removed "
                "at the second time."
            )
        try:
            yield file
        finally:
            held.close()  # some systems keep a file that is open
            with suppress(OSError):
                file.unlink(missing_ok=True)


def is_locked(folder: Path, role: Role, *, besides: Path | None = None) -> bool:
    """Whether processes have such locks, besides the one with this file."""
    return any(_is_held(file) for file in folder.glob(f".{role}-*.lock") if file != besides)


def _is_held(file: Path) -> bool:
    """Whether a process has a lock, or it cannot be found out; one that was killed has left its file, which is removed."""
    try:
        with FileLock(file, timeout=0):
            try:
                file.unlink(missing_ok=True)
                return False
            except OSError:  # some systems keep a file that is open
                pass
    except (OSError, NotImplementedError):  # Timeout is one
        return True
    with suppress(OSError):
        file.unlink(missing_ok=True)
    return False


@contextmanager
def reading(config: DataConfig) -> Iterator[None]:
    """A context manager within which no update removes files of the cached latents that a config names."""
    roots: Sequence[str] = [config.root, *(one.root for one in config.datasets if one.root)]
    with ExitStack() as held:
        for root in dict.fromkeys(roots):
            if not is_url(root) and Path(root, "cache.json").is_file():
                held.enter_context(lock_of(Path(root), "reader"))
        yield

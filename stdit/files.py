"""Files: written atomically, read within bounds, and names and texts of strangers made harmless."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

LONGEST_NAME = 255  # bytes of a file name, on all common file systems
LARGEST_JSON = 16 << 20  # bytes of a JSON file of a model or a cache's settings; real ones have kilobytes
_FULL = 1 << 16  # a disk with fewer free bytes counts as full: a writer that failed on it was short of room
_UMASK = os.umask(0)  # which can only be read by setting it, and belongs to all threads
os.umask(_UMASK)


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """A context manager that yields a temporary path, and renames it to `path` if the block ends without an error.

    The block writes a file or a folder there. The temporary name has the suffix of `path`, since writers choose a format
    by it. After an error it is removed. Raises OSError for a full disk, whatever error the writer gave; what fails
    of the temporary path is told of `path`.
    """
    path = Path(path)
    tmp = temporary_name(path)
    try:
        yield tmp
        _open_to_others(tmp)
        os.replace(tmp, path)
    except OSError as error:
        if error.errno and (error.filename is None or tmp.name in str(error.filename)):  # not of another file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except Exception as error:
        if shutil.disk_usage(path.parent).free < _FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        if tmp.is_dir() and not tmp.is_symlink():
            shutil.rmtree(tmp, ignore_errors=True)
        else:
            tmp.unlink(missing_ok=True)


def _open_to_others(path: Path) -> None:
    """Give files the permissions that new files have here; safetensors writes them for this user alone."""
    for file in [path, *(path.rglob("*") if path.is_dir() else ())]:
        if file.is_file() and not file.is_symlink():
            with suppress(OSError):  # file systems without permissions
                file.chmod(0o666 & ~_UMASK)


def temporary_name(path: Path) -> Path:
    """The hidden name beside `path` under which this process writes it: .PID-NAME, of a long name its end only."""
    start = f".{os.getpid()}-"
    name = path.name
    while len(os.fsencode(start + name)) > LONGEST_NAME:
        name = name[1:]
    return path.with_name(start + name)


def check_writable(path: Path) -> None:
    """Make the folder of an output, and raise OSError if no file of that name can be written there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), f"{path.name[:60]}...")
    tmp = temporary_name(path)
    try:
        tmp.touch()
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error  # not the name that nobody gave
    tmp.unlink(missing_ok=True)  # processes of other machines may have the same number


class Claimed(ValueError):
    """Another process is about to write a file."""


@contextmanager
def claimed(paths: Iterable[Path]) -> Iterator[None]:
    """A context manager that keeps files for this process; `Claimed` if another process is about to write one of them.

    The claim on a file is a lock next to it, which the system lets go if this process is killed.
    """
    with ExitStack() as claims:
        for path in paths:
            digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]  # a lock's name is never too long
            file = path.with_name(f".{digest}.lock")
            lock = FileLock(file)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise Claimed(f"{path} is being written by another process; choose another --output.") from None
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


def finite(value: Any) -> Any:
    """A plain value that JSON can hold: None in place of numbers that are infinite or none, also in what it contains."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict:
    """Read a JSON object; {} if there is no such file. Raises ValueError for anything else, and for one beyond reason."""
    try:
        if not path.is_file():
            return {}
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it has {path.stat().st_size >> 20} MB, and {LARGEST_JSON >> 20} are the most")
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_not_a_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}); download it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} holds {type(found).__name__}, not a JSON object; download it again.")
    return found


def _not_a_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def is_file_name(path: str) -> bool:
    """Whether the path of an output means a file: by its suffix, unless it is a folder that exists or ends with a slash."""
    return bool(Path(path).suffix) and not path.endswith(("/", os.sep)) and not Path(path).is_dir()


def check_name(name: str, what: str = "name") -> str:
    """Check a name that becomes one part of a path, and return it; ValueError for one that leads elsewhere.

    what: the key or option that it comes from, for the message.
    """
    leads_elsewhere = not name or name != Path(name).name or name.startswith(".") or "\\" in name
    if leads_elsewhere or not name.isprintable() or len(os.fsencode(name)) > LONGEST_NAME - 55:
        shown = f"{name[:60]!r}{'...' * (len(name) > 60)}"
        raise ValueError(
            f"{what}={shown} is not a folder name; use up to {LONGEST_NAME - 55} letters, digits, '-' and '_'."
        )
    return name


def plain_name(text: str, longest: int = 40) -> str:
    """The letters and digits of a text as a part of a file name, with "-" for all else; at most `longest` of them.

    >>> plain_name("tench, Tinca tinca")
    'tench-Tinca-tinca'
    """
    return re.sub(r"[\W_]+", "-", text)[:longest].strip("-")


def inside(root: Path, name: str, what: str) -> Path:
    """The path of a file that a list names relative to the list's folder, links resolved.

    Raises ValueError for a name that is not a path, or that leads outside `root`. what: the list, for the message.
    """
    try:
        path, folder = (Path(root) / name).resolve(), Path(root).resolve()
    except (OSError, ValueError, RuntimeError, TypeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise ValueError(f"{what}: {name!r} is not a path ({error}); correct it.") from error
    if not path.is_relative_to(folder):
        raise ValueError(f"{what}: {name!r} leads outside {str(folder)!r}; move the file into it.")
    return path


def printable(text: str) -> str:
    """A text with its control characters escaped, so that one from a stranger does nothing to a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)

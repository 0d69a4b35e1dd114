"""How a command runs and ends: errors that a user or a file can cause, and warnings, are one line on stderr each."""

import argparse
import csv
import errno
import math
import os
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path

import stdit
from stdit.data.stores import with_urls
from stdit.files import printable

_LONGEST = 2000  # characters of a message: a file can hold a name of any length

# What allocators say in a RuntimeError of no special type: torch's for CPUs, CUDA's, C++'s, and a size beyond 64 bits.
_ALLOCATORS = (
    "allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "Storage size calculation overflowed",
    "numel: integer multiplication overflow",
)

# Errors of readers, besides ValueError and OSError, by type; and RuntimeErrors that a file causes, by a part of them.
_READERS = (csv.Error, EOFError, struct.error, zipfile.BadZipFile, zlib.error)
_FILES = {"Symlink loop": "a link", "inline_container": "a file of torch weights", "PytorchStream": "a file of weights"}

# What the system refuses, and what to do about it.
_REMEDIES = {
    errno.ENOSPC: "free some room, or give a folder on another disk",
    errno.EDQUOT: "free some room, or give a folder on another disk",
    errno.EROFS: "make it writable, or give another folder",
    errno.EACCES: "change its permissions, or give another path",
    errno.EPERM: "change its permissions, or give another path",
    errno.ENOENT: "check the path",
    errno.EEXIST: "give another name, or remove it",
    errno.ENOTDIR: "give a path through folders",
    errno.EISDIR: "give the path of a file",
    errno.ENAMETOOLONG: "shorten the name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "the disk fails: copy the file from elsewhere, or give another disk",
}


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, a GPU's, or that of torch's allocator for CPUs."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(said in str(error) for said in _ALLOCATORS)
    )


def one_line(error: Exception) -> str | None:
    """What to tell a user about an error, in one line; None for an error that only a fault of the program explains."""
    said = str(error)
    if said.startswith("Caught "):  # a loader's worker: its whole traceback, which ends in the message
        said = said.strip().splitlines()[-1].partition(": ")[2]
    if out_of_memory(error):
        first = said.splitlines()[0].rstrip(".") if said else "Python could not allocate"
        said = (
            f"out of memory: {first}. Ask for less at once: fewer frames, a smaller size, fewer clips, smaller batches."
        )
    elif isinstance(error, RecursionError):
        said = f"a file is nested too deeply to be read ({said}); flatten it, or download it again."
    elif isinstance(error, _READERS) or type(error).__module__.startswith(("safetensors", "_safetensors", "yaml")):
        said = f"a file cannot be read or written ({said or type(error).__name__}); check it, and the room on the disk."
    elif isinstance(error, RuntimeError):
        about = next((what for part, what in _FILES.items() if part in said), None)
        if about is None:
            return None
        said = f"{about} cannot be read or written ({said}); check it, and the room on the disk."
    elif isinstance(error, OSError) and said.startswith("[Errno") and error.errno in _REMEDIES:
        where = f"{str(error.filename)!r}: " if error.filename else ""
        said = f"{where}{error.strerror}; {_REMEDIES[error.errno]}."
    elif not isinstance(error, ValueError | OSError):
        return None
    said = printable(with_urls(" ".join(said.split()) if len(said.splitlines()) > 1 else said.strip()))
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]} ..."


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[[Sequence[str] | None], int]:
    """A decorator of a recipe's `main`: it raises ValueError and OSError of one line for what a user or a file can cause."""

    @wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except Exception as error:
            said = one_line(error)
            if said is None or isinstance(error, OSError) or (isinstance(error, ValueError) and said == str(error)):
                raise
            raise ValueError(said) from error

    return wrapped


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Call `main(argv)` and return its exit code; what a user or a file can cause ends in one line and 1.

    A reader of the output that closes early (`stdit --help | head -1`) also ends in 1, without a message.
    """
    default_format, warnings.formatwarning = warnings.formatwarning, _format_warning
    try:
        code = _exit_code(main, argv)
    finally:
        warnings.formatwarning = default_format
        is_written = _flush_output()
    return code if is_written else 1


def _format_warning(message: Warning | str, *_: object, **__: object) -> str:
    """A warning without the line of code that caused it, which on a command line is in Python's own launcher."""
    return f"warning: {printable(with_urls(str(message)))}\n"


def _flush_output(text: str = "") -> bool:
    """Write `text` to stdout and flush it; False if its reader is gone.

    All further output is then discarded, so that Python prints no error at exit.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def _exit_code(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
    try:
        return command(main)(argv)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and not _flush_output("\n"):  # of stdout, not of a loader's worker
            return 1
        sys.stderr.write(f"{one_line(error)}\n")  # at once: lines of processes side by side would run into each other
    return 1


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help with the line breaks of the description, and with the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        preset = action.default
        if text is None or "default" in text or preset is None or preset is False or preset in ([], argparse.SUPPRESS):
            return text
        shown = (
            " ".join(map(str, preset)) if isinstance(preset, Sequence) and not isinstance(preset, str) else str(preset)
        )
        return f"{text} (default: {shown})".replace("%", "%%")


def command_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `stdit COMMAND`; its help shows `description` with its line breaks, and the defaults of options."""
    return argparse.ArgumentParser(prog=f"stdit {command}", description=description, formatter_class=_HelpFormatter)


def check_least(args: argparse.Namespace, *names: str, least: int = 1) -> None:
    """Raise ValueError, with the flag and the value, for an argument that is given and smaller than `least`, or no number."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be >= {least}, got {value}.")


def child_environment() -> dict[str, str]:
    """Environment variables with which a child process `python -m stdit ...` finds the package of this process."""
    paths = [str(Path(stdit.__file__).parents[1]), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}

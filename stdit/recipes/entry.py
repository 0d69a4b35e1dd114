"""How a recipe ends: an error that a user or a file can cause becomes one line on stderr and exit code 1."""

import argparse
import csv
import errno
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path

import stdit
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
    elif not isinstance(error, ValueError | OSError):
        return None
    said = printable(" ".join(said.split()) if len(said.splitlines()) > 1 else said.strip())
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]} ..."


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[[Sequence[str] | None], int]:
    """A decorator of a recipe's `main`: it raises ValueError and OSError of one line for what a user or a file can cause."""

    @wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except Exception as error:
            said = one_line(error)
            if said is None or (isinstance(error, ValueError | OSError) and said == str(error)):
                raise
            raise ValueError(said) from error

    return wrapped


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Call a recipe's `main` and return its exit code; what a user or a file can cause ends in one line and 1."""
    try:
        return command(main)(argv)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
    return 1


def command_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `stdit COMMAND`, which shows a recipe's module docstring as it is written."""
    return argparse.ArgumentParser(
        prog=f"stdit {command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def child_environment() -> dict[str, str]:
    """Environment variables for `python -m stdit ...` as a child process: it finds the package that this process runs."""
    paths = [str(Path(stdit.__file__).parents[1]), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}

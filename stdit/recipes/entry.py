"""How a command runs and ends: errors that a user can cause, and warnings, are one line on stderr each."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import stdit

# Replaces the message of `torch.OutOfMemoryError`.
_OUT_OF_MEMORY = (
    "out of memory: {} Lower train.micro_batch, or set model.gradient_checkpointing=true; no checkpoint is lost."
)


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Call `main(argv)` and return its exit code; ValueError, OSError and running out of memory end in one line and 1.

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
    return f"warning: {message}\n"


def _flush_output(text: str = "") -> bool:
    """Write `text` to stdout and flush it; False if its reader is gone. The rest is then discarded, so that Python's exit prints no error."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def _exit_code(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
    try:
        return main(argv)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and not _flush_output("\n"):  # of stdout, not of a loader's worker
            return 1
        message = str(error)
        if message.startswith("Caught "):  # from a loader's worker: a whole traceback, which ends in the message
            message = message.strip().splitlines()[-1].partition(": ")[2]
        print(message, file=sys.stderr)
    except RuntimeError as error:
        torch = sys.modules.get("torch")  # a command that has not imported torch cannot raise its errors
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        print(_OUT_OF_MEMORY.format(str(error).splitlines()[0]), file=sys.stderr)
    return 1


def command_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `stdit COMMAND`; its help shows `description` with the line breaks it has."""
    return argparse.ArgumentParser(
        prog=f"stdit {command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def child_environment() -> dict[str, str]:
    """Environment variables with which a child process `python -m stdit ...` finds the package of this process."""
    paths = [str(Path(stdit.__file__).parents[1]), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}

"""How a recipe ends: an error that a user can cause becomes one line on stderr and exit code 1."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import stdit

# The message that `torch.OutOfMemoryError` is turned into; checkpoints are written whole, so none was lost.
_OUT_OF_MEMORY = (
    "out of memory: {} Lower train.micro_batch, or set model.gradient_checkpointing=true; checkpoints are whole."
)


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Call `main(argv)` and return its exit code; ValueError, OSError and running out of memory end in one line and 1."""
    try:
        return main(argv)
    except (ValueError, OSError) as error:
        message = str(error)
        if message.startswith("Caught "):  # a loader's worker: its whole traceback, which ends in the message
            message = message.strip().splitlines()[-1].partition(": ")[2]
        print(message, file=sys.stderr)
    except RuntimeError as error:
        torch = sys.modules.get("torch")  # a recipe that never imported torch cannot run out of its memory
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        print(_OUT_OF_MEMORY.format(str(error).splitlines()[0]), file=sys.stderr)
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

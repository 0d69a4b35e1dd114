"""Write what `stdit COMMAND --help` prints to stdit/recipes/help, from where it is read without loading torch.

python dev/make_help.py
"""

import contextlib
import importlib
import io
import os
from pathlib import Path

from stdit.recipes.cli import COMMANDS, HELP

WIDTH = 110  # columns


def help_of(command: str) -> str:
    """What a command prints, at the width `WIDTH`."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(WIDTH)
    text = io.StringIO()
    try:
        recipe = importlib.import_module(f"stdit.recipes.{command.replace('-', '_')}")
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            recipe.main(["--help"])
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    return text.getvalue()


def main() -> None:
    """Write a file for every command, and remove those of commands that are gone."""
    HELP.mkdir(exist_ok=True)
    for path in HELP.glob("*.txt"):
        path.unlink()
    for command in COMMANDS:
        Path(HELP / f"{command}.txt").write_text(help_of(command), encoding="utf-8")


if __name__ == "__main__":
    main()

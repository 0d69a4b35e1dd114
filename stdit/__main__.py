"""`python -m stdit COMMAND ...`, the same as the `stdit` command (for `accelerate launch -m stdit train CONFIG`)."""

import sys

from stdit.recipes.cli import main

if __name__ == "__main__":
    sys.exit(main())

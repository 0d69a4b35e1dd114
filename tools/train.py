"""The command `stdit train` as a script; the code is in stdit/recipes/train.py."""

import sys

from stdit.recipes import train as recipe
from stdit.recipes.entry import run

if __name__ == "__main__":
    sys.exit(run(recipe.main))
sys.modules[__name__] = recipe  # `import train` gives the recipe itself

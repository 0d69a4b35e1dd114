"""The command `stdit compare` as a script; the code is in stdit/recipes/compare.py."""

import sys

from stdit.recipes import compare as recipe
from stdit.recipes.entry import run

if __name__ == "__main__":
    sys.exit(run(recipe.main))
sys.modules[__name__] = recipe  # `import compare` gives the recipe itself

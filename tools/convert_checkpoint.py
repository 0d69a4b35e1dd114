"""The command `stdit convert` as a script; the code is in stdit/recipes/convert.py."""

import sys

from stdit.recipes import convert as recipe
from stdit.recipes.entry import run

if __name__ == "__main__":
    sys.exit(run(recipe.main))
sys.modules[__name__] = recipe  # `import convert_checkpoint` gives the recipe itself

"""The command `stdit plan` as a script; the code is in stdit/recipes/plan.py."""

import sys

from stdit.recipes import plan as recipe
from stdit.recipes.entry import run

if __name__ == "__main__":
    sys.exit(run(recipe.main))
sys.modules[__name__] = recipe  # `import plan` gives the recipe itself

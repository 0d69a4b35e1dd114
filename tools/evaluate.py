"""The command `stdit evaluate` as a script; the code is in stdit/recipes/evaluate.py."""

import sys

from stdit.recipes import evaluate as recipe
from stdit.recipes.entry import run

if __name__ == "__main__":
    sys.exit(run(recipe.main))
sys.modules[__name__] = recipe  # `import evaluate` gives the recipe itself

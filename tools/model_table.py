"""The command `stdit model-table` as a script; the code is in stdit/recipes/model_table.py."""

import sys

from stdit.recipes import model_table as recipe
from stdit.recipes.entry import run

if __name__ == "__main__":
    sys.exit(run(recipe.main))
sys.modules[__name__] = recipe  # `import model_table` gives the recipe itself

"""The command `stdit quickstart` as a script; the code is in stdit/recipes/quickstart.py."""

import sys

from stdit.recipes import quickstart as recipe
from stdit.recipes.entry import run

if __name__ == "__main__":
    sys.exit(run(recipe.main))
sys.modules[__name__] = recipe  # `import quickstart` gives the recipe itself

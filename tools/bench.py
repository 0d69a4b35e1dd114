"""The command `stdit bench` as a script; the code is in stdit/recipes/bench.py."""

import sys

from stdit.recipes import bench as recipe
from stdit.recipes.entry import run

if __name__ == "__main__":
    sys.exit(run(recipe.main))
sys.modules[__name__] = recipe  # `import bench` gives the recipe itself

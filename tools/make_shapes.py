"""The command `stdit make-shapes` as a script; the code is in stdit/recipes/make_shapes.py."""

import sys

from stdit.recipes import make_shapes as recipe
from stdit.recipes.entry import run

if __name__ == "__main__":
    sys.exit(run(recipe.main))
sys.modules[__name__] = recipe  # `import make_shapes` gives the recipe itself

"""The command `stdit sample` as a script; the code is in stdit/recipes/sample.py."""

import sys

from stdit.recipes import sample as recipe
from stdit.recipes.entry import run

if __name__ == "__main__":
    sys.exit(run(recipe.main))
sys.modules[__name__] = recipe  # `import sample_video` gives the recipe itself

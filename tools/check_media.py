"""The command `stdit check-media` as a script; the code is in stdit/recipes/check_media.py."""

import sys

from stdit.recipes import check_media as recipe
from stdit.recipes.entry import run

if __name__ == "__main__":
    sys.exit(run(recipe.main))
sys.modules[__name__] = recipe  # `import check_media` gives the recipe itself

"""The command `stdit cache-latents` as a script; the code is in stdit/recipes/cache_latents.py."""

import sys

from stdit.recipes import cache_latents as recipe
from stdit.recipes.entry import run

if __name__ == "__main__":
    sys.exit(run(recipe.main))
sys.modules[__name__] = recipe  # `import cache_latents` gives the recipe itself

"""The command `stdit train-vae` as a script; the code is in stdit/recipes/train_vae.py."""

import sys

from stdit.recipes import train_vae as recipe
from stdit.recipes.entry import run

if __name__ == "__main__":
    sys.exit(run(recipe.main))
sys.modules[__name__] = recipe  # `import train_vae` gives the recipe itself

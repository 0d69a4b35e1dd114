"""The command `stdit held-out-loss` as a script; the code is in stdit/recipes/held_out_loss.py."""

import sys

from stdit.recipes import held_out_loss as recipe
from stdit.recipes.entry import run

if __name__ == "__main__":
    sys.exit(run(recipe.main))
sys.modules[__name__] = recipe  # `import held_out_loss` gives the recipe itself

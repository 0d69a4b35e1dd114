"""The command `stdit gpu-check` as a script; the code is in stdit/recipes/gpu_check.py."""

import sys

from stdit.recipes import gpu_check as recipe
from stdit.recipes.entry import run

if __name__ == "__main__":
    sys.exit(run(recipe.main))
sys.modules[__name__] = recipe  # `import gpu_check` gives the recipe itself

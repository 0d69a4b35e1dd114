"""The command `stdit plot-runs` as a script; the code is in stdit/recipes/plot_runs.py."""

import sys

from stdit.recipes import plot_runs as recipe
from stdit.recipes.entry import run

if __name__ == "__main__":
    sys.exit(run(recipe.main))
sys.modules[__name__] = recipe  # `import plot_runs` gives the recipe itself

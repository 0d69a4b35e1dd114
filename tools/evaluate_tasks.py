"""The command `stdit evaluate-tasks` as a script; the code is in stdit/recipes/evaluate_tasks.py."""

import sys

from stdit.recipes import evaluate_tasks as recipe
from stdit.recipes.entry import run

if __name__ == "__main__":
    sys.exit(run(recipe.main))
sys.modules[__name__] = recipe  # `import evaluate_tasks` gives the recipe itself

"""The command `stdit bench-memory` as a script; the code is in stdit/recipes/bench_memory.py."""

import sys

from stdit.recipes import bench_memory as recipe
from stdit.recipes.entry import run

if __name__ == "__main__":
    sys.exit(run(recipe.main))
sys.modules[__name__] = recipe  # `import bench_memory` gives the recipe itself

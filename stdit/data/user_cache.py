"""The folder of what can be made again."""

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """The folder of what can be made again: $STDIT_CACHE, or stdit in the user's cache ($XDG_CACHE_HOME or ~/.cache)."""
    own, cache = os.environ.get("STDIT_CACHE"), os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache.startswith("~"):  # a user without a home
        cache = tempfile.gettempdir()
    return Path(own) if own else Path(cache) / "stdit"

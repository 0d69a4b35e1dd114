"""The folder of what can be made again."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from stdit.files import atomic_write


def cache_folder() -> Path:
    """The folder of what can be made again: $STDIT_CACHE, or stdit in the user's cache ($XDG_CACHE_HOME or ~/.cache)."""
    own, cache = os.environ.get("STDIT_CACHE"), os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache.startswith("~"):  # a user without a home
        cache = tempfile.gettempdir()
    return Path(own) if own else Path(cache) / "stdit"


def remembered(folder: str, parts: Sequence[bytes], make: Callable[[], np.ndarray]) -> np.ndarray:
    """What `make` returns, kept in a folder of the cache under a hash of all that it depends on."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    file = cache_folder() / folder / f"{digest.hexdigest()[:32]}.npy"
    with suppress(OSError, ValueError, EOFError):
        return np.load(file, allow_pickle=False)
    made = make()
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as tmp:
            np.save(tmp, made, allow_pickle=False)
    return made

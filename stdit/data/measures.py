"""Measurements of media files, remembered between runs, so that a run starts without opening every file again."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from stdit.data.facts import Facts
from stdit.data.media import state_of
from stdit.files import atomic_write

# The version of the measurements; one for other rules does not read those of this one.
_VERSION = 1


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


class Measures:
    """The measurements of the files of one folder, in a file of `cache_folder`.

    One of a file counts while its size and the time of its last change stay. A cache that cannot be read or written is
    no error: files are then measured again.
    """

    def __init__(self, root: Path, backend: str):
        name = hashlib.sha256(f"{root.resolve()}\n{backend}\n{_VERSION}".encode("utf-8", "surrogateescape"))
        self._file = cache_folder() / "measures" / f"{name.hexdigest()[:32]}.jsonl"
        self._known: dict[str, tuple[list[int], Facts]] = {}
        self._read()

    def get(self, path: Path) -> Facts | None:
        """The measurement of a file; None if there is none of the file as it is now."""
        known = self._known.get(str(path.absolute()))
        return known[1] if known and known[0] == _state(path) else None

    def put(self, path: Path, facts: Facts) -> None:
        """Remember the measurement of a file."""
        key, state = str(path.absolute()), _state(path)
        if not state:
            return
        self._known[key] = (state, facts)
        line = json.dumps({"path": key, "state": state, "facts": facts._asdict()}) + "\n"
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "a", encoding="utf-8") as stream:  # whole lines, also of several processes
                stream.write(line)
        except OSError:
            pass

    def _read(self) -> None:
        try:
            lines = self._file.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError):
            return
        for line in lines:
            try:
                entry = json.loads(line)
                facts = Facts(**entry["facts"])
                if min(facts.frames, facts.height, facts.width) > 0:
                    self._known[entry["path"]] = (entry["state"], facts)
            except (ValueError, TypeError, KeyError, RecursionError):  # a line that a killed process left half written
                continue


def _state(path: Path) -> list[int]:
    """The size of a file and the time of its last change; empty if it cannot be asked."""
    state = state_of(path)
    return [] if state[0] < 0 else list(state)

"""Measurements of media files, remembered between runs, so that a run starts without opening every file again."""

import hashlib
import json
from pathlib import Path

from stdit.data.facts import Facts
from stdit.data.folders import absolute, resolved
from stdit.data.media import state_of
from stdit.data.user_cache import cache_folder

# The version of the measurements; one for other rules does not read those of this one.
_VERSION = 1


class Measures:
    """The measurements of the files of one folder, in a file of `cache_folder`.

    One of a file counts while its size and the time of its last change stay. A cache that cannot be read or written is
    no error: files are then measured again.
    """

    def __init__(self, root: Path, backend: str):
        name = hashlib.sha256(f"{resolved(root)}\n{backend}\n{_VERSION}".encode("utf-8", "surrogateescape"))
        self._file = cache_folder() / "measures" / f"{name.hexdigest()[:32]}.jsonl"
        self._known: dict[str, tuple[list[int], Facts]] = {}
        self._read()

    def get(self, path: Path) -> Facts | None:
        """The measurement of a file; None if there is none of the file as it is now."""
        known = self._known.get(str(absolute(path)))
        return known[1] if known and known[0] == _state(path) else None

    def put(self, path: Path, facts: Facts) -> None:
        """Remember the measurement of a file."""
        key, state = str(absolute(path)), _state(path)
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

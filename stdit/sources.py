"""What a name of weights means: a folder here, or a hub id. Only a hub id ever reaches for the network."""

import re
from pathlib import Path

_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w./-]+?))?(?:@([\w.-]+))?")
_OURS = {".", "..", "checkpoints", "models", "data", "output"}  # first parts that no hub id of interest has


def locate(name: str, what: str) -> tuple[str, dict[str, str]]:
    """(folder or hub id, {"subfolder", "revision"}) of a name; ValueError if it is neither.

    A hub id is "owner/name" or "owner/name/subfolder", with "@revision" if wanted; a folder of that name comes first.
    """
    path = Path(name)
    if path.is_dir():
        return str(path), {}
    hub = _HUB.fullmatch(name)
    if hub is None or path.is_absolute() or path.parts[0] in _OURS:
        raise ValueError(f"{what} {name!r} is no folder; give one, or a hub id owner/name.")
    return hub[1], {key: value for key, value in (("subfolder", hub[2]), ("revision", hub[3])) if value}

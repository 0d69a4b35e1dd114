"""Resolve a name of weights to a local folder or a hub id. Only a hub id ever touches the network."""

import os
import re
import socket
from pathlib import Path
from urllib.parse import urlparse

_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w./-]+?))?(?:@([\w.-]+))?")
_LOCAL = {
    ".",
    "..",
    "checkpoints",
    "models",
    "data",
    "output",
}  # folders of a run, mistyped more often than owners of repositories


def resolve_source(name: str, what: str) -> tuple[str, dict[str, str]]:
    """(folder or hub id, {"subfolder", "revision"}) of a name; ValueError if it is neither.

    A hub id is "owner/name" or "owner/name/subfolder", with "@revision" if wanted; a folder of that name comes first.
    """
    path = Path(name)
    if path.is_dir():
        return str(path), {}
    hub = _HUB.fullmatch(name)
    if hub is None or path.is_absolute() or path.parts[0] in _LOCAL:
        raise ValueError(f"{what} {name!r} is not a folder; give one, or a hub id owner/name.")
    return hub[1], {key: value for key, value in (("subfolder", hub[2]), ("revision", hub[3])) if value}


def check_reachable(source: str, filename: str, options: dict[str, str]) -> None:
    """Raise OSError at once if a hub id is neither cached nor reachable; the hub's client would retry for half a minute."""
    from huggingface_hub import constants, try_to_load_from_cache

    if Path(source).is_dir():
        return
    name = "/".join(part for part in (options.get("subfolder"), filename) if part)
    if isinstance(try_to_load_from_cache(source, name, revision=options.get("revision")), str):
        return
    if constants.HF_HUB_OFFLINE:
        raise OSError("not in the cache, and HF_HUB_OFFLINE is set")
    if not any(os.environ.get(proxy) for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        socket.create_connection((urlparse(constants.ENDPOINT).hostname or "", 443), timeout=5).close()

"""Resolve the name of weights to a local folder or a hub id. The network is used for hub ids only."""

import os
import re
import socket
from pathlib import Path
from urllib.parse import urlparse

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name of a LoRA's weights in a folder
_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w./-]+?))?(?:@([\w.-]+))?")
# Folders of a run: a name that begins with one of them is a mistyped path rather than the owner of a repository.
_LOCAL = {".", "..", "checkpoints", "models", "data", "output"}


def resolve_source(name: str, what: str) -> tuple[str, dict[str, str]]:
    """Resolve a name to (folder or hub id, options); ValueError if it is neither.

    A hub id is "owner/name" or "owner/name/subfolder", optionally with "@revision"; a local folder of that name takes
    precedence. The options are the "subfolder" and "revision" of a hub id. what: the noun for the name in messages.
    """
    path = Path(name)
    if path.is_dir():
        return str(path), {}
    hub = _HUB.fullmatch(name)
    if hub is None or path.is_absolute() or path.parts[0] in _LOCAL:
        raise ValueError(f"{what} {name!r} is not a folder; give one, or a hub id owner/name.")
    return hub[1], {key: value for key, value in (("subfolder", hub[2]), ("revision", hub[3])) if value}


def check_reachable(source: str, filename: str, options: dict[str, str]) -> None:
    """Raise OSError at once if a hub id is neither cached nor reachable.

    The hub's client would retry for half a minute. options: those of `resolve_source`.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if Path(source).is_dir():
        return
    name = "/".join(part for part in (options.get("subfolder"), filename) if part)
    if isinstance(try_to_load_from_cache(source, name, revision=options.get("revision")), str):
        return
    if constants.HF_HUB_OFFLINE:
        raise OSError("not in the cache, and HF_HUB_OFFLINE is set")
    check_connection()


def check_connection() -> None:
    """Raise OSError at once if the hub cannot be reached."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    if not any(os.environ.get(proxy) for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        socket.create_connection((urlparse(constants.ENDPOINT).hostname or "", 443), timeout=5).close()


def is_folder(repo_id: str) -> bool:
    """Whether a push target is a local folder: an existing one, or a path such as ./mine."""
    return repo_id.startswith(("/", "./", "../", "~")) or Path(repo_id).is_dir()

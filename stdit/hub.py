"""Resolve the name of weights to a local folder or a hub id. The network is used for hub ids only."""

import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name of a LoRA's weights in a folder
_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w./-]+?))?(?:@([\w.-]+))?")
# Folders of a run: a name that begins with one of them is a mistyped path rather than the owner of a repository.
_LOCAL = {".", "..", "checkpoints", "models", "data", "output"}
# Arguments of the hub's client that users of diffusers give beside the name.
_CLIENT = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")


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


def with_client_options(options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a name (`resolve_source`) with those of the hub's client among keyword arguments, which count more."""
    return {**options, **{name: given[name] for name in _CLIENT if given.get(name) is not None}}


def check_reachable(source: str, filename: str, options: Mapping[str, Any]) -> None:
    """Raise OSError at once if a hub id is neither cached nor reachable.

    The hub's client would retry for half a minute. options: those of `resolve_source` or `with_client_options`.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if Path(source).is_dir():
        return
    name = "/".join(part for part in (options.get("subfolder"), filename) if part)
    place = {key: options.get(key) for key in ("revision", "cache_dir")}
    cached = isinstance(try_to_load_from_cache(source, name, **place), str)
    barred = {"local_files_only": options.get("local_files_only"), "HF_HUB_OFFLINE": constants.HF_HUB_OFFLINE}
    offline = next((name for name, is_set in barred.items() if is_set), None)
    if cached and (offline or not options.get("force_download")):
        return
    if offline:
        raise OSError(f"not in the cache, and {offline} is set")
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

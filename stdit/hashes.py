"""Hashes of files, and lists of them in a folder, which find a file that was damaged, replaced or added."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

MANIFEST = "MANIFEST.json"


def file_sha256(path: str | os.PathLike) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe_files(folder: Path, files: Iterable[Path]) -> dict[str, dict]:
    """The size and the sha256 of files, by their names below `folder`."""
    return {
        file.relative_to(folder).as_posix(): {"sha256": file_sha256(file), "bytes": file.stat().st_size}
        for file in files
    }


def difference(folder: Path, described: Mapping[str, Mapping], within: str = "") -> str | None:
    """What differs from the description of a folder's files, by size and hash; None if nothing does.

    within: a subfolder to which the comparison is limited.
    """
    for name, recorded in described.items():
        file = folder / name
        if not name.startswith(within):
            continue
        if not file.is_file():
            return f"{name} is missing"
        if recorded.get("bytes") not in (None, file.stat().st_size):
            return f"{name} has {file.stat().st_size} bytes instead of {recorded['bytes']}"
        if "sha256" in recorded and file_sha256(file) != recorded["sha256"]:
            return f"{name} does not match its hash"
    return None


def write_weights_manifest(folder: Path) -> None:
    """Write MANIFEST.json, the sizes and hashes of all safetensors below a model's folder."""
    described = describe_files(folder, sorted(folder.rglob("*.safetensors")))
    (folder / MANIFEST).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def check_weights(folder: Path, within: str = "") -> None:
    """Raise ValueError if weights of a model's folder are not those that its MANIFEST.json lists, where it has one."""
    if not (folder / MANIFEST).is_file():
        return
    try:
        described = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        reason = difference(folder, described, within)
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        reason = f"{MANIFEST} cannot be read: {error}"
    if reason:
        raise ValueError(
            f"{str(folder)!r} is damaged or was changed ({reason}); copy or export the model again, or remove {MANIFEST} if you "
            "changed the weights yourself."
        )

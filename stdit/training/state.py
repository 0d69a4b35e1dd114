"""Checkpoints that survive kills, full disks and flipped bits: written under a temporary name, hashed, fsynced, then renamed."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stdit.hashes import MANIFEST, difference, file_sha256
from stdit.training.shard_files import check_files, check_finite, group_files, part_of

# Checkpoints that this process wrote, or read and found undamaged; they are not hashed again at every save.
_verified: set[tuple] = set()


# Why a checkpoint cannot be trusted, None if it can.
Check = Callable[[Path], str | None]


class Checkpoint(NamedTuple):
    """The state that a run resumes from.

    tensors: group name -> key -> tensor. info: plain JSON.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    info: dict
    path: Path


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], info: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write `folder/step-N`, then remove all but the newest `keep` (at least two) complete ones.

    A checkpoint appears under its name only when complete and on disk; no older one is touched before that.
    Raises OSError naming the space needed when the disk is full; earlier checkpoints stay intact.
    """
    check_finite(
        tensors,
        f"the state after step {step}",
        "nothing was written; resume from the last checkpoint with a lower train.lr, or with train.precision=fp32",
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tmp = folder / f".tmp-{step}-{os.getpid()}"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    try:
        described = {}
        for name, group in tensors.items():
            file = tmp / f"{name}.safetensors"
            save_file({key: _plain(value) for key, value in group.items()}, file)
            described[file.name] = {"sha256": _hash_and_sync(file), "bytes": file.stat().st_size}
        return publish(folder, tmp, step, info, described=described, keep=keep)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(tmp, ignore_errors=True)
        size = sum(value.numel() * value.element_size() for group in tensors.values() for value in group.values())
        raise free_space_error(folder, step, size, error) from error


def publish(
    folder: Path, tmp: Path, step: int, info: Mapping[str, Any], *, described: dict[str, dict], keep: int
) -> Path:
    """Complete a checkpoint whose tensors lie in `tmp`: info, manifest, and its name; then remove older ones.

    described: sizes and hashes of the files of tensors, which are on disk.
    """
    final = folder / f"step-{step}"
    (tmp / "info.json").write_text(json.dumps({"step": step, **info}, indent=1))
    file = tmp / "info.json"
    described = {**described, file.name: {"sha256": _hash_and_sync(file), "bytes": file.stat().st_size}}
    (tmp / MANIFEST).write_text(json.dumps(described, indent=1))
    _sync(tmp / MANIFEST)
    _sync(tmp)
    if final.exists():  # written by a run that resumed from an older checkpoint
        shutil.rmtree(final)
    os.rename(tmp, final)
    _sync(folder)
    _verified.add(_identity(final))
    _prune(folder, max(2, keep))
    return final


def free_space_error(folder: Path, step: int, size: int, error: Exception) -> OSError:
    """The error of a checkpoint that could not be written: the space that it takes, and that there is."""
    free = shutil.disk_usage(folder).free
    return OSError(
        f"Checkpoint of step {step} could not be written to {folder}: {error}. It takes {size / 1e6:.1f} MB, "
        f"{free / 1e6:.1f} MB are free; earlier checkpoints are untouched, free some space and run again to resume."
    )


def load_checkpoint(folder: Path, check: Check | None = None) -> Checkpoint | None:
    """Load the newest undamaged checkpoint of `folder`; None if there are no checkpoints.

    A damaged one is reported on stderr, and the one before it is tried. check: see `Check`; `damage` by default. Raises
    ValueError if all are damaged.
    """
    reasons = []
    for path in list_checkpoints(folder):
        reason = (check or damage)(path)
        if reason is None:
            try:
                return read_checkpoint(path)
            except ValueError as error:
                reason = str(error)
        reasons.append(f"{path}: {reason}")
        print(f"Checkpoint {path} is damaged ({reason}); trying the one before it.", file=sys.stderr)
    if reasons:
        raise ValueError(
            f"No undamaged checkpoint in {folder} ({'; '.join(reasons)}). "
            "Restore one from a backup, or start again with train.resume=never."
        )
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """List checkpoints by step, newest first (not by time stamp, since clocks can go back)."""
    found = [p for p in Path(folder).glob("step-*") if p.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def shared_check(process: int, processes: int) -> Check:
    """A check by several processes, each of which reads some of the files; all get the answer, and all must call it.

    They must see the same checkpoints, since they wait for each other at each.
    """

    def check(path: Path) -> str | None:
        found = gather_object([damage(path, (process, processes))])
        if not any(found):
            _verified.add(_identity(path))
        return next((reason for reason in found if reason), None)

    return check if processes > 1 else damage


def damage(path: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """Why a checkpoint cannot be trusted, or None if every file matches its recorded size and hash.

    Shards must hold finite numbers as well; of other tensors `read_checkpoint` sees to that. share: the number of this part
    of the files and of all parts, when others read the other parts.
    """
    part, parts = share
    if not (path / MANIFEST).is_file():
        return f"{MANIFEST} is missing: copied in part?"
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if not all({"sha256", "bytes"} <= recorded.keys() for recorded in manifest.values()):
            return f"{MANIFEST} has no hashes"
        own = sorted(manifest)[part::parts]
        sizes = {name: {"bytes": recorded["bytes"]} for name, recorded in manifest.items()}
        if reason := difference(path, sizes | {name: manifest[name] for name in own}):
            return reason
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    unlisted = sorted(file.name for file in path.glob("*.safetensors") if file.name not in manifest)
    if unlisted:
        return f"{unlisted[0]} is not listed in {MANIFEST}"
    if "info.json" not in manifest:
        return "info.json is not listed"
    try:
        check_files(path, own)
    except ValueError as error:
        return str(error)
    if parts == 1:
        _verified.add(_identity(path))
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Load one checkpoint folder without checking its hashes. ValueError if a number in it is not finite, except in shards."""
    info = json.loads((path / "info.json").read_text())
    if sharded := group_files(path):  # of which a process reads its rows
        return Checkpoint(info["step"], sharded, info, path)
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    check_finite(tensors, str(path), "use an older checkpoint")
    return Checkpoint(info["step"], tensors, info, path)


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict]:
    """Flatten an optimizer's state for safetensors: tensors named "<parameter index>.<name>", and plain values."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    return tensors, {"numbers": numbers, "param_groups": state["param_groups"]}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], info: dict) -> None:
    """Restore an optimizer's state, the inverse of `flatten_optimizer`; of a sharded model, what this process holds of it.

    The optimizer keeps the implementation that it was built with, since that depends on where its tensors are.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict] = {}
    for key in tensors:
        index, name = key.split(".", 1)
        # What has the size of a parameter is sharded as it is; a number of steps is not.
        value = tensors[key] if name == "step" else part_of(tensors, key, parameters[int(index)])
        state.setdefault(int(index), {})[name] = value.clone()  # load_state_dict would share it
    for index, values in info["numbers"].items():
        state.setdefault(int(index), {}).update(values)
    groups = [
        {**saved, **{key: own[key] for key in ("foreach", "fused") if key in own}}
        for saved, own in zip(info["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _identity(path: Path) -> tuple:
    """A key that changes with the files of a checkpoint: their names, sizes and times of change."""
    files = sorted(path.iterdir()) if path.is_dir() else []
    return (str(path.resolve()), *((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


def manifest_hash(path: Path) -> str:
    """The hash of a checkpoint's manifest, which identifies all of its content."""
    return file_sha256(path / MANIFEST)


def _hash_and_sync(file: Path) -> str:
    """Wait until a file is on disk -> its sha256."""
    _sync(file)
    return file_sha256(file)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders; its renames are journalled
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(folder: Path, keep: int) -> None:
    """Remove checkpoints older than the newest `keep` undamaged ones, and temporary folders of killed processes.

    Damaged checkpoints, whose files do not match their hashes, do not count.
    """
    whole = 0
    for path in list_checkpoints(folder):
        if whole >= keep:
            shutil.rmtree(path, ignore_errors=True)
        elif _identity(path) in _verified or damage(path) is None:
            whole += 1
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)

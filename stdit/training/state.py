"""Checkpoints that survive kills, full disks and flipped bits: written under a temporary name, hashed, fsynced, then renamed."""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "MANIFEST.json"


class Checkpoint(NamedTuple):
    """All that is needed to resume. tensors: group name -> key -> tensor; info: plain JSON."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    info: dict
    path: Path


def save_checkpoint(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], info: dict, keep: int = 2) -> Path:
    """Write `folder/step-N`, then prune to the newest `keep` (at least two) whole ones.

    A checkpoint appears under its name only when complete and on disk; no older one is touched before that.
    Raises OSError naming the space needed when the disk is full; what was there before stays whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step}"
    tmp = folder / f".tmp-{step}-{os.getpid()}"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    try:
        for name, group in tensors.items():
            save_file({key: _plain(value) for key, value in group.items()}, tmp / f"{name}.safetensors")
        (tmp / "info.json").write_text(json.dumps({"step": step, **info}, indent=1))
        files = sorted(tmp.iterdir())
        manifest = {file.name: {"sha256": _hash_and_sync(file), "bytes": file.stat().st_size} for file in files}
        (tmp / MANIFEST).write_text(json.dumps(manifest, indent=1))
        _sync(tmp / MANIFEST)
        _sync(tmp)
        if final.exists():  # left by a run that went on from an older checkpoint
            shutil.rmtree(final)
        os.rename(tmp, final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(tmp, ignore_errors=True)
        size = sum(value.numel() * value.element_size() for group in tensors.values() for value in group.values())
        free = shutil.disk_usage(folder).free
        raise OSError(
            f"Checkpoint of step {step} could not be written to {folder}: {error}. It takes {size / 1e6:.1f} MB, "
            f"{free / 1e6:.1f} MB are free; earlier checkpoints are untouched, free some space and run again to resume."
        ) from error
    _prune(folder, max(2, keep))
    return final


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of `folder`, or of a run; None if there is none at all.

    A damaged one is reported on stderr and the one before it is tried. ValueError if all are damaged.
    """
    reasons = []
    for path in list_checkpoints(folder):
        reason = damage(path)
        if reason is None:
            return read_checkpoint(path)
        reasons.append(f"{path}: {reason}")
        print(f"Checkpoint {path} is damaged ({reason}); trying the one before it.", file=sys.stderr)
    if reasons:
        raise ValueError(
            f"No whole checkpoint in {folder} ({'; '.join(reasons)}). "
            "Restore one from a backup, or start afresh with train.resume=never."
        )
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints by step, newest first (never by time stamp: clocks go back)."""
    found = [p for p in Path(folder).glob("step-*") if p.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def damage(path: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None if every file matches its recorded size and hash."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, recorded in manifest.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != recorded["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {recorded['bytes']}"
            if _hash(file) != recorded["sha256"]:
                return f"{name} does not match its hash"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None if "info.json" in manifest else "info.json is not listed"


def read_checkpoint(path: Path) -> Checkpoint:
    """Load one checkpoint folder without checking its hashes."""
    info = json.loads((path / "info.json").read_text())
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return Checkpoint(info["step"], tensors, info, path)


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict]:
    """An optimizer's state as safetensors holds it: tensors "<parameter index>.<name>", and plain numbers."""
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


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], info: dict) -> None:
    """Inverse of `flatten_optimizer`."""
    state: dict[int, dict] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value.clone()  # load_state_dict would share it
    for index, values in info["numbers"].items():
        state.setdefault(int(index), {}).update(values)
    optimizer.load_state_dict({"state": state, "param_groups": info["param_groups"]})


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _hash(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _hash_and_sync(file: Path) -> str:
    _sync(file)
    return _hash(file)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(folder: Path, keep: int) -> None:
    """Remove what is older than the newest `keep` whole checkpoints, and what killed writers left behind."""
    whole = 0
    for path in list_checkpoints(folder):
        if whole >= keep:
            shutil.rmtree(path, ignore_errors=True)
        elif (path / MANIFEST).is_file():
            whole += 1
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)

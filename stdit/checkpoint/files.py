"""Weights from files, without ever running what is in them."""

import argparse
import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


class Weights(NamedTuple):
    """Tensors by name; `config`: the config.json beside them, if any; `origin`: where they were, for messages."""

    tensors: dict[str, Tensor]
    config: dict
    origin: str


def read_weights(path: str | Path, which: str = "ema") -> Weights:
    """Read a .pt, .pth, .ckpt, .bin or .safetensors file, or a diffusers folder that holds one model.

    which: "ema" or "model", of a training checkpoint that has both. Raises ValueError in one line for what is no
    file of weights, holds anything but tensors, is cut short, is a LoRA, or has numbers that are not finite.
    """
    path = Path(path)
    if path.is_dir():
        weights = _read_folder(path)
    elif not path.is_file():
        raise ValueError(f"{str(path)!r} does not exist; give a file of weights, or a folder that diffusers wrote.")
    elif path.suffix == ".safetensors":
        weights = Weights(_read_safetensors(path), read_json(path.parent / "config.json"), str(path))
    else:
        weights = Weights(_pick(_read_torch(path), which, path), read_json(path.parent / "config.json"), str(path))
    check_tensors(weights.tensors, weights.origin)
    return weights


def _read_torch(path: Path) -> object:
    try:
        # DiT and Latte keep their command line beside the weights: a plain record, which runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        found = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"class ([\w.]+)", str(error))
        if found:
            raise ValueError(
                f"{str(path)!r} holds {found[1]}, which is no tensor and could run code; nothing of it was loaded. "
                "Ask its author for safetensors, or for a bare state dict."
            ) from error
        raise ValueError(
            f"{str(path)!r} is no whole file of torch weights ({' '.join(str(error).split())[:120]}); fetch it again."
        ) from error


def _pick(loaded: object, which: str, path: Path) -> dict[str, Tensor]:
    """The state dict of a training checkpoint, or the bare one."""
    held = [
        key for key in ("ema", "model", "state_dict") if isinstance(loaded, dict) and isinstance(loaded.get(key), dict)
    ]
    if held:
        assert isinstance(loaded, dict)
        if which not in held and "state_dict" not in held:
            raise ValueError(f"{str(path)!r} holds {' and '.join(held)} but no {which!r}; use --weights {held[0]}.")
        loaded = loaded[which if which in held else "state_dict"]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(v, Tensor) for v in loaded.values()):
        inside = sorted(map(str, loaded))[:6] if isinstance(loaded, dict) else type(loaded).__name__
        raise ValueError(f"{str(path)!r} holds no state dict but {inside}; give a file of a model's weights.")
    return {str(key).removeprefix("module."): value for key, value in loaded.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(path)!r} is no whole safetensors file ({error}); fetch it again.") from error


def _read_folder(folder: Path) -> Weights:
    files = {f.name for f in folder.glob("*.safetensors")}
    indices = sorted(folder.glob("*.safetensors.index.json"))
    listed = read_json(indices[0]).get("weight_map", {}) if indices else {}
    shards = set(listed.values()) if isinstance(listed, dict) else set()
    if len(indices) > 1 or (not indices and len(files) > 1) or (indices and files - shards):
        names = ", ".join(sorted(files)[:4])
        raise ValueError(f"{str(folder)!r} holds more than one model ({names}); name one of the files.")
    if indices and (not shards or not shards <= files):
        lost = sorted(map(str, shards - files))[:3] or "no weight_map"
        raise ValueError(f"{str(indices[0])!r} lists {lost}, which the folder does not hold; fetch it again.")
    if not files:
        others = sorted(f.name for kind in ("*.bin", "*.pt") for f in folder.glob(kind))
        if others == ["diffusion_pytorch_model.bin"]:
            return read_weights(folder / others[0])
        hint = f"name {others[0]} itself" if others else "a folder needs *.safetensors"
        raise ValueError(f"{str(folder)!r} has no safetensors; {hint}.")
    tensors = {key: value for name in sorted(files) for key, value in _read_safetensors(folder / name).items()}
    return Weights(tensors, read_json(folder / "config.json"), str(folder))


def read_json(path: Path) -> dict:
    """A JSON object, or nothing where there is no file."""
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON ({error}); fetch it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} holds no settings but {type(found).__name__}; fetch it again.")
    return found


def check_tensors(tensors: dict[str, Tensor], origin: str) -> None:
    """ValueError in one line if these are an adapter's, or not whole, dense, finite numbers."""
    if any("lora_" in key for key in tensors):
        raise ValueError(
            f"{origin!r} is a LoRA, not a model; load the model, then model.load_lora_adapter({origin!r})."
        )
    odd = [key for key, value in tensors.items() if value.layout != torch.strided or value.is_meta or not value.numel()]
    if odd:
        raise ValueError(f"{origin!r}: {odd[0]!r} is sparse or empty; save the weights as dense tensors.")
    broken = [key for key, value in tensors.items() if not torch.isfinite(value.float()).all()]
    if broken:
        raise ValueError(
            f"{origin!r}: {len(broken)} of {len(tensors)} tensors have NaN or infinite numbers, the first {broken[0]!r}; "
            "take an earlier checkpoint."
        )

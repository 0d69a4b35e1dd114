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
        weights = Weights(_read_safetensors(path), {}, str(path))
    else:
        weights = Weights(_pick(_read_torch(path), which, path), {}, str(path))
    _check(weights)
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
    for key in (which, "ema", "model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
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
    index = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    if index:
        listed = json.loads(index[0].read_text())["weight_map"].values()
        files = sorted({folder / name for name in listed})
    elif len(files) > 1:
        raise ValueError(
            f"{str(folder)!r} holds {len(files)} models ({', '.join(f.name for f in files[:4])}); name one of the files."
        )
    if not files:
        others = [f.name for f in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))]
        hint = f"name {others[0]} itself" if others else "a folder needs *.safetensors"
        raise ValueError(f"{str(folder)!r} has no safetensors; {hint}.")
    tensors = {key: value for file in files for key, value in _read_safetensors(file).items()}
    return Weights(tensors, read_json(folder / "config.json"), str(folder))


def read_json(path: Path) -> dict:
    """A JSON file, or nothing where there is none."""
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON ({error}); fetch it again.") from error


def _check(weights: Weights) -> None:
    tensors, origin = weights.tensors, weights.origin
    if any("lora_" in key for key in tensors):
        raise ValueError(
            f"{origin!r} is a LoRA, not a model; load the model, then model.load_lora_adapter({origin!r})."
        )
    broken = [key for key, value in tensors.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(
            f"{origin!r}: {len(broken)} of {len(tensors)} tensors have NaN or infinite numbers, the first {broken[0]!r}; "
            "take an earlier checkpoint."
        )

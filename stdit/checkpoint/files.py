"""Read weights from files without executing any code in them."""

import argparse
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stdit.checkpoint.wrappers import unwrapped
from stdit.files import read_json
from stdit.weights import check_tensor_bytes, check_torch_file, safetensors_shapes


class Weights(NamedTuple):
    """The tensors of a model by name.

    config: the config.json next to them, {} if there is none. origin: their path, for messages.
    """

    tensors: dict[str, Tensor]
    config: dict
    origin: str


def read_weights(path: str | Path, which: str = "ema") -> Weights:
    """Read a .pt, .pth, .ckpt, .bin or .safetensors file, or a diffusers folder that holds one model.

    which: "ema" or "model", for a training checkpoint that has both. Raises ValueError in one line for a path without
    weights, and for a file that holds anything but tensors, is truncated, is a LoRA, or has values that are not finite.
    """
    path = Path(path)
    if path.is_dir():
        weights = _read_folder(path)
    elif not path.is_file():
        raise ValueError(f"{str(path)!r} does not exist; give a file of weights, or a folder that diffusers wrote.")
    elif path.suffix == ".safetensors":
        tensors = unwrapped(_read_safetensors(path), which)
        weights = Weights(tensors, read_json(path.parent / "config.json"), str(path))
    else:
        weights = Weights(_pick(_read_torch(path), which, path), read_json(path.parent / "config.json"), str(path))
    check_tensors(weights.tensors, weights.origin)
    return weights


def _read_torch(path: Path) -> object:
    """Load a file of torch.save, in which only tensors and plain containers are allowed."""
    check_torch_file(path)
    try:
        # DiT and Latte save their command line with the weights: a plain record, which executes nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises errors of many types
        found = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"class ([\w.]+)", str(error))
        if found:
            raise ValueError(
                f"{str(path)!r} holds {found[1]}, which is not a tensor and could run code, so nothing was loaded. "
                "Ask its author for safetensors, or for a bare state dict."
            ) from error
        raise ValueError(
            f"{str(path)!r} is not a complete file of torch weights ({' '.join(str(error).split())[:120]}); download it again."
        ) from error


def _pick(loaded: object, which: str, path: Path) -> dict[str, Tensor]:
    """The state dict in a training checkpoint, or the content of the file if that is a state dict."""
    present = [
        key for key in ("ema", "model", "state_dict") if isinstance(loaded, dict) and isinstance(loaded.get(key), dict)
    ]
    if present:
        assert isinstance(loaded, dict)
        if which not in present and "state_dict" not in present:
            raise ValueError(
                f"{str(path)!r} holds {' and '.join(present)} but no {which!r}; use --weights {present[0]}."
            )
        loaded = loaded[which if which in present else "state_dict"]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(v, Tensor) for v in loaded.values()):
        content = sorted(map(str, loaded))[:6] if isinstance(loaded, dict) else type(loaded).__name__
        raise ValueError(f"{str(path)!r} holds {content}, not a state dict; give a file of a model's weights.")
    check_tensor_bytes(loaded, path)
    return unwrapped({str(key): value for key, value in loaded.items()}, which)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    safetensors_shapes(path)  # which bounds its header
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(path)!r} is not a complete safetensors file ({error}); download it again.") from error


def _read_folder(folder: Path) -> Weights:
    """The weights of a folder that holds one model, in one file or in shards with an index."""
    files = {f.name for f in folder.glob("*.safetensors")}
    indices = sorted(folder.glob("*.safetensors.index.json"))
    listed = read_json(indices[0]).get("weight_map", {}) if indices else {}
    shards = set(listed.values()) if isinstance(listed, dict) else set()
    if len(indices) > 1 or (not indices and len(files) > 1) or (indices and files - shards):
        names = ", ".join(sorted(files)[:4])
        raise ValueError(f"{str(folder)!r} holds more than one model ({names}); name one of the files.")
    if indices and (not shards or not shards <= files):
        absent = sorted(map(str, shards - files))[:3] or "no weight_map"
        raise ValueError(f"{str(indices[0])!r} lists {absent}, which the folder does not hold; download it again.")
    if not files:
        others = sorted(f.name for kind in ("*.bin", "*.pt") for f in folder.glob(kind))
        if others == ["diffusion_pytorch_model.bin"]:
            return read_weights(folder / others[0])
        hint = f"name {others[0]} itself" if others else "a folder needs *.safetensors"
        raise ValueError(f"{str(folder)!r} has no safetensors; {hint}.")
    tensors = {key: value for name in sorted(files) for key, value in _read_safetensors(folder / name).items()}
    return Weights(unwrapped(tensors), read_json(folder / "config.json"), str(folder))


def check_tensors(tensors: dict[str, Tensor], origin: str) -> None:
    """Raise ValueError, in one line, if the tensors belong to a LoRA, or are not dense and finite."""
    if any("lora_" in key for key in tensors):
        raise ValueError(
            f"{origin!r} is a LoRA, not a model; load the model, then model.load_lora_adapter({origin!r})."
        )
    unusable = [
        key for key, value in tensors.items() if value.layout != torch.strided or value.is_meta or not value.numel()
    ]
    if unusable:
        raise ValueError(f"{origin!r}: {unusable[0]!r} is sparse or empty; save the weights as dense tensors.")
    not_finite = [key for key, value in tensors.items() if not torch.isfinite(value.float()).all()]
    if not_finite:
        raise ValueError(
            f"{origin!r}: {len(not_finite)} of {len(tensors)} tensors have NaN or infinite numbers, the first {not_finite[0]!r}; "
            "take an earlier checkpoint."
        )

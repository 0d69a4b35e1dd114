"""LoRA files: written, read, and checked against the model that they are for.

They are in diffusers' format: `transformer.LAYER.lora_A.weight` and `lora_B.weight` in pytorch_lora_weights.safetensors.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stdit.files import atomic_write
from stdit.hub import LORA_FILE
from stdit.nn.low_rank import (
    LowRank,
    adapters_of,
    attach,
    is_low_rank,
    linear_layers,
    lora_names,
    set_lora_strength,
)
from stdit.warn import warn_user
from stdit.weights import safetensors_shapes

PREFIX = "transformer"  # of the names in a file: the component of a pipeline that the LoRA is for
_SETTINGS = "lora_adapter_metadata"  # diffusers' key in a file's metadata


class Lora(NamedTuple):
    """What a file of a LoRA holds.

    pairs: the matrices A (rank, in) and B (out, rank) of each layer. scales: alpha / rank of each layer. info: the texts of
    its metadata.
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    scales: dict[str, float]
    info: dict[str, str]


def load_lora(
    model: nn.Module, source: str | Path, strength: float = 1.0, name: str | None = None, *, compare: bool = True
) -> str:
    """Add the LoRA of a file, or of a folder that holds one, to a model -> its name in the model.

    strength: how much it counts, 1 as it was trained; several add up. ValueError for a file that is no LoRA of this model.
    compare: warn of one that was trained on other weights of the same shapes.
    """
    check_adapter_name(name)
    lora = read_lora(model, source)
    base = lora.info.get("base_fingerprint") if compare else None
    if base is not None and next(model.parameters()).dtype == torch.float32 and base != base_fingerprint(model):
        trained_on = f" ({lora.info['base'][:200]})" if lora.info.get("base") else ""
        warn_user(f"{source} was trained on other weights{trained_on} than those of this model, and may not fit them.")
    name = free_name(model, Path(source).stem) if name is None else name
    layers = linear_layers(model)
    for key, (a, b) in lora.pairs.items():
        adapter = LowRank(layers[key], len(a), lora.scales[key])
        with torch.no_grad():
            adapter.lora_A.weight.copy_(a)
            adapter.lora_B.weight.copy_(b)
        attach(layers[key], name, adapter.requires_grad_(False))
    set_lora_strength(model, name, strength)
    return name


def check_adapter_name(name: str | None) -> None:
    """Raise ValueError for a name that no module of a model can have; None is one that is yet to be made."""
    if name is None:
        return
    if not isinstance(name, str) or "." in name or not name:
        raise ValueError(f"adapter_name is {name!r}; give a text without a point.")
    if _is_taken(name):
        raise ValueError(
            f"adapter_name is {name!r}, which torch's modules use themselves; give another, such as my_{name}."
        )


def _is_taken(name: str) -> bool:
    """Whether a ModuleDict, in which LoRAs lie, has an attribute of this name, such as "train"."""
    return hasattr(nn.ModuleDict(), name)


def free_name(model: nn.Module, wanted: str) -> str:
    """A name that no LoRA of a model has, made from a text."""
    plain = re.sub(r"\W+", "_", wanted) or "lora"
    taken, number, name = lora_names(model), 2, plain
    while name in taken or _is_taken(name):
        name, number = f"{plain}_{number}", number + 1
    return name


def split_strength(text: str) -> tuple[str, float]:
    """Split PATH[:SCALE] into the path and the strength, 1 without one; ValueError if the latter is no number."""
    path, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        return path, float(tail)
    except ValueError:
        if Path(path).exists():
            raise ValueError(f"--lora {text}: {tail!r} is no number; write PATH:SCALE, such as {path}:0.8.") from None
        return text, 1.0


def lora_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The matrices of a LoRA in a model, by the name of their layer and "lora_A.weight" or "lora_B.weight"."""
    return {f"{key}.{part}": value for key, one in adapters_of(model, name) for part, value in one.state_dict().items()}


def save_lora(model: nn.Module, name: str, folder: Path, info: Mapping[str, str] | None = None) -> Path:
    """Write a LoRA of a model to a folder, as it was trained, in float32 and diffusers' format -> its file.

    info: further texts for the metadata. ValueError, and nothing is written, if a number is not finite.
    """
    tensors = {f"{PREFIX}.{key}": x.detach().float().cpu().contiguous() for key, x in lora_tensors(model, name).items()}
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise ValueError(
                f"{key} has numbers that are not finite; resume an older checkpoint with a lower train.lr."
            )
    layers = adapters_of(model, name)
    rank = layers[0][1].lora_A.out_features
    settings = {"r": rank, "lora_alpha": layers[0][1].scale * rank, "target_modules": sorted(key for key, _ in layers)}
    described = json.dumps({f"{PREFIX}.{key}": value for key, value in settings.items()})
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / LORA_FILE) as tmp:
        save_file(tensors, tmp, metadata={"format": "pt", _SETTINGS: described, **(info or {})})
    return folder / LORA_FILE


def base_fingerprint(model: nn.Module) -> str:
    """A hash of some numbers of each of a model's weights, those of LoRAs left out."""
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        if not is_low_rank(name):
            flat = value.detach().flatten()
            some = flat[:: max(1, len(flat) // 64)].float().cpu().numpy()
            digest.update(f"{name} {tuple(value.shape)} ".encode() + some.tobytes())
    return digest.hexdigest()[:16]


def lora_file(source: str | Path) -> Path:
    """The file of a LoRA that is given by its path or its folder; ValueError if there is none."""
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"there is no LoRA {str(source)!r}; give its file, or the folder that it lies in.")
    files = sorted(path.glob("*.safetensors"))
    if (path / LORA_FILE) in files or len(files) != 1:
        return path / LORA_FILE  # whose absence is said where it is read
    return files[0]


def lora_prefix(path: Path) -> str | None:
    """The prefix "transformer" if names in a file have it, None otherwise."""
    return PREFIX if any(name.startswith(f"{PREFIX}.") for name in safetensors_shapes(path)) else None


def read_lora(model: nn.Module, source: str | Path) -> Lora:
    """Read the LoRA of a file or a folder; ValueError, in one line, if it is none of this model."""
    path = lora_file(source)
    prefix = lora_prefix(path)
    check_lora(model, path, path.name, prefix)
    start = "" if prefix is None else f"{prefix}."
    with safe_open(path, "pt") as file:
        info, names = file.metadata() or {}, [key for key in file.keys() if key.startswith(start)]  # noqa: SIM118
        tensors = {key.removeprefix(start): file.get_tensor(key) for key in names}
    layers, settings = linear_layers(model), _settings(path, info.get(_SETTINGS), start)
    alphas = {key.removesuffix(".alpha"): tensors.pop(key) for key in list(tensors) if key.endswith(".alpha")}
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for key in sorted({key.partition(".lora_")[0] for key in tensors if ".lora_" in key}):
        a, b = (tensors.pop(f"{key}.lora_{side}.weight", None) for side in "AB")
        if a is None or b is None or len(a) != b.shape[1]:
            raise ValueError(f"{str(path)!r} has no lora_A and lora_B of one rank for {key[:100]}; save it again.")
        if key not in layers:
            raise ValueError(f"{str(path)!r}: {key[:100]} is no linear layer; give a LoRA of linear layers.")
        pairs[key] = (a, b)
    if tensors:
        raise ValueError(f"{str(path)!r} has {next(iter(tensors))[:100]}, which is no part of a plain LoRA (A and B).")
    return Lora(
        pairs, {key: _scale(path, key, len(a), alphas=alphas, settings=settings) for key, (a, _) in pairs.items()}, info
    )


def _settings(path: Path, text: str | None, start: str) -> dict[str, Any]:
    """The settings that diffusers writes into a file, such as lora_alpha."""
    if text is None:
        return {}
    try:
        given = {key.removeprefix(start): value for key, value in json.loads(text).items() if key.startswith(start)}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} has settings ({_SETTINGS}) that are no JSON object; save it again.") from error
    if given.get("use_dora"):
        raise ValueError(f"{str(path)!r} is a DoRA, which stdit does not read; train a LoRA.")
    return given


def _scale(path: Path, key: str, rank: int, *, alphas: Mapping[str, Tensor], settings: Mapping[str, Any]) -> float:
    """alpha / rank of a layer, or alpha / sqrt(rank) of a rank-stabilised LoRA; alpha is the rank where the file does not say."""
    alpha = alphas[key].item() if key in alphas and alphas[key].numel() == 1 else settings.get("lora_alpha", rank)
    own = settings.get("alpha_pattern")
    if isinstance(own, dict):
        alpha = next((own[name] for name in own if key == name or key.endswith(f".{name}")), alpha)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(
            f"{str(path)!r} gives alpha={str(alpha)[:40]} for {key[:100]}, which is no number; save it again."
        )
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def check_lora(model: nn.Module, source: Path, weight_name: str, prefix: str | None = None) -> None:
    """Raise ValueError, in one line, for a file that is no LoRA of `model`.

    source: the file, or the folder of the file `weight_name`. prefix: of the names that count. Ranks are at most the
    width of their layer, and all numbers finite.
    """
    path = source / weight_name if source.is_dir() else source
    layers, start = dict(model.named_modules()), f"{prefix}." if prefix else ""
    shapes = {
        name.removeprefix(start): shape for name, shape in safetensors_shapes(path).items() if name.startswith(start)
    }
    pairs = {name: shape for name, shape in shapes.items() if ".lora_A" in name or ".lora_B" in name}
    if not pairs:
        raise ValueError(
            f"{str(path)!r} is no LoRA: none of its tensors is a lora_A or lora_B; give a LoRA of this model."
        )
    for name, shape in pairs.items():
        layer_name, _, kind = name.partition(".lora_")
        weight = getattr(layers.get(layer_name), "weight", None)
        if weight is None:
            raise ValueError(f"{str(path)!r} is a LoRA of another model: this one has no layer {layer_name[:100]!r}.")
        side = weight.shape[1] if kind.startswith("A") else weight.shape[0]
        rank, length = (
            (shape[0], shape[1:2]) if kind.startswith("A") else (shape[1] if len(shape) > 1 else 0, shape[:1])
        )
        if weight.ndim != len(shape) or length != (side,) or rank > max(weight.shape[:2]):
            raise ValueError(
                f"{str(path)!r} is a LoRA of another model: {name[:100]} is {shape}, but the layer is {tuple(weight.shape)}."
            )
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if not torch.isfinite(file.get_tensor(name).float()).all():
                    raise ValueError(
                        f"{str(path)!r}: {name[:100]} has numbers that are not finite; take an earlier LoRA."
                    )
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a complete safetensors file ({error}); download it again.") from error

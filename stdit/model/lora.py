"""Check a LoRA file from anywhere against the model that it is for."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from stdit.weights import safetensors_shapes


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

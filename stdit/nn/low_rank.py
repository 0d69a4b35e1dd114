"""LoRA: low-rank matrices that are added to the linear layers of a model (Hu et al., "LoRA").

They lie in the layers themselves, `blocks.0.attn.qkv.lora.NAME.lora_A`, and a forward hook adds their product, so that names of
the other weights stay, and a model without them, or with all of them off, computes what it did before, bit for bit.
"""

import math
import re
import zlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stdit.rng import keyed_generator

LAYERS = r"blocks\..*\.(qkv|q|kv|proj|fc1|fc2)"  # the matrices of attention and MLP
_INSIDE = re.compile(r"(^|\.)lora\.[^.]+\.lora_[AB](\.weight)?$")  # names of parts of a LoRA


class LowRank(nn.Module):
    """The product of two matrices, x -> strength * scale * B A x, zero at initialisation.

    scale: alpha / rank, which belongs to the LoRA; strength: chosen by its user, 0 turns it off.
    """

    def __init__(self, layer: nn.Linear, rank: int, scale: float):
        super().__init__()
        factory: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        self.lora_A = nn.Linear(layer.in_features, rank, bias=False, **factory)
        self.lora_B = nn.Linear(rank, layer.out_features, bias=False, **factory)
        nn.init.zeros_(self.lora_B.weight)
        self.scale, self.strength = scale, 1.0

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the output of the layer."""
        return self.strength * self.scale * self.lora_B(self.lora_A(x))

    def product(self) -> Tensor:
        """What is added to the weight of the layer, in float32."""
        return self.strength * self.scale * (self.lora_B.weight.float() @ self.lora_A.weight.float())


def _add_adapters(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A forward hook: the output of a linear layer with what its LoRAs add."""
    for adapter in layer.lora.values():  # type: ignore[operator, union-attr]
        if adapter.strength:
            output = output + adapter(inputs[0])
    return output


def is_low_rank(name: str) -> bool:
    """Whether a name of a model's state is that of a matrix of a LoRA."""
    return _INSIDE.search(name) is not None


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a model by their names, without those of LoRAs."""
    modules = model.named_modules()
    return {name: layer for name, layer in modules if isinstance(layer, nn.Linear) and not is_low_rank(name)}


def add_lora(
    model: nn.Module, name: str, *, rank: int, alpha: float | None = None, layers: str = LAYERS, seed: int = 0
) -> None:
    """Add a new LoRA to the linear layers whose names match the regular expression `layers`.

    alpha: the product is scaled by alpha / rank; None: the rank. A is uniform in +-1 / sqrt(width), a function of (seed,
    name of the layer) alone, and B is zero. ValueError as `adapted_layers`.
    """
    for key, layer in adapted_layers(model, rank, layers).items():
        adapter = LowRank(layer, rank, (rank if alpha is None else alpha) / rank)
        shape, generator = adapter.lora_A.weight.shape, keyed_generator("lora", seed, zlib.crc32(key.encode()))
        with torch.no_grad():
            adapter.lora_A.weight.copy_((2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(layer.in_features))
        attach(layer, name, adapter)


def adapted_layers(model: nn.Module, rank: int, layers: str = LAYERS) -> dict[str, nn.Linear]:
    """The linear layers, by name, to which a LoRA adds; ValueError if no layer matches, or one is narrower than the rank."""
    try:
        pattern = re.compile(layers)
    except re.error as error:
        raise ValueError(f"train.lora.layers={layers!r} is no regular expression ({error}); correct it.") from error
    found = {key: layer for key, layer in linear_layers(model).items() if pattern.fullmatch(key)}
    if not found:
        some = ", ".join(list(linear_layers(model))[:6])
        raise ValueError(f"train.lora.layers={layers!r} matches no linear layer of the model; it has {some}, ...")
    for key, layer in found.items():
        width = min(layer.weight.shape)
        if rank > width:
            raise ValueError(f"a LoRA of rank {rank} is wider than {key}, which has {width}; use a smaller rank.")
    return found


def attach(layer: nn.Linear, name: str, adapter: LowRank) -> None:
    """Add one LoRA to one layer; ValueError if it has one of that name."""
    if not hasattr(layer, "lora"):
        layer.lora = nn.ModuleDict()
        layer._lora_hook = layer.register_forward_hook(_add_adapters)  # type: ignore[assignment]
    if name in layer.lora:  # type: ignore[operator]
        raise ValueError(f"the model has a LoRA {name!r} already; choose another name, or remove it.")
    layer.lora[name] = adapter  # type: ignore[index, operator, assignment]


def lora_names(model: nn.Module) -> list[str]:
    """The names of a model's LoRAs."""
    return list(dict.fromkeys(name for _, adapters in _adapted(model) for name in adapters))


def set_lora_strength(model: nn.Module, name: str, strength: float) -> None:
    """Choose how much a LoRA counts: 1 as it was trained, 0 not at all."""
    if not math.isfinite(strength):
        raise ValueError(f"the strength of a LoRA must be a finite number, got {strength}; 1 is as trained.")
    for _, adapter in adapters_of(model, name):
        adapter.strength = float(strength)


def remove_lora(model: nn.Module, name: str | None = None) -> None:
    """Take a LoRA off a model, or all of them (None)."""
    names = lora_names(model) if name is None else [name]
    for one in names:
        adapters_of(model, one)  # which refuses unknown names
    for layer, adapters in list(_adapted(model)):
        for one in set(names) & set(adapters):
            del adapters[one]
        if not len(adapters):
            del layer.lora
            cast(RemovableHandle, layer._lora_hook).remove()
            del layer._lora_hook


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add all LoRAs, each by its strength, to the weights of a model, which then has none."""
    for layer, adapters in _adapted(model):
        active = [one.product() for one in adapters.values() if one.strength]  # type: ignore[operator]
        if active:
            layer.weight.copy_(layer.weight.float() + torch.stack(active).sum(0))
    remove_lora(model)


def adapters_of(model: nn.Module, name: str) -> list[tuple[str, LowRank]]:
    """A LoRA's part of each layer that has one, by the name of the layer; ValueError if the model has none of this name."""
    found = [
        (key, layer.lora[name])  # type: ignore[index]
        for key, layer in linear_layers(model).items()
        if name in getattr(layer, "lora", {})
    ]
    if not found:
        raise ValueError(f"the model has no LoRA {name!r}; it has {', '.join(lora_names(model)) or 'none'}.")
    return found  # type: ignore[return-value]


def _adapted(model: nn.Module) -> Iterator[tuple[nn.Linear, nn.ModuleDict]]:
    """The layers that have LoRAs, with those by name."""
    for layer in linear_layers(model).values():
        if hasattr(layer, "lora"):
            yield layer, layer.lora  # type: ignore[misc]

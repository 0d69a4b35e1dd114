"""Estimates the cost of a model before it is built: operations by kind, and the memory of training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from stdit.conditions import Conditions
from stdit.conditions.values import map_tensors
from stdit.model.stdit import STDiT
from stdit.nn.muon import muon_parameters

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Cost:
    """Size of a model and operations of one forward pass.

    parameters: all parameters, without fixed position tables; table: numbers in DiT's position table, which DiT counts
    as parameters. tokens: of one clip. flops: multiply-adds of one forward pass, by kind.
    """

    parameters: int
    table: int
    tokens: int
    flops: dict[str, float]

    @property
    def total(self) -> float:
        """Multiply-adds of one forward pass, of all kinds."""
        return sum(self.flops.values())


def forward_cost(arguments: dict[str, Any], latent: Shape) -> Cost:
    """Count one forward pass of a clip of `latent` (T, h, w) on the meta device, in multiply-adds as in DiT's paper.

    flops has the keys "attention spatial", "attention temporal", "attention joint" (with their projections),
    "attention to the condition", "mlp", "modulation" and "embedding and head".
    """
    with torch.device("meta"):
        model = STDiT(**arguments)
        inputs = _inputs(model, latent, 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs, **_example_conditions(model))
    counts = {name: sum(ops.values()) / 2 for name, ops in counter.get_flop_counts().items()}
    flops: dict[str, float] = {}
    inside = 0.0
    for i, block in enumerate(model.blocks):
        kinds = {
            f"attention {block.attn.axis}": "attn", "attention to the condition": "cross_attn", "mlp": "mlp",
            "modulation": "adaLN_modulation",
        }  # fmt: skip
        for kind, part in kinds.items():
            count = counts.get(f"STDiT.blocks.{i}.{part}", 0.0)
            flops[kind] = flops.get(kind, 0.0) + count
            inside += count
    flops["embedding and head"] = counts.get("Global", 0.0) - inside
    patches = latent[1] // model.patch_size[1] * (latent[2] // model.patch_size[2])
    return Cost(
        sum(p.numel() for p in model.parameters()),
        patches * model.config.hidden_size,
        latent[0] // model.patch_size[0] * patches,
        flops,
    )


@torch.no_grad()
def clip_flops(model: STDiT, latent: Shape) -> float:
    """Multiply-adds of one forward pass of a clip of `latent` (T, h, w), counted by running the model."""
    with FlopCounterMode(display=False) as counter:
        model(*_inputs(model, latent, 1), **_example_conditions(model))
    return counter.get_total_flops() / 2


def flops_of_config(config: Mapping[str, Any], latent: Shape) -> float:
    """Multiply-adds of one forward pass of a clip of `latent` (T, h, w) by the model of a config, on the meta device."""
    with torch.device("meta"):
        model = STDiT.from_config(dict(config))
        return clip_flops(model, latent)


def _example_conditions(model: STDiT, batch: int = 1) -> dict[str, Conditions]:
    """An example of every condition that has no default."""
    given = {
        name: conditioner.example(batch)
        for name, conditioner in model.conditioners.items()
        if conditioner.joins == "tokens"
    }
    return {"conditions": map_tensors(given, lambda x: x.to(model.device))}


@dataclass(frozen=True)
class Memory:
    """Memory of training on one device in bytes, by part.

    ema: the averaged weights. activations: what the forward pass of one micro-batch saves for the backward pass.
    recomputed: activations that checkpointing computes again, one block at a time. working: temporary tensors.
    """

    weights: float
    gradients: float
    optimizer: float
    ema: float
    activations: float
    recomputed: float
    working: float

    @property
    def persistent(self) -> float:
        """Bytes that are allocated throughout training."""
        return self.weights + self.optimizer + self.ema

    @property
    def peak(self) -> float:
        """Largest use of memory: when the backward pass begins, or when it ends and all gradients exist."""
        return self.persistent + max(self.activations, self.gradients) + self.recomputed + self.working


def training_memory(
    arguments: dict[str, Any],
    latent: Shape,
    micro_batch: int,
    *,
    optimizer: str,
    bf16: bool,
    checkpointing: bool,
    fused: bool,
    copies: int = 0,
) -> Memory:
    """Estimate the memory of a training step of `micro_batch` clips, from a forward pass over fake tensors.

    fused: attention does not save its matrix (GPUs; CPUs in float32). copies: of the weights, besides their average. Weights, gradients and EMA are float32.
    """
    forward_cost(arguments, latent)  # fills the caches of position tables with real ones
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = STDiT(**arguments)
        if fused:
            for block in model.blocks:
                block.attn.processor._attention_backend = "native"
        activations, recomputed = _saved_bytes(model, latent, micro_batch, bf16), 0.0
        if checkpointing:
            model.enable_gradient_checkpointing()
            whole, activations = activations, _saved_bytes(model, latent, micro_batch, bf16)
            recomputed = (whole - activations) / len(model.blocks)
        size = 4.0 * sum(p.numel() for p in model.parameters())
        matrices = 4.0 * sum(p.numel() for p in muon_parameters(model).values())
    moments = 2 * size - (matrices if optimizer == "muon" else 0)
    tokens = forward_cost(arguments, latent).tokens
    widest = (
        micro_batch * tokens * arguments["hidden_size"] * max(4.0, arguments.get("mlp_ratio", 4.0)) * (2 if bf16 else 4)
    )
    return Memory(
        weights=size,
        gradients=size,
        optimizer=moments,
        ema=size * (1 + copies),
        activations=activations,
        recomputed=recomputed,
        working=2 * widest,
    )


def _inputs(model: STDiT, latent: Shape, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.zeros(batch, dtype=torch.long)
    return torch.empty(batch, model.in_channels, *latent), torch.empty(batch), labels


def _saved_bytes(model: STDiT, latent: Shape, batch: int, bf16: bool) -> float:
    """Bytes that the forward pass saves for the backward pass, without parameters; each storage counts once."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def record(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage
        return x

    with saved_tensors_hooks(record, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model(*_inputs(model, latent, batch), **_example_conditions(model, batch)).float().square().mean()
    return float(sum(storage.nbytes() for storage in storages.values()))

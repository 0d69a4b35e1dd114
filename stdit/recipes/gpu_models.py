"""What the checks of `stdit gpu-check` share: a small model, its inputs, training steps of it, and how outputs are compared."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from stdit.diffusion.config import DEFAULT_MASK_PROBS
from stdit.diffusion.objective import ObjectiveConfig, build_objective
from stdit.model.config import size_arguments
from stdit.model.stdit import STDiT
from stdit.precision import Precision, autocast
from stdit.recipes.machine import Machine
from stdit.training.step import LatentBatch, diffusion_losses


def small_model(machine: Machine, **changes: Any) -> STDiT:
    """A small model with random weights everywhere, on the CPU; changes: arguments of `STDiT`."""
    torch.manual_seed(0)
    arguments = {"depth": machine.pick(4, 2), "hidden_size": machine.pick(256, 64), "num_heads": 4, "in_channels": 16,
                 "num_classes": 12, "learn_sigma": False, "axes": ["spatial", "temporal"], "qk_norm": True, **changes}  # fmt: skip
    model = STDiT(**arguments)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.02 * torch.randn_like(value))
    return model


def published_size(machine: Machine, **changes: Any) -> dict[str, Any]:
    """The arguments of an XL/2, or of a tiny model where the machine asks for one."""
    tiny = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": (1, 2, 2)}
    return {**machine.pick(size_arguments("XL/2"), tiny), "in_channels": 4, "num_classes": 1000, **changes}


def inputs(batch: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (B, 16, 5, 16, 16), timesteps (B, 5) and labels (B,) for `small_model`, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((batch, 16, 5, 16, 16), generator=generator)
    return x, torch.rand(batch, 5, generator=generator) * 1000, torch.arange(batch)


def relative(a: Tensor, b: Tensor) -> float:
    """The relative error of `a` against `b`, in the L2 norm."""
    return ((a.float().cpu() - b.float().cpu()).norm() / b.float().cpu().norm()).item()


def train_steps(
    machine: Machine, model: Any, optimizers: Sequence[Any], *, steps: range, precision: Precision = "bf16"
) -> list[float]:
    """Train with mixed mask strategies and clipped gradients; returns the losses of the steps."""
    probs = dict.fromkeys(DEFAULT_MASK_PROBS, 1.0)
    objective, losses = build_objective(ObjectiveConfig(mask_strategy="mixed", mask_probs=probs)), []
    x, _, y = (part.to(machine.device) for part in inputs(8))
    clips = LatentBatch(x, lambda starts: x.transpose(1, 2)[starts])
    for step in steps:
        keys = [(0, step, slot) for slot in range(len(x))]
        with autocast(precision, machine.device):
            result = diffusion_losses(
                model, objective, [clips], {"label": y[:, None]}, keys=keys, patch=model.patch_size
            )
        result.clips.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        model.zero_grad()
        losses.append(result.clips.mean().item())
    return losses


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """A context manager in which operations that have a deterministic form use it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)

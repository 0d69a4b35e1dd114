"""Optimizers and the learning-rate schedule, for diffusion models and the VAE."""

import math
from collections.abc import Callable

import torch
from torch import nn

from stdit.nn.muon import muon_parameters
from stdit.training.muon import Muon


def build_optimizers(model: nn.Module, name: str, lr: float, weight_decay: float = 0.0) -> list[torch.optim.Optimizer]:
    """Build AdamW; or Muon for the hidden matrices and AdamW for embeddings, modulation, head, tables and vectors.

    Muon, with the root mean square of its updates equal to AdamW's, learned faster in short runs (dev/LOG.md).
    """
    learnt = [p for p in model.parameters() if p.requires_grad]
    if name == "adamw":
        return [torch.optim.AdamW(learnt, lr=lr, weight_decay=weight_decay)]
    hidden = muon_parameters(model).values()
    rest = [p for p in learnt if all(p is not h for h in hidden)]
    muon = Muon(hidden, lr=lr, weight_decay=weight_decay)
    return [muon, torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay)] if rest else [muon]


def _constant(part: float) -> float:
    return 1.0


def _linear(part: float) -> float:
    return 1 - part


def _cosine(part: float) -> float:
    return (1 + math.cos(math.pi * part)) / 2


# What is left of the learning rate after a part, 0 to 1, of `decay_steps`.
SCHEDULES: dict[str, Callable[[float], float]] = {"linear": _linear, "cosine": _cosine, "constant": _constant}


def learning_rate(
    step: int, lr: float, warmup_steps: int, decay_steps: int | None, *, schedule: str = "linear"
) -> float:
    """The learning rate of a step: a linear warm-up times a row of `SCHEDULES`, which reaches its end at `decay_steps`.

    Without `decay_steps` the rate is constant after the warm-up.
    """
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return lr * warm * (SCHEDULES[schedule](min(1.0, step / decay_steps)) if decay_steps else 1.0)


def set_learning_rate(optimizers: list, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = value

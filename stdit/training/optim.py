"""Optimizers and the learning-rate schedule, for diffusion models and the VAE."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stdit.nn.muon import muon_parameters
from stdit.training.muon import Muon
from stdit.training.parallel import is_offloaded


def build_optimizers(model: nn.Module, name: str, lr: float, weight_decay: float = 0.0) -> list[torch.optim.Optimizer]:
    """Build AdamW; or Muon for the hidden matrices and AdamW for embeddings, modulation, head, tables and vectors.

    Muon, with the root mean square of its updates equal to AdamW's, learned faster in short runs (dev/LOG.md). "adamw8bit" is
    AdamW with moments of 8 bits; ValueError if bitsandbytes is not installed.
    """
    learnt = [p for p in model.parameters() if p.requires_grad]
    if name == "adamw8bit":
        return [build_adamw8bit(learnt, lr, weight_decay)]
    # On the host a step of AdamW is as slow as its passes over memory, of which the fused one makes the fewest.
    fused = True if is_offloaded(model) or all(p.device.type == "cpu" and p.is_contiguous() for p in learnt) else None
    if name == "adamw":
        return [torch.optim.AdamW(learnt, lr=lr, weight_decay=weight_decay, fused=fused)]
    hidden = muon_parameters(model).values()
    rest = [p for p in learnt if all(p is not h for h in hidden)]
    muon = Muon(hidden, lr=lr, weight_decay=weight_decay)
    return [muon, torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay, fused=fused)] if rest else [muon]


def check_optimizer(name: str) -> None:
    """Raise ValueError if the library of an optimizer is not installed."""
    if name == "adamw8bit":
        _bitsandbytes()


def build_adamw8bit(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW of bitsandbytes, whose moments are codes of 8 bits with a scale for every 256 numbers.

    Those of tensors of fewer than 4096 numbers stay in float32.
    """
    library = _bitsandbytes()

    class AdamW8bit(library.optim.AdamW8bit):  # type: ignore[name-defined]
        """Its own `state_dict` hides codes and scales in a dictionary from FSDP1; here they are tensors like all others."""

        def state_dict(self) -> dict:
            """The state as torch's optimizers give it."""
            return torch.optim.Optimizer.state_dict(self)

    return AdamW8bit(parameters, lr=lr, weight_decay=weight_decay)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            f"train.optimizer=adamw8bit needs bitsandbytes ({error}): pip install 'stdit[bitsandbytes]', or set "
            "train.optimizer=adamw."
        ) from error
    return bitsandbytes


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

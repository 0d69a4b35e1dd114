"""Where sampling starts, and how noisy each latent frame is after every step."""

from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """x: (B, C, T, h, w) noise and known latents; levels: (steps + 1, T), each column falls to 0.

    A known frame is at level 0 in every row: no step moves it.
    """

    x: Tensor
    levels: Tensor


def generate(noise: Tensor, schedule: Tensor) -> Plan:
    """Every frame from noise (B, C, T, h, w), all together along `schedule` (steps + 1,)."""
    return Plan(noise, together(schedule, noise.shape[2]))


def together(schedule: Tensor, frames: int) -> Tensor:
    """(steps + 1,) -> (steps + 1, T): the same level for all frames."""
    return schedule[:, None].expand(-1, frames)


def check(plan: Plan) -> None:
    """Levels must lie in [0, 1], never rise, and end at 0."""
    levels = plan.levels
    assert levels.ndim == 2 and levels.shape[1] == plan.x.shape[2], "one column of levels a latent frame"
    assert bool((levels.diff(dim=0) <= 0).all()) and bool((levels[-1] == 0).all()) and levels.max() <= 1
    assert torch.isfinite(plan.x).all()

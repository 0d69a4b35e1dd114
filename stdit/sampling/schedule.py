"""Where sampling starts, and how noisy each latent frame is after every step."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stdit.variants import pick


class Schedule(NamedTuple):
    """x: (B, C, T, h, w) noise and known latents; levels: (steps + 1, T) or by patches (steps + 1, T, rows, columns).

    Every level falls to 0. What is known is at 0 in every row: no step moves it.
    """

    x: Tensor
    levels: Tensor


# How the frames to be made take turns: from each frame's turn (0, 1, ...), the steps of a schedule and `every`, the
# number of rows by which the frame begins late.
ARRANGEMENTS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "together": lambda turn, steps, every: torch.zeros_like(turn),
    "autoregressive": lambda turn, steps, every: turn // every * steps,
    "pyramid": lambda turn, steps, every: turn * every,
}


def make_schedule(schedule: Tensor, made: Tensor, arrangement: str = "together", every: int = 1) -> Tensor:
    """A schedule (steps + 1,) for what is to be made, (T,) or (T, rows, columns) bool -> the levels of a plan.

    `every`: frames of a chunk where frames are made chunk by chunk (autoregressive), steps between the starts of
    neighbours (pyramid; Ruhe et al., "Rolling Diffusion"; Chen et al., "Diffusion Forcing", section 3.3).
    """
    delays_of = pick(ARRANGEMENTS, arrangement, "arrangement")
    if every < 1:
        raise ValueError(f"every={every} is no number of frames or steps; use 1 or more.")
    turn = (made.flatten(1).any(1) if made.ndim > 1 else made).cumsum(0) - 1
    return hold(delayed(schedule, delays_of(turn.clamp(min=0), len(schedule) - 1, every)), made)


def delayed(schedule: Tensor, delays: Tensor) -> Tensor:
    """(steps + 1,) and a delay for each frame (T,) -> (steps + max(delays) + 1, T): frame t starts delays[t] rows late."""
    rows = torch.arange(len(schedule) + int(delays.max()))
    return schedule[(rows[:, None] - delays).clamp(0, len(schedule) - 1)]


def hold(levels: Tensor, made: Tensor) -> Tensor:
    """(steps + 1, T) levels, 0 wherever `made` (T,) or (T, rows, columns) is false."""
    return levels.view(*levels.shape, *[1] * (made.ndim - 1)) * made


def check(plan: Schedule) -> None:
    """Levels must lie in [0, 1], never rise, and end at 0."""
    levels = plan.levels
    assert levels.ndim in (2, 4) and levels.shape[1] == plan.x.shape[2], "one column of levels a latent frame"
    assert bool((levels.diff(dim=0) <= 0).all()) and bool((levels[-1] == 0).all()) and levels.max() <= 1
    assert torch.isfinite(plan.x).all()

"""The noise level of every latent frame at every step of sampling."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stdit.variants import pick


class Schedule(NamedTuple):
    """The start of sampling, and the noise level of every frame at every step.

    x: (B, C, T, h, w) noise and known latents. levels: (steps + 1, T), or per patch (steps + 1, T, rows, columns).
    Every level falls to 0. Known frames or patches are at level 0 in every row, so no step changes them.
    """

    x: Tensor
    levels: Tensor


# A function of (index (T,) of each frame among the generated ones, number of steps, `chunk_size`, `stagger`) that
# returns the delay (T,) of each frame in rows of the schedule.
Delays = Callable[[Tensor, int, int, int], Tensor]
ARRANGEMENTS: dict[str, Delays] = {
    "together": lambda index, steps, chunk_size, stagger: torch.zeros_like(index),
    "autoregressive": lambda index, steps, chunk_size, stagger: index // chunk_size * steps,
    "pyramid": lambda index, steps, chunk_size, stagger: index * stagger,
}


def make_schedule(
    levels: Tensor, mask: Tensor, arrangement: str = "together", *, chunk_size: int = 1, stagger: int = 1
) -> Tensor:
    """Make the levels of all frames from the levels (steps + 1,) of one frame.

    Returns (rows, T), or (rows, T, rows of patches, columns) for a mask of patches. mask: (T,) or (T, rows, columns)
    bool, true = to be generated. chunk_size: frames per chunk with `autoregressive`. stagger: steps between the starts
    of neighbouring frames with `pyramid` (Ruhe et al., "Rolling Diffusion"; Chen et al., "Diffusion Forcing", section
    3.3).
    """
    delays = pick(ARRANGEMENTS, arrangement, "arrangement")
    for name, value in (("chunk_size", chunk_size), ("stagger", stagger)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}.")
    index = (mask.flatten(1).any(1) if mask.ndim > 1 else mask).cumsum(0) - 1
    return mask_schedule(delayed(levels, delays(index.clamp(min=0), len(levels) - 1, chunk_size, stagger)), mask)


def delayed(levels: Tensor, delays: Tensor) -> Tensor:
    """Delay the levels (steps + 1,) of frame t by delays[t] rows -> (steps + max(delays) + 1, T)."""
    rows = torch.arange(len(levels) + int(delays.max()), device=levels.device)
    return levels[(rows[:, None] - delays).clamp(0, len(levels) - 1)]


def mask_schedule(levels: Tensor, mask: Tensor) -> Tensor:
    """Set levels (rows, T) to 0 where `mask`, (T,) or (T, rows, columns), is false."""
    return levels.view(*levels.shape, *[1] * (mask.ndim - 1)) * mask


def check(schedule: Schedule) -> None:
    """Assert that levels lie in [0, 1], never rise, and end at 0."""
    levels = schedule.levels
    assert levels.ndim in (2, 4) and levels.shape[1] == schedule.x.shape[2], "one column of levels per latent frame"
    assert bool((levels.diff(dim=0) <= 0).all()) and bool((levels[-1] == 0).all()) and levels.max() <= 1
    assert torch.isfinite(schedule.x).all()

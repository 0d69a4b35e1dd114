"""Where one step of a few-step sampler begins and ends, for the training of flow maps.

A segment is a row of a sampling plan: every generated frame has a level t, and the level r <= t where the step ends. It is
drawn as the plans of `sampling.schedule` make it: n steps a frame, each frame delayed against the one before by none of
them (together), by `stagger` (pyramid) or by all (autoregressive).
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

MOST_STEPS = 10  # of a frame; more steps are short enough to be taken along the velocity
Order = Literal["together", "delayed", "alone"]
# Clips that train the velocity, where the step has no length; clips that start below pure noise, as edits do.
VELOCITY_SHARE, PARTIAL_SHARE = 0.15, 0.15


def draw_segment(
    generator: torch.Generator, mask: Tensor, shift: Callable[[Tensor], Tensor], order: Order
) -> tuple[Tensor, Tensor]:
    """Draw one row of a plan: the levels t and r, (T,), of frames to generate; other frames have some value.

    mask: (T,) or (T, rows, columns), true = to be generated. shift: maps evenly spaced levels to those of sampling.
    order: all frames together, one delayed against the other, or each alone (each has a row of its own).
    """
    steps = round(math.exp(_uniform(generator) * math.log(MOST_STEPS)))
    index = (mask.flatten(1).any(1) if mask.ndim > 1 else mask).cumsum(0) - 1
    delays = torch.zeros_like(index)
    if order == "delayed":
        stagger = steps if _uniform(generator) < 0.5 else _below(generator, steps) + 1
        delays = index.clamp(min=0) * stagger
    count = len(index) if order == "alone" else 1
    row = torch.randint(steps + int(delays.max()), (count,), generator=generator)
    t, r = (shift(1 - ((at - delays) / steps).clamp(0, 1)) for at in (row, row + 1))
    scale = _uniform(generator) if _uniform(generator) < PARTIAL_SHARE else 1.0
    return (scale * t).expand(len(index)), (scale * r).expand(len(index))


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))


def _below(generator: torch.Generator, high: int) -> int:
    return int(torch.randint(high, (), generator=generator))

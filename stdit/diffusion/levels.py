"""Noise levels: how training draws them, and how size shifts them."""

import math
from typing import Literal

import torch
from torch import Tensor

Distribution = Literal["logit_normal", "uniform"]
Scheme = Literal["shared", "per_frame"]


def draw_levels(generator: torch.Generator, frames: int, distribution: Distribution, scheme: Scheme) -> Tensor:
    """Levels of one clip in (0, 1): (T,), all equal if `shared`, independent if `per_frame` (diffusion forcing)."""
    count = 1 if scheme == "shared" else frames
    if distribution == "logit_normal":  # Esser et al., "Scaling Rectified Flow Transformers", section 3.1
        drawn = torch.sigmoid(torch.randn(count, generator=generator))
    else:
        drawn = torch.rand(count, generator=generator)
    return drawn.expand(frames)


def shift_levels(levels: Tensor, shift: float) -> Tensor:
    """shift * t / (1 + (shift - 1) t): more noise for shift > 1; 0 and 1 stay (Esser et al., equation 23)."""
    return shift * levels / (1 + (shift - 1) * levels)


def size_shift(shift: float, tokens: int, base_tokens: int) -> float:
    """The shift for a clip of `tokens` latent positions when `shift` holds at `base_tokens` (0: everywhere)."""
    return shift * math.sqrt(tokens / base_tokens) if base_tokens else shift

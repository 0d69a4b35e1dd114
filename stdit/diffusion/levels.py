"""Noise levels of training clips, and how a clip's size shifts them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stdit.diffusion.config import Distribution

# flow: levels of the noisiest frame at which guidance leads away from a weaker model. Outlines are decided below, and
# those of a weaker model are no direction to lead away from.
GUIDE_INTERVAL = (0.5, 1.0)


class LevelSample(NamedTuple):
    """Noise levels and generation mask of one clip, (T,) or per patch (T, rows, columns).

    The loss counts where the mask is true. history: the level () of the earlier frames that each frame attends to
    (teacher forcing), or None. target: like levels, where a step of a flow map ends, or None.
    """

    levels: Tensor
    mask: Tensor
    history: Tensor | None = None
    target: Tensor | None = None


def sample_levels(generator: torch.Generator, count: int, distribution: Distribution) -> Tensor:
    """Draw (count,) independent levels in (0, 1)."""
    if distribution == "logit_normal":  # Esser et al., "Scaling Rectified Flow Transformers", section 3.1
        return torch.sigmoid(torch.randn(count, generator=generator))
    return torch.rand(count, generator=generator)


def shift_levels(levels: Tensor, shift: float) -> Tensor:
    """Shift levels to shift * t / (1 + (shift - 1) t): toward noise for shift > 1 (Esser et al., equation 23)."""
    return shift * levels / (1 + (shift - 1) * levels)


def size_shift(shift: float, tokens: int, base_tokens: int) -> float:
    """Shift of a clip of `tokens` latent positions if `shift` holds at `base_tokens` (0: at every size)."""
    return shift * math.sqrt(tokens / base_tokens) if base_tokens else shift

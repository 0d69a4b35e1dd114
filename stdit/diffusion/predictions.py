"""Converts a network's output to estimates of clean data and noise."""

from typing import NamedTuple

from torch import Tensor

from stdit.diffusion.paths import Path, like
from stdit.precision import wide


class Estimate(NamedTuple):
    """Estimates of clean data and noise, (B, C, T, h, w) each.

    variance: the network's interpolation between the smallest (-1) and the largest (1) log variance, or None.
    """

    clean: Tensor
    noise: Tensor
    variance: Tensor | None = None


def from_velocity(velocity: Tensor, x: Tensor, levels: Tensor) -> Estimate:
    """Estimate from a flow model's velocity = noise - clean, with x = (1 - t) clean + t noise."""
    t = like(levels, x)
    return Estimate(x - t * velocity, x + (1 - t) * velocity)


def from_epsilon(epsilon: Tensor, x: Tensor, levels: Tensor, path: Path) -> Estimate:
    """Estimate from the noise (epsilon) that a DDPM model predicts."""
    alpha, sigma = path.alpha_sigma(wide(like(levels, x)))
    return Estimate(((wide(x) - sigma * wide(epsilon)) / alpha).to(x.dtype), epsilon)

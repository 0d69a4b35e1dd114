"""What a network's output says about clean data and noise."""

from typing import NamedTuple

from torch import Tensor

from stdit.diffusion.paths import Path, like


class Estimate(NamedTuple):
    """Clean data and noise (B, C, T, h, w); `variance`: in [-1, 1], between the smallest and largest, or None."""

    clean: Tensor
    noise: Tensor
    variance: Tensor | None = None


def from_velocity(velocity: Tensor, x: Tensor, levels: Tensor) -> Estimate:
    """Flow: velocity = noise - clean, x = (1 - t) clean + t noise."""
    t = like(levels, x)
    return Estimate(x - t * velocity, x + (1 - t) * velocity)


def from_epsilon(epsilon: Tensor, x: Tensor, levels: Tensor, path: Path) -> Estimate:
    """DDPM: the network names the noise."""
    alpha, sigma = path.alpha_sigma(like(levels, x).double())
    return Estimate(((x.double() - sigma * epsilon.double()) / alpha).to(x.dtype), epsilon)

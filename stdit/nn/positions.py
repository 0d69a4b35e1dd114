"""Factorized sin-cos positions in space and time, computed for any grid."""

from functools import lru_cache

import torch
from torch import Tensor


def sincos(positions: Tensor, dim: int) -> Tensor:
    """(N,) positions -> (N, dim): sines, then cosines, of positions times 10000^(-2i/dim). Float64."""
    omega = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.double()[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)


@lru_cache(maxsize=64)
def space_positions(height: int, width: int, dim: int) -> Tensor:
    """(height*width, dim) float32, row by row. The first half of the channels holds x, the second y, as in DiT."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.cat([sincos(x.flatten(), dim // 2), sincos(y.flatten(), dim // 2)], dim=1).float()


@lru_cache(maxsize=64)
def frame_positions(frames: int, dim: int) -> Tensor:
    """(frames, dim) float32: Latte's table, one at half its channels in frame 0."""
    return sincos(torch.arange(frames), dim).float()


@lru_cache(maxsize=64)
def time_positions(frames: int, dim: int) -> Tensor:
    """(frames, dim) float32, zero at frame 0: an image, or a still first frame, carries no trace of time."""
    table = sincos(torch.arange(frames), dim)
    return (table - table[:1]).float()

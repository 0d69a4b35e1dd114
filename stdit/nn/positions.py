"""Position encodings: factorized sin-cos tables in space and time, and rotary embeddings, for any grid."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def sincos(positions: Tensor, dim: int) -> Tensor:
    """(N,) positions -> (N, dim) on the CPU: sines, then cosines, of positions times 10000^(-2i/dim). Float64."""
    omega = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64, device="cpu") / (dim / 2))
    angles = positions.double()[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)


@lru_cache(maxsize=64)
def spatial_pos_embed(height: int, width: int, dim: int, scale: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """(height * width, dim) float32, row by row; the first half of the channels holds x, the second y, as in DiT.

    scale: (y, x) distance of neighbours; trained size over this size squeezes a grid into the range that was trained.
    """
    # The device is explicit: what is cached must not be of the device that happens to be the default (meta).
    rows, columns = (torch.arange(n, device="cpu") * s for n, s in zip((height, width), scale, strict=True))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.cat([sincos(x.flatten(), dim // 2), sincos(y.flatten(), dim // 2)], dim=1).float()


@lru_cache(maxsize=64)
def latte_pos_embed(frames: int, dim: int) -> Tensor:
    """(frames, dim) float32: Latte's temporal table, whose frame 0 is not zero."""
    return sincos(torch.arange(frames, device="cpu"), dim).float()


@lru_cache(maxsize=64)
def temporal_pos_embed(frames: int, dim: int, scale: float = 1.0) -> Tensor:
    """(frames, dim) float32, zero at frame 0: an image, or a still first frame, carries no trace of time."""
    table = sincos(torch.arange(frames, device="cpu") * scale, dim)
    return (table - table[:1]).float()


def rope_freqs(positions: np.ndarray, pairs: int, scale: tuple[float, ...] = (1.0, 1.0, 1.0)) -> Tensor:
    """Rotary factors (L, 1, pairs), complex64 of length 1, for whole positions (L, 1) or (L, 3).

    One axis (time) takes all channel pairs; of three (time, y, x), y and x take a third each and time the rest. Pair i of
    an axis with n pairs turns by position * scale * 10000^(-i/n) (Su et al., "RoFormer"). Position 0 leaves x as it is.
    """
    axes = positions.shape[1]
    counts = [pairs] if axes == 1 else [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    parts = []
    for axis, count in enumerate(counts):
        # A table of the few values that occur, then a lookup: a long clip has many tokens, but few rows and columns.
        low, high = int(positions[:, axis].min()), int(positions[:, axis].max())
        table = _rope_table(low, high, count, scale[axis])
        parts.append(table[torch.from_numpy(positions[:, axis] - low)])
    return torch.cat(parts, dim=1)[:, None]


@lru_cache(maxsize=256)
def _rope_table(low: int, high: int, pairs: int, scale: float) -> Tensor:
    """(high - low + 1, pairs) rotary factors of one axis."""
    values = torch.arange(low, high + 1, dtype=torch.float64, device="cpu") * scale
    angles = values[:, None] * 10000.0 ** -(torch.arange(pairs, dtype=torch.float64, device="cpu") / max(pairs, 1))
    angles = angles.float()
    return torch.polar(torch.ones_like(angles), angles)


def apply_rope(x: Tensor, freqs: Tensor) -> Tensor:
    """Turn the channel pairs of (N, L, H, D) by factors (L, 1, D/2): products then depend on distances alone."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * freqs).flatten(-2).to(x.dtype)

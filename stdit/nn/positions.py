"""Position encodings: factorized sin-cos tables in space and time, and rotary embeddings, for any grid."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def sincos(positions: Tensor, dim: int) -> Tensor:
    """Sin-cos table (N, dim), float64 on the CPU: sines, then cosines, of positions (N,) times 10000^(-2i/dim)."""
    omega = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64, device="cpu") / (dim / 2))
    angles = positions.double()[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)


@lru_cache(maxsize=64)
def spatial_pos_embed(height: int, width: int, dim: int, scale: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """DiT's sin-cos table (height * width, dim) in float32, row by row; half of the channels hold x, then half y.

    scale: distance of neighbours in y and x; the trained size over this size squeezes a grid into the trained range.
    """
    # The device is explicit because the table is cached: the default device may be "meta" at the first call.
    rows, columns = (torch.arange(n, device="cpu") * s for n, s in zip((height, width), scale, strict=True))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.cat([sincos(x.flatten(), dim // 2), sincos(y.flatten(), dim // 2)], dim=1).float()


@lru_cache(maxsize=64)
def latte_pos_embed(frames: int, dim: int) -> Tensor:
    """Latte's temporal table (frames, dim) in float32, which is not zero at frame 0."""
    return sincos(torch.arange(frames, device="cpu"), dim).float()


@lru_cache(maxsize=64)
def temporal_pos_embed(frames: int, dim: int, scale: float = 1.0) -> Tensor:
    """Temporal sin-cos table (frames, dim) in float32, zero at frame 0, so that it leaves an image unchanged."""
    table = sincos(torch.arange(frames, device="cpu") * scale, dim)
    return (table - table[:1]).float()


def rope_freqs(positions: np.ndarray, pairs: int, scale: tuple[float, ...] = (1.0, 1.0, 1.0)) -> Tensor:
    """Rotary factors (..., L, 1, pairs, 2), cosines and sines in float32, for integer positions (..., L, 1) or (..., L, 3).

    One axis (time) takes all channel pairs; of three (time, y, x), y and x take a third each and time the rest. Pair i of
    an axis with n pairs is rotated by position * scale * 10000^(-i/n) (Su et al., "RoFormer"). Position 0 does nothing.
    """
    axes = positions.shape[-1]
    counts = [pairs] if axes == 1 else [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    parts = []
    for axis, count in enumerate(counts):
        # A table of the values that occur, then a lookup: a long clip has many tokens, but few rows and columns.
        low, high = int(positions[..., axis].min()), int(positions[..., axis].max())
        table = _rope_table(low, high, count, scale[axis])
        parts.append(table[torch.from_numpy(positions[..., axis] - low)])
    return torch.view_as_real(torch.cat(parts, dim=-1).unsqueeze(-2))


@lru_cache(maxsize=256)
def _rope_table(low: int, high: int, pairs: int, scale: float) -> Tensor:
    """(high - low + 1, pairs) rotary factors of one axis."""
    values = torch.arange(low, high + 1, dtype=torch.float64, device="cpu") * scale
    angles = values[:, None] * 10000.0 ** -(torch.arange(pairs, dtype=torch.float64, device="cpu") / max(pairs, 1))
    angles = angles.float()
    return torch.polar(torch.ones_like(angles), angles)


def apply_rope(x: Tensor, freqs: Tensor) -> Tensor:
    """Rotate channel pairs of (N, L, H, D) by factors (N|1, L, 1, D/2, 2): dot products then depend only on distances."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # no code is made for complex numbers
        (real, imaginary), (cos, sin) = pairs.unbind(-1), freqs.unbind(-1)
        rotated = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.view_as_complex(freqs))
    return rotated.flatten(-2).to(x.dtype)

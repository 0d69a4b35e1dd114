"""Factorized sin-cos positions in space and time, computed for any grid."""

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
    """(height*width, dim) float32, row by row. The first half of the channels holds x, the second y, as in DiT.

    scale: (y, x) distance of neighbours; trained size over this size squeezes a grid into the range that was trained.
    """
    # Said outright: what is kept for later must not be of the device that happens to be the default (meta).
    rows, columns = (torch.arange(n, device="cpu") * s for n, s in zip((height, width), scale, strict=True))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.cat([sincos(x.flatten(), dim // 2), sincos(y.flatten(), dim // 2)], dim=1).float()


@lru_cache(maxsize=64)
def latte_pos_embed(frames: int, dim: int) -> Tensor:
    """(frames, dim) float32: Latte's table, one at half its channels in frame 0."""
    return sincos(torch.arange(frames, device="cpu"), dim).float()


@lru_cache(maxsize=64)
def temporal_pos_embed(frames: int, dim: int, scale: float = 1.0) -> Tensor:
    """(frames, dim) float32, zero at frame 0: an image, or a still first frame, carries no trace of time."""
    table = sincos(torch.arange(frames, device="cpu") * scale, dim)
    return (table - table[:1]).float()


def rotate(x: Tensor, places: np.ndarray) -> Tensor:
    """Turn the channel pairs of (N, L, H, D) by places (L, axes): products then depend on distances alone (RoFormer).

    One axis has all pairs, of three (time, y, x) y and x a third each; pair i of an axis with n turns by its place times
    10000^(-i/n). Place 0 leaves x as it is.
    """
    turns = _turns(places.astype(np.float64).tobytes(), places.shape[1], x.shape[-1] // 2).to(x.device)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


@lru_cache(maxsize=64)
def _turns(places: bytes, axes: int, pairs: int) -> Tensor:
    """(L, 1, pairs) complex numbers of length 1."""
    each = torch.from_numpy(np.frombuffer(places).reshape(-1, axes).copy())
    shares = [pairs] if axes == 1 else [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    angles = [
        each[:, axis, None] * 10000.0 ** -(torch.arange(n, dtype=torch.float64) / n) for axis, n in enumerate(shares)
    ]
    angle = torch.cat(angles, dim=1)[:, None].float()
    return torch.polar(torch.ones_like(angle), angle)

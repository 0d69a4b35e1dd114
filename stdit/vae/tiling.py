"""Tiled decoding: the decoder's memory does not grow with the frame size."""

from collections.abc import Iterator

import torch
from torch import Tensor

from stdit.vae.base import VideoVAE


def spans(size: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Intervals [start, end) of length `tile` that cover [0, size); neighbours overlap by at least `overlap`."""
    if size <= tile:
        return [(0, size)]
    count = -(-(size - overlap) // (tile - overlap))
    starts = [round(i * (size - tile) / (count - 1)) for i in range(count)]
    return [(start, start + tile) for start in starts]


def ramp(begin: int, end: int, size: int, overlap: int) -> Tensor:
    """Blending weights (end - begin,) of a tile: a linear ramp over the overlap with each neighbour, 1 elsewhere."""
    weight = torch.ones(end - begin)
    rise = (torch.arange(overlap) + 0.5) / overlap
    if begin > 0:
        weight[:overlap] = rise
    if end < size:
        weight[-overlap:] = torch.minimum(weight[-overlap:], rise.flip(0))
    return weight


def decode_tiled(vae: VideoVAE, latents: Tensor, tile: int = 32, overlap: int = 8) -> Tensor:
    """Decode latents (B, C, T, h, w) in tiles of `tile` x `tile` latents -> (B, 3, F, H, W) on the CPU.

    Neighbouring tiles overlap by `overlap` latents and are blended there. If the overlap is twice the decoder's
    receptive radius, the result equals decoding without tiles. Raises ValueError unless tile > 2 * overlap.
    """
    if overlap < 0 or tile <= 2 * overlap:
        raise ValueError(
            f"tile must be > 2 * overlap and overlap >= 0, got tile={tile} and overlap={overlap}; "
            f"use tile={2 * max(overlap, 0) + 8} with overlap={max(overlap, 0)}."
        )
    batch, _, frames, height, width = latents.shape
    sy, sx = vae.stride[1:]
    blended = torch.zeros(batch, 3, vae.pixel_frames(frames), height * sy, width * sx)
    weights = torch.zeros(1, 1, 1, height * sy, width * sx)
    for (top, bottom), (left, right) in _tiles(height, width, tile, overlap):
        pixels = vae.decode(latents[..., top:bottom, left:right]).float().cpu()
        down = ramp(top * sy, bottom * sy, height * sy, overlap * sy)
        across = ramp(left * sx, right * sx, width * sx, overlap * sx)
        weight = down[:, None] * across
        blended[..., top * sy : bottom * sy, left * sx : right * sx] += weight * pixels
        weights[..., top * sy : bottom * sy, left * sx : right * sx] += weight
    return blended / weights


def overlap_of(tile: int) -> int:
    """The default overlap of tiles of `tile` latents: a quarter, at least 1; ValueError for a tile without room for it."""
    if tile < 3:
        raise ValueError(f"tile must be >= 3 latents, got {tile}; use tile=16 or more.")
    return max(1, tile // 4)


def decode(vae: VideoVAE, latents: Tensor, tile: int | None = None) -> Tensor:
    """Decode latents (B, C, T, h, w) to pixels (B, 3, F, H, W) in [-1, 1] on the CPU.

    tile: decode in tiles of this many latents per side, which overlap by a quarter. Seams are visible if the overlap
    is less than the receptive field of the decoder.
    """
    # Eight clips at a time bound the memory of the decoder, which is larger than that of its output.
    parts = (part.to(vae.dtype) for part in latents.split(8))
    pixels = (vae.decode(part) if tile is None else decode_tiled(vae, part, tile, overlap_of(tile)) for part in parts)
    return torch.cat([part.clamp(-1, 1).float().cpu() for part in pixels])


def _tiles(height: int, width: int, tile: int, overlap: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """((top, bottom), (left, right)) of every tile."""
    for rows in spans(height, tile, overlap):
        for columns in spans(width, tile, overlap):
            yield rows, columns

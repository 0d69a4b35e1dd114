"""Large frames in tiles: decoding with memory that does not grow with the frame."""

from collections.abc import Iterator

import torch
from torch import Tensor

from stdit.vae.base import VideoVAE


def spans(size: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Stretches of `tile` that cover 0..size, neighbours sharing at least `overlap`, the last flush with the end."""
    if size <= tile:
        return [(0, size)]
    count = -(-(size - overlap) // (tile - overlap))
    starts = [round(i * (size - tile) / (count - 1)) for i in range(count)]
    return [(start, start + tile) for start in starts]


def ramp(begin: int, end: int, size: int, overlap: int) -> Tensor:
    """(end - begin,) weights of a tile: rising from the border that a neighbour shares, 1 elsewhere."""
    weight = torch.ones(end - begin)
    rise = (torch.arange(overlap) + 0.5) / overlap
    if begin > 0:
        weight[:overlap] = rise
    if end < size:
        weight[-overlap:] = torch.minimum(weight[-overlap:], rise.flip(0))
    return weight


def decode_tiled(vae: VideoVAE, latents: Tensor, tile: int = 32, overlap: int = 8) -> Tensor:
    """Decode (B, C, T, h, w) in tiles of `tile` x `tile` latents -> (B, 3, F, H, W) on the CPU.

    Neighbours share `overlap` latents and are blended there; with an overlap of twice the decoder's reach the picture
    is that of decoding at once. ValueError for an overlap that leaves no tile.
    """
    if overlap < 0 or tile <= 2 * overlap:
        raise ValueError(
            f"tile={tile} with overlap={overlap}: a tile is larger than two overlaps; use tile={2 * overlap + 8}."
        )
    batch, _, frames, height, width = latents.shape
    sy, sx = vae.stride[1:]
    whole = torch.zeros(batch, 3, vae.pixel_frames(frames), height * sy, width * sx)
    total = torch.zeros(1, 1, 1, height * sy, width * sx)
    for (top, bottom), (left, right) in _tiles(height, width, tile, overlap):
        pixels = vae.decode(latents[..., top:bottom, left:right]).float().cpu()
        down = ramp(top * sy, bottom * sy, height * sy, overlap * sy)
        across = ramp(left * sx, right * sx, width * sx, overlap * sx)
        weight = down[:, None] * across
        whole[..., top * sy : bottom * sy, left * sx : right * sx] += weight * pixels
        total[..., top * sy : bottom * sy, left * sx : right * sx] += weight
    return whole / total


def overlap_of(tile: int) -> int:
    """Latents that neighbours share: a quarter of a tile. ValueError for a tile too small to share any."""
    if tile < 3:
        raise ValueError(f"tile={tile} latents leave no room beside their overlap; use tile=16 or more.")
    return max(1, tile // 4)


def decode(vae: VideoVAE, latents: Tensor, tile: int | None = None) -> Tensor:
    """Latents to pixels in [-1, 1] on the CPU, a few clips at a time; `tile`: in tiles of so many latents.

    Neighbours share a quarter; the smaller that is against the decoder's reach, the more is seen of their seams.
    """
    parts = (part.to(vae.dtype) for part in latents.split(8))
    pixels = (vae.decode(part) if tile is None else decode_tiled(vae, part, tile, overlap_of(tile)) for part in parts)
    return torch.cat([part.clamp(-1, 1).float().cpu() for part in pixels])


def _tiles(height: int, width: int, tile: int, overlap: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    for rows in spans(height, tile, overlap):
        for columns in spans(width, tile, overlap):
            yield rows, columns

"""Conditioning on known pixels: masks of latents, encoding, the initial state, guidance by pixels, and pasting back."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from stdit.diffusion.paths import Path, like
from stdit.diffusion.predictions import Estimate
from stdit.sampling.canvas import Canvas
from stdit.sampling.schedule import Schedule
from stdit.sampling.solvers import Predict
from stdit.vae import VideoVAE


def latent_masks(mask: Tensor, vae: VideoVAE, patch: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Reduce a pixel mask (F, 1, 1) or (F, H, W) to two masks of latents, each (T, 1, 1) or (T, rows, columns) bool.

    latent_mask: latent frames, or patches of them, that are to be generated because any of their pixels is.
    boundary_mask: those of them of which some pixels are known.
    """
    strides = [s * p for s, p in zip(vae.stride, patch, strict=True)]
    first = mask[:1].expand(vae.stride[0] - 1, -1, -1)  # the first frame fills a group alone
    grouped = torch.cat([first, mask]).unflatten(0, (-1, strides[0]))
    if mask.shape[1] > 1:
        grouped = grouped.unflatten(2, (-1, strides[1])).unflatten(4, (-1, strides[2])).permute((0, 2, 4, 1, 3, 5))
        inner = grouped.flatten(3)
    else:
        inner = grouped.permute(0, 2, 3, 1)
    some, whole = inner.any(-1), inner.all(-1)
    return some.repeat_interleave(patch[0], 0), (some & ~whole).repeat_interleave(patch[0], 0)


def encode_known(pixels: Tensor, mask: Tensor, latent_mask: Tensor, vae: VideoVAE) -> Tensor:
    """Encode the known frames of a canvas to latents (B, C, T, h, w), zero in frames of which nothing is known.

    Each run of known frames is encoded alone, as in training; a run inside the clip follows a copy of its first frame.
    """
    frames, height, width = pixels.shape[2:]
    shape = (vae.latent_frames(frames), *vae.latent_size(height, width))
    latents = pixels.new_zeros(len(pixels), vae.channels, *shape)
    known = ~latent_mask.flatten(1).all(1)
    if mask.shape[1] > 1:
        pixels = _fill_holes(pixels, mask)
    begin = 0
    while begin < len(known):
        end = begin
        while end < len(known) and known[end]:
            end += 1
        if end > begin:
            run = torch.cat([vae.frames_of_latent(pixels, t) for t in range(begin, end)], dim=2).to(vae.dtype)
            latents[:, :, begin:end] = (vae.encode(run) if begin == 0 else vae.encode_segment(run)).to(latents.dtype)
        begin = max(end, begin + 1)
    return latents


def initial_schedule(
    known: Tensor, noise: Tensor, *, latent_mask: Tensor, levels: Tensor, path: Path, base: Tensor | None = None
) -> Schedule:
    """The start of sampling: known latents, and noise where `latent_mask` is true.

    base: latents that are noised to the first level, for sampling that starts below level 1.
    """
    start = noise
    if base is not None:
        alpha, sigma = path.alpha_sigma(like(levels[:1], noise))
        start = alpha * base + sigma * noise
    return Schedule(torch.where(like(latent_mask[None], noise), start, known), levels)


def clamp_to_bounds(decoded: Tensor, bounds: Tensor | None, tolerance: float = 0.4) -> Tensor:
    """Clamp generated pixels to the range of their known temporal neighbours if they exceed it by less than `tolerance`.

    Pixels are in [-1, 1]. A VAE blurs by far less than the tolerance; new content between frames differs by more.
    """
    if bounds is None:
        return decoded
    within = decoded.clamp(*bounds.to(decoded))
    return torch.where((decoded - within).abs() < tolerance, within, decoded)


def pixel_guided(
    predict: Predict,
    canvas: Canvas,
    boundary_mask: Tensor,
    *,
    vae: VideoVAE,
    path: Path,
    decode: Callable[[Tensor], Tensor],
) -> Predict:
    """Guide patches of which some pixels are known: decode the estimate, insert the known pixels, and encode again.

    canvas: on the device of x; boundary_mask: (T, 1, 1) or (T, rows, columns); decode: latents to pixels.
    """

    def guided(x: Tensor, levels: Tensor, target: Tensor | None = None) -> Estimate:
        estimate = predict(x, levels, target)
        decoded = clamp_to_bounds(decode(estimate.clean).to(canvas.pixels), canvas.bounds)
        pixels = torch.where(canvas.mask, decoded, canvas.pixels)
        encoded = vae.encode(pixels.to(vae.dtype)).to(x.dtype)
        alpha, sigma = path.alpha_sigma(like(levels, x))
        changed = like(boundary_mask[None], x) & (sigma > 0)
        noise = (x - alpha * encoded) / torch.where(sigma > 0, sigma, 1)
        return estimate._replace(
            clean=torch.where(changed, encoded, estimate.clean), noise=torch.where(changed, noise, estimate.noise)
        )

    return guided


def paste(decoded: Tensor, pixels: Tensor, mask: Tensor, blend: int = 0) -> Tensor:
    """Paste known pixels over decoded ones.

    blend: the distance, in frames and pixels, from generated pixels within which known ones fade into decoded ones.
    """
    masks = [mask[None, None].float()]
    window = tuple(3 if size > 1 else 1 for size in mask.shape)
    for _ in range(blend):
        masks.append(F.max_pool3d(masks[-1], window, 1, tuple(size // 2 for size in window)))
    weight = torch.stack(masks).mean(0)  # 1 where generated, falling by one step per frame and pixel away from it
    return torch.where(weight > 0, weight * decoded + (1 - weight) * pixels, pixels)


def _fill_holes(pixels: Tensor, mask: Tensor) -> Tensor:
    """Unknown pixels take the mean over the frames in which they are known, else over the known pixels of their frame."""
    known = (~mask)[None, None].float()
    over_time = (pixels * known).sum(2, keepdim=True) / known.sum(2, keepdim=True).clamp(min=1)
    over_frame = (pixels * known).sum((3, 4), keepdim=True) / known.sum((3, 4), keepdim=True).clamp(min=1)
    ever = known.sum(2, keepdim=True) > 0
    return torch.where(mask, torch.where(ever, over_time, over_frame), pixels)

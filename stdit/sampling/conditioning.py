"""Known pixels into latents, and back: which patches are known, how they are encoded, how they guide what is not."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from stdit.diffusion.paths import Path, like
from stdit.diffusion.predictions import Estimate
from stdit.sampling.schedule import Schedule
from stdit.sampling.solvers import Predict
from stdit.vae import VideoVAE


def latent_masks(made: Tensor, vae: VideoVAE, patch: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """A mask of pixels (F, 1, 1) or (F, H, W) -> what has to be made, and of that what is known in part.

    Both (T, 1, 1) or (T, rows, columns) bool. A latent frame, or a patch of it, is known when all its pixels are.
    """
    strides = [s * p for s, p in zip(vae.stride, patch, strict=True)]
    first = made[:1].expand(vae.stride[0] - 1, -1, -1)  # the first frame fills a group alone
    grouped = torch.cat([first, made]).unflatten(0, (-1, strides[0]))
    if made.shape[1] > 1:
        grouped = grouped.unflatten(2, (-1, strides[1])).unflatten(4, (-1, strides[2])).permute(0, 2, 4, 1, 3, 5)
        inner = grouped.flatten(3)
    else:
        inner = grouped.permute(0, 2, 3, 1)
    some, whole = inner.any(-1), inner.all(-1)
    return some.repeat_interleave(patch[0], 0), (some & ~whole).repeat_interleave(patch[0], 0)


def encode_known(pixels: Tensor, made: Tensor, todo: Tensor, vae: VideoVAE) -> Tensor:
    """Latents (B, C, T, h, w) of the known runs of a canvas, zero in frames of which nothing is known.

    Each run is encoded alone, behind its repeated first frame if it does not begin the clip: what training saw.
    """
    frames, height, width = pixels.shape[2:]
    shape = (vae.latent_frames(frames), *vae.latent_size(height, width))
    latents = pixels.new_zeros(len(pixels), vae.channels, *shape)
    known = ~todo.flatten(1).all(1)
    if made.shape[1] > 1:
        pixels = _without_holes(pixels, made)
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


def start(known: Tensor, base: Tensor | None, noise: Tensor, todo: Tensor, levels: Tensor, path: Path) -> Schedule:
    """A plan from known latents, noise, and `base`, latents to start from where the first level is below 1."""
    begun = noise
    if base is not None:
        alpha, sigma = path.alpha_sigma(like(levels[:1], noise))
        begun = alpha * base + sigma * noise
    return Schedule(torch.where(like(todo[None], noise), begun, known), levels)


def clamp_to_bounds(decoded: Tensor, between: Tensor | None, tolerance: float = 0.4) -> Tensor:
    """Made pixels nearer than `tolerance` to what their known neighbours in time span are taken to lie within it.

    What a VAE blurs is far smaller than that; what is really new in between is farther off and stays.
    """
    if between is None:
        return decoded
    within = decoded.clamp(*between.to(decoded))
    return torch.where((decoded - within).abs() < tolerance, within, decoded)


def pixel_guided(
    predict: Predict,
    canvas: Tensor,
    made: Tensor,
    partly: Tensor,
    between: Tensor | None,
    vae: VideoVAE,
    path: Path,
    decode: Callable[[Tensor], Tensor],
) -> Predict:
    """Help for patches known in part: decode the estimate, put the known pixels in, encode again.

    canvas: (B, 3, F, H, W); partly: (T, 1, 1) or (T, rows, columns); between: see `settled`; decode: latents to pixels.
    """

    def guided(x: Tensor, levels: Tensor) -> Estimate:
        estimate = predict(x, levels)
        decoded = clamp_to_bounds(decode(estimate.clean).to(canvas), between)
        seen = vae.encode(torch.where(made, decoded, canvas).to(vae.dtype)).to(x.dtype)
        alpha, sigma = path.alpha_sigma(like(levels, x))
        moves = like(partly[None], x) & (sigma > 0)
        noise = (x - alpha * seen) / torch.where(sigma > 0, sigma, 1)
        return estimate._replace(
            clean=torch.where(moves, seen, estimate.clean), noise=torch.where(moves, noise, estimate.noise)
        )

    return guided


def paste(decoded: Tensor, canvas: Tensor, made: Tensor, blend: int = 0) -> Tensor:
    """Known pixels as they came in, made ones as decoded; with `blend`, known ones fade over so many frames and pixels."""
    masks = [made[None, None].float()]
    window = tuple(3 if size > 1 else 1 for size in made.shape)
    for _ in range(blend):
        masks.append(F.max_pool3d(masks[-1], window, 1, tuple(size // 2 for size in window)))
    weight = torch.stack(masks).mean(0)  # 1 where made, falling by one step with each frame and pixel away from it
    return torch.where(weight > 0, weight * decoded + (1 - weight) * canvas, canvas)


def _without_holes(pixels: Tensor, made: Tensor) -> Tensor:
    """Unknown pixels take the mean of the frames in which they are known, else of their frame's known pixels."""
    seen = (~made)[None, None].float()
    over_time = (pixels * seen).sum(2, keepdim=True) / seen.sum(2, keepdim=True).clamp(min=1)
    over_frame = (pixels * seen).sum((3, 4), keepdim=True) / seen.sum((3, 4), keepdim=True).clamp(min=1)
    ever = seen.sum(2, keepdim=True) > 0
    return torch.where(made, torch.where(ever, over_time, over_frame), pixels)

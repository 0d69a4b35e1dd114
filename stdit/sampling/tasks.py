"""The canvases of Sora's video tasks: animate, extend, connect, loop, interpolate, inpaint, edit.

Clips and images are tensors (B, 3, F, H, W) in [-1, 1], or anything that `media.as_clips` converts to them.
"""

from typing import Any

import torch
from torch import Tensor

from stdit.ranges import real_number, whole_number
from stdit.sampling.canvas import Canvas
from stdit.sampling.groups import check_gap, fits, pad_to_groups
from stdit.sampling.media import as_clips, as_mask, check_clip
from stdit.vae import VideoVAE

__all__ = [
    "Canvas", "animate", "blank", "check_clip", "connect", "edit", "extend", "fits", "inpaint", "interpolate", "loop",
    "outpaint_canvas", "pad_to_groups",
]  # fmt: skip


def blank(count: int, frames: int, height: int, width: int) -> Canvas:
    """A canvas of which all pixels are to be generated."""
    return Canvas(torch.zeros((count, 3, frames, height, width)), torch.ones(frames, 1, 1, dtype=torch.bool))


def animate(image: Any, frames: int) -> Canvas:
    """A canvas of `frames` frames, the first of which is an image (B, 3, H, W) or (B, 3, 1, H, W)."""
    image = as_clips(image, "image", "image")
    if image.shape[2] != 1:
        raise ValueError(f"animate takes one image, got {image.shape[2]} frames; use extend for a clip.")
    frames = whole_number("num_frames", frames, 2, "; the first frame is the image")
    return _concatenate([image, frames - 1])


def extend(clip: Any, after: int, before: int, vae: VideoVAE) -> Canvas:
    """A canvas of `before` new frames, the clip, and `after` new frames."""
    clip = as_clips(clip, "clip")
    after, before = whole_number("after", after, None), whole_number("before", before, None)
    if after < 0 or before < 0:
        name, value = ("after", after) if after < 0 else ("before", before)
        raise ValueError(f"{name}={value} must be a number of new frames, 0 or more.")
    if after + before == 0:
        raise ValueError("after=0 and before=0 add no frames; give one of them 1 or more.")
    total = clip.shape[2] + after + before
    if before:
        check_gap(vae, total=total, new=before, name="before", begins_clip=True)
    if after:
        check_gap(vae, total=total, new=after, name="after")
    return _concatenate([before, clip, after])


def connect(first: Any, last: Any, frames: int, vae: VideoVAE) -> Canvas:
    """A canvas of two clips, or images (one frame each), with `frames` new frames between them."""
    first, last = as_clips(first, "first", "either"), as_clips(last, "last", "either")
    if first.shape[3:] != last.shape[3:] or len(first) != len(last):
        raise ValueError(
            f"clips to be connected must be equal in number and size: first is {_size(first)}, last is {_size(last)}; "
            "resize one of them."
        )
    frames = whole_number("frames", frames, remedy="; the gap between the clips needs new frames")
    check_gap(vae, total=first.shape[2] + last.shape[2] + frames, new=frames, name="frames")
    return _concatenate([first, frames, last])


def loop(clip: Any, frames: int, vae: VideoVAE) -> Canvas:
    """A canvas of a clip and `frames` new frames that lead from its last frame to its first.

    The first frames of the clip are repeated after the gap as the goal; they are not part of the output.
    """
    clip = as_clips(clip, "clip")
    length = clip.shape[2]
    frames = whole_number("frames", frames, remedy="; the gap from the clip's end to its beginning needs them")
    step = vae.stride[0]
    check_gap(vae, total=length + frames + min(length, step), new=frames, name="frames")
    goal = min(length, (1 - length - frames) % step + step)  # a whole group of the VAE, wherever the gap ends
    return _concatenate([clip, frames, clip[:, :, :goal]])._replace(output=slice(length + frames))


def interpolate(clip: Any, factor: int, vae: VideoVAE, strength: float = 0.4) -> Canvas:
    """A canvas of `factor` times the frame rate, with factor - 1 new frames between neighbours.

    New frames start as the linear blend of their neighbours at noise level `strength`, and their
    pixels are bounded by them.
    """
    clip = as_clips(clip, "clip")
    _check_strength(strength)
    frames, factor = clip.shape[2], whole_number("factor", factor, None)
    if factor < 2 or frames < 2:
        raise ValueError(
            f"interpolate takes factor >= 2 and a clip of 2 or more frames, got factor={factor}, {frames}."
        )
    total = (frames - 1) * factor + 1
    position = torch.arange(total) / factor
    left = position.floor().long().clamp(max=frames - 2)
    weight = (position - left).view((1, 1, -1, 1, 1)).to(clip)
    blended = (1 - weight) * clip[:, :, left] + weight * clip[:, :, left + 1]
    mask = torch.arange(total) % factor != 0
    blended[:, :, ~mask] = clip
    neighbours = clip[:, :, left], clip[:, :, left + 1]
    bounds = torch.stack([torch.minimum(*neighbours), torch.maximum(*neighbours)])
    return Canvas(blended, mask[:, None, None], strength, bounds=bounds)


def inpaint(clip: Any, mask: Any) -> Canvas:
    """A canvas of a clip, of which the pixels where `mask` is true are to be generated: holes, or an outer border.

    mask: bool (F, H, W), or (H, W) for all frames, or what `media.as_mask` converts to it.
    """
    clip, mask = as_clips(clip, "clip"), as_mask(mask)
    frames, height, width = clip.shape[2:]
    if mask.dtype != torch.bool or tuple(mask.shape) not in ((frames, height, width), (height, width)):
        raise ValueError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}; this clip takes torch.bool of shape "
            f"({frames}, {height}, {width}), or ({height}, {width}) for all frames, true where pixels are to be generated."
        )
    if not mask.any():
        raise ValueError(
            "mask is false everywhere, so nothing is to be generated; set it to true where pixels are to be generated."
        )
    mask = mask.expand(frames, height, width)
    per_frame = mask[:, :1, :1]  # a mask of whole frames needs no noise level per patch
    return Canvas(clip, per_frame if bool((mask == per_frame).all()) else mask)


def edit(clip: Any, strength: float) -> Canvas:
    """A canvas that starts from the clip itself at noise level `strength` (Meng et al., "SDEdit").

    Near 0 little changes; at 1 the clip is new.
    """
    clip = as_clips(clip, "clip")
    _check_strength(strength)
    return Canvas(clip, torch.full((clip.shape[2], 1, 1), strength > 0), strength)


def outpaint_canvas(clip: Any, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Place a clip in the middle of larger frames for outpainting -> pixels, mask (F, height, width) of the border."""
    clip = as_clips(clip, "clip")
    inner = clip.shape[3:]
    if height < inner[0] or width < inner[1] or (height, width) == tuple(inner):
        raise ValueError(
            f"{height} x {width} leaves no room around a clip of {inner[0]} x {inner[1]}; give a mask, or a larger height or width."
        )
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    pixels = clip.new_zeros(*clip.shape[:3], height, width)
    mask = torch.ones(clip.shape[2], height, width, dtype=torch.bool)
    pixels[..., top : top + inner[0], left : left + inner[1]] = clip
    mask[:, top : top + inner[0], left : left + inner[1]] = False
    return pixels, mask


def _check_strength(strength: float) -> None:
    if not 0 <= real_number("strength", strength) <= 1:
        raise ValueError(f"strength must be a noise level from 0 (no change) to 1 (a new clip), got {strength}.")


def _concatenate(parts: list[Tensor | int]) -> Canvas:
    """Clips and gaps (numbers of frames) in their order; pixels of a gap repeat the nearest known frame."""
    clips = [part for part in parts if isinstance(part, Tensor)]
    pixels, mask = [], []
    for i, part in enumerate(parts):
        if isinstance(part, Tensor):
            pixels.append(part)
        else:
            earlier = [p for p in parts[:i] if isinstance(p, Tensor)]
            nearest = earlier[-1][:, :, -1:] if earlier else clips[0][:, :, :1]
            pixels.append(nearest.expand((-1, -1, part, -1, -1)))
        mask.append(torch.full((pixels[-1].shape[2],), not isinstance(part, Tensor)))
    return Canvas(torch.cat(pixels, 2), torch.cat(mask)[:, None, None])


def _size(clip: Tensor) -> str:
    return f"{len(clip)} clip(s) of {clip.shape[3]} x {clip.shape[4]}"

"""Everything Sora does with video, as canvases: clips of which some pixels are known and the rest is to be made."""

from typing import NamedTuple

import torch
from torch import Tensor

from stdit.vae import VideoVAE


class Canvas(NamedTuple):
    """pixels: (B, 3, F, H, W) in [-1, 1]; made: (F, 1, 1) or (F, H, W) bool, true where they are to be made.

    strength: the level at which making starts; below 1 it starts from the pixels that are there.
    keep: how many of the frames are the answer (null: all). between: low and high (2, B, 3, F, H, W), what a made pixel
    lies between where its known neighbours in time say so (see `place.settled`).
    """

    pixels: Tensor
    made: Tensor
    strength: float = 1.0
    keep: int | None = None
    between: Tensor | None = None


def blank(count: int, frames: int, height: int, width: int) -> Canvas:
    """Nothing is known."""
    return Canvas(torch.zeros(count, 3, frames, height, width), torch.ones(frames, 1, 1, dtype=torch.bool))


def animate(image: Tensor, frames: int) -> Canvas:
    """An image (B, 3, H, W) or (B, 3, 1, H, W) as the first of `frames`."""
    image = image.unsqueeze(2) if image.ndim == 4 else image
    check_clip(image, "image")
    if image.shape[2] != 1:
        raise ValueError(f"animate got {image.shape[2]} frames where it takes one image; use extend for a clip.")
    if frames < 2:
        raise ValueError(f"num_frames={frames} leaves nothing to be made beside the image; use 2 or more.")
    return _pieces([image, frames - 1])


def extend(clip: Tensor, after: int, before: int, vae: VideoVAE) -> Canvas:
    """`before` new frames, the clip, `after` new frames."""
    check_clip(clip, "clip")
    if after < 0 or before < 0 or after + before == 0:
        raise ValueError(f"after={after} and before={before} add no frames; give one of them 1 or more, none below 0.")
    _check_total(vae, clip.shape[2], after + before, "before" if not after else "after", before if after else 0)
    return _pieces([before, clip, after])


def connect(first: Tensor, last: Tensor, frames: int, vae: VideoVAE) -> Canvas:
    """Two clips, or images (one frame each), with `frames` new frames between."""
    first, last = (x.unsqueeze(2) if x.ndim == 4 else x for x in (first, last))
    check_clip(first, "first")
    check_clip(last, "last")
    if first.shape[3:] != last.shape[3:] or len(first) != len(last):
        raise ValueError(
            f"first is {_size(first)}, last is {_size(last)}: clips to be connected are equally many and of one size; "
            "resize one of them."
        )
    if frames < 1:
        raise ValueError(f"frames={frames} leaves no gap between the clips; use 1 or more.")
    _check_total(vae, first.shape[2] + last.shape[2], frames, "frames", 0)
    return _pieces([first, frames, last])


def loop(clip: Tensor, frames: int, vae: VideoVAE) -> Canvas:
    """A clip and `frames` new frames that lead from its last frame to its first.

    Its first frames stand behind the gap as the goal and are not part of the answer.
    """
    check_clip(clip, "clip")
    length = clip.shape[2]
    goal = min(length, vae.stride[0])
    fits = [frames + d for d in (0, 1, -1, 2, -2, 3, -3, 4) if _fits(vae, length + frames + d + goal)]
    if frames < 1 or frames not in fits:
        nearest = " or ".join(map(str, sorted(n for n in fits if n > 0)[:2]))
        raise ValueError(
            f"frames={frames} does not fit a loop of {length} frames with VAE {vae.name!r}. Use {nearest}."
        )
    return _pieces([clip, frames, clip[:, :, :goal]])._replace(keep=length + frames)


def interpolate(clip: Tensor, factor: int, vae: VideoVAE, strength: float = 0.4) -> Canvas:
    """`factor` times the frame rate: factor - 1 new frames between neighbours, begun as their blend at level `strength`."""
    check_clip(clip, "clip")
    _check_strength(strength)
    frames = clip.shape[2]
    if factor < 2 or frames < 2:
        raise ValueError(f"factor={factor} for {frames} frame(s): use a factor of 2 or more, and 2 frames or more.")
    total = (frames - 1) * factor + 1
    if not _fits(vae, total):
        fits = [n for n in range(2, frames + 8 * vae.stride[0]) if _fits(vae, (n - 1) * factor + 1)]
        nearest = sorted(sorted(fits, key=lambda n: abs(n - frames))[:2])
        raise ValueError(
            f"{frames} frames at factor={factor} make {total}, which VAE {vae.name!r} does not hold; "
            f"give {' or '.join(map(str, nearest))} frames."
        )
    where = torch.arange(total) / factor
    left = where.floor().long().clamp(max=frames - 2)
    share = (where - left).view(1, 1, -1, 1, 1).to(clip)
    blended = (1 - share) * clip[:, :, left] + share * clip[:, :, left + 1]
    made = torch.arange(total) % factor != 0
    blended[:, :, ~made] = clip
    neighbours = clip[:, :, left], clip[:, :, left + 1]
    between = torch.stack([torch.minimum(*neighbours), torch.maximum(*neighbours)])
    return Canvas(blended, made[:, None, None], strength, between=between)


def inpaint(clip: Tensor, mask: Tensor) -> Canvas:
    """Make anew where `mask`, bool (F, H, W) or (H, W) for all frames, is true: holes, or new room around (outpainting)."""
    check_clip(clip, "clip")
    frames, height, width = clip.shape[2:]
    if mask.dtype != torch.bool or tuple(mask.shape) not in ((frames, height, width), (height, width)):
        raise ValueError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}; this clip takes torch.bool of shape "
            f"({frames}, {height}, {width}), or ({height}, {width}) for all frames, true where pixels are to be made."
        )
    if not mask.any():
        raise ValueError(
            "mask is false everywhere: there is nothing to be made; set it true where pixels shall be new."
        )
    return Canvas(clip, mask.expand(frames, height, width))


def edit(clip: Tensor, strength: float) -> Canvas:
    """Start from the clip itself at level `strength` (Meng et al., "SDEdit"): near 0 little changes, 1 is a new clip."""
    check_clip(clip, "clip")
    _check_strength(strength)
    return Canvas(clip, torch.full((clip.shape[2], 1, 1), strength > 0), strength)


def _check_strength(strength: float) -> None:
    if not 0 <= strength <= 1:
        raise ValueError(f"strength={strength} is no noise level; use 0 (nothing changes) to 1 (a new clip).")


def check_clip(clip: Tensor, name: str) -> None:
    """ValueError unless it is (B, 3, F, H, W) of floats in [-1, 1]."""
    if clip.ndim != 5 or clip.shape[1] != 3 or not clip.is_floating_point() or not clip.shape[2]:
        raise ValueError(
            f"{name} is {clip.dtype} of shape {tuple(clip.shape)}; pixels are (B, 3, F, H, W) floats in [-1, 1]."
        )
    low, high = float(clip.min()), float(clip.max())
    if not (low >= -1.001 and high <= 1.001):
        raise ValueError(f"{name} holds values from {low:.3g} to {high:.3g}; scale pixels to [-1, 1].")


def _pieces(parts: list[Tensor | int]) -> Canvas:
    """Clips and gaps (numbers of frames) in their order; a gap repeats the nearest known frame."""
    clips = [part for part in parts if isinstance(part, Tensor)]
    pixels, made = [], []
    for i, part in enumerate(parts):
        if isinstance(part, Tensor):
            pixels.append(part)
        else:
            earlier = [p for p in parts[:i] if isinstance(p, Tensor)]
            still = earlier[-1][:, :, -1:] if earlier else clips[0][:, :, :1]
            pixels.append(still.expand(-1, -1, part, -1, -1))
        made.append(torch.full((pixels[-1].shape[2],), not isinstance(part, Tensor)))
    return Canvas(torch.cat(pixels, 2), torch.cat(made)[:, None, None])


def _fits(vae: VideoVAE, frames: int) -> bool:
    try:
        vae.latent_frames(frames)
    except ValueError:
        return False
    return True


def _check_total(vae: VideoVAE, known: int, new: int, name: str, fixed: int) -> None:
    """ValueError naming the nearest numbers of new frames that fit."""
    if _fits(vae, known + new):
        return
    step = vae.frame_step or vae.stride[0]
    near = [n for n in range(max(1, new - step), new + step + 1) if _fits(vae, known + n) and n > fixed]
    choices = " or ".join(str(n - fixed) for n in near)
    raise ValueError(
        f"{name}={new - fixed} makes {known + new} frames in all, which VAE {vae.name!r} (1 + a multiple of {step}) "
        f"does not hold. Use {name}={choices}."
    )


def _size(clip: Tensor) -> str:
    return f"{len(clip)} clip(s) of {clip.shape[3]} x {clip.shape[4]}"


def surround(clip: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """A clip in the middle of a larger frame, and the mask (F, height, width) of the room around it (outpainting)."""
    check_clip(clip, "clip")
    have = clip.shape[3:]
    if height < have[0] or width < have[1] or (height, width) == tuple(have):
        raise ValueError(
            f"{height} x {width} leaves no room around a clip of {have[0]} x {have[1]}; give a mask, or a larger height or width."
        )
    top, left = (height - have[0]) // 2, (width - have[1]) // 2
    pixels = clip.new_zeros(*clip.shape[:3], height, width)
    mask = torch.ones(clip.shape[2], height, width, dtype=torch.bool)
    pixels[..., top : top + have[0], left : left + have[1]] = clip
    mask[:, top : top + have[0], left : left + have[1]] = False
    return pixels, mask

"""Everything Sora does with video, as canvases: clips of which some pixels are known and the rest is to be made."""

from typing import NamedTuple

import torch
from torch import Tensor

from stdit.vae import VideoVAE


class Canvas(NamedTuple):
    """pixels: (B, 3, F, H, W) in [-1, 1]; made: (F, 1, 1) or (F, H, W) bool, true where they are to be made.

    strength: the level at which making starts; below 1 it starts from the pixels that are there.
    answer: which of the frames are asked for. between: low and high (2, B, 3, F, H, W), what a made pixel
    lies between where its known neighbours in time say so (see `place.settled`).
    """

    pixels: Tensor
    made: Tensor
    strength: float = 1.0
    answer: slice = slice(None)
    between: Tensor | None = None

    def lengthened(self, frames: int) -> "Canvas":
        """With its last frame repeated until there are `frames`."""
        more = max(0, frames - self.pixels.shape[2])
        return self._replace(
            pixels=torch.cat([self.pixels, self.pixels[:, :, -1:].expand(-1, -1, more, -1, -1)], 2),
            made=torch.cat([self.made, self.made[-1:].expand(more, -1, -1)]),
            between=None
            if self.between is None
            else torch.cat([self.between, self.between[:, :, :, -1:].expand(-1, -1, -1, more, -1, -1)], 3),
        )


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
    if before:
        _check_gap(vae, clip.shape[2] + after + before, before, "before", 1)
    if after:
        _check_gap(vae, clip.shape[2] + after + before, after, "after", 0)
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
    _check_gap(vae, first.shape[2] + last.shape[2] + frames, frames, "frames", 0)
    return _pieces([first, frames, last])


def loop(clip: Tensor, frames: int, vae: VideoVAE) -> Canvas:
    """A clip and `frames` new frames that lead from its last frame to its first.

    Its first frames stand behind the gap as the goal and are not part of the answer.
    """
    check_clip(clip, "clip")
    length = clip.shape[2]
    if frames < 1:
        raise ValueError(f"frames={frames} leaves no gap between the clip's end and its beginning; use 1 or more.")
    step = vae.stride[0]
    _check_gap(vae, length + frames + min(length, step), frames, "frames", 0)
    goal = min(length, (1 - length - frames) % step + step)  # a whole group, wherever the gap ends
    return _pieces([clip, frames, clip[:, :, :goal]])._replace(answer=slice(length + frames))


def interpolate(clip: Tensor, factor: int, vae: VideoVAE, strength: float = 0.4) -> Canvas:
    """`factor` times the frame rate: factor - 1 new frames between neighbours, begun as their blend at level `strength`."""
    check_clip(clip, "clip")
    _check_strength(strength)
    frames = clip.shape[2]
    if factor < 2 or frames < 2:
        raise ValueError(f"factor={factor} for {frames} frame(s): use a factor of 2 or more, and 2 frames or more.")
    total = (frames - 1) * factor + 1
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
    mask = mask.expand(frames, height, width)
    whole = mask[:, :1, :1]  # where every frame is made or kept as a whole, it needs no level for every patch
    return Canvas(clip, whole if bool((mask == whole).all()) else mask)


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


def fits(vae: VideoVAE, frames: int) -> bool:
    """Whether a VAE holds so many frames."""
    try:
        vae.latent_frames(frames)
    except ValueError:
        return False
    return True


def pad_to_groups(canvas: Canvas, vae: VideoVAE) -> Canvas:
    """A canvas whose known frames around a gap, if they fill no group, stand still at their outer end until they do.

    The model sees known latents only: it would not see how things move before the gap, nor where the way must lead. A
    clip in front that has a whole group shows its motion as it is. Where nothing is known in front, nothing is changed.
    """
    made, stride, frames = canvas.made[:, 0, 0], vae.stride[0], len(canvas.made)
    if canvas.made.shape[1] > 1 or canvas.between is not None or made[0] or not made.any():
        return canvas
    first, last = int(made.nonzero()[0]), int(made.nonzero()[-1]) + 1
    ahead = (1 - first) % stride if first < stride + 1 and bool(made[first:last].all()) else 0
    end = 0
    if last < frames:  # of the first group that begins among the known ones behind
        end = last + ahead + (1 - last - ahead) % stride + stride
    if not ahead and end <= frames:
        return canvas
    end = max(end, frames + ahead)
    longer = canvas._replace(
        pixels=torch.cat([canvas.pixels[:, :, :1].expand(-1, -1, ahead, -1, -1), canvas.pixels], 2),
        made=torch.cat([canvas.made[:1].expand(ahead, -1, -1), canvas.made]),
        answer=slice(ahead, ahead + len(range(frames)[canvas.answer])),
    )
    return longer.lengthened(next(n for n in range(end, end + frames + stride) if fits(vae, n)))


def _check_gap(vae: VideoVAE, total: int, new: int, name: str, first: int) -> None:
    """New frames make whole groups of the VAE, or the whole clip does; else ValueError naming the nearest that do.

    first: 1 if the new frames begin the clip, since its first frame stands alone.
    """
    step = vae.stride[0]
    if fits(vae, total) or (not vae.temporal_granularity and new % step == first % step):
        return
    known = total - new
    near = [
        n
        for n in range(max(1, new - 2 * step), new + 2 * step + 1)
        if fits(vae, known + n) or (not vae.temporal_granularity and n % step == first % step)
    ]
    below, above = [n for n in near if n < new][-1:], [n for n in near if n > new][:1]
    raise ValueError(
        f"{name}={new} is not whole groups of VAE {vae.name!r} ({step} frames each{', and one first' if first else ''}), nor "
        f"are the {total} frames in all. Use {name}={' or '.join(map(str, below + above))}."
    )


def _size(clip: Tensor) -> str:
    return f"{len(clip)} clip(s) of {clip.shape[3]} x {clip.shape[4]}"


def outpaint_canvas(clip: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
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

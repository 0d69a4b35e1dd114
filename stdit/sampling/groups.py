"""Arithmetic of a VAE's groups: a first frame alone, then whole groups of `stride[0]` frames."""

import torch

from stdit.sampling.canvas import Canvas
from stdit.vae import VAEGeometry, VideoVAE


def fits(vae: VAEGeometry, frames: int) -> bool:
    """Whether a VAE can encode a clip of this many frames."""
    try:
        vae.latent_frames(frames)
    except ValueError:
        return False
    return True


def pad_to_groups(canvas: Canvas, vae: VideoVAE) -> Canvas:
    """Repeat the outermost known frame next to a gap until the known frames there fill a group of the VAE.

    The model sees known frames only as whole latents: without padding it would see neither the motion before the gap
    nor the goal after it. Known frames before the gap that fill a group need no padding. Where nothing is known before
    the gap, or a mask is spatial, the canvas stays as it is.
    """
    mask, stride, frames = canvas.mask[:, 0, 0], vae.stride[0], len(canvas.mask)
    if canvas.mask.shape[1] > 1 or canvas.bounds is not None or mask[0] or not mask.any():
        return canvas
    first, last = int(mask.nonzero()[0]), int(mask.nonzero()[-1]) + 1
    ahead = (1 - first) % stride if first < stride + 1 and bool(mask[first:last].all()) else 0
    end = 0
    if last < frames:  # where the first group ends that begins among the known frames after the gap
        end = last + ahead + (1 - last - ahead) % stride + stride
    if not ahead and end <= frames:
        return canvas
    end = max(end, frames + ahead)
    longer = canvas._replace(
        pixels=torch.cat([canvas.pixels[:, :, :1].expand((-1, -1, ahead, -1, -1)), canvas.pixels], 2),
        mask=torch.cat([canvas.mask[:1].expand(ahead, -1, -1), canvas.mask]),
        output=slice(ahead, ahead + len(canvas.output_frames)),
    )
    return longer.lengthened(next(n for n in range(end, end + frames + stride) if fits(vae, n)))


def latents_of_output(canvas: Canvas, vae: VideoVAE) -> slice:
    """The latent frames of the frames that are returned; ValueError unless these are whole groups from the first on."""
    frames = canvas.output_frames
    if frames.start != 0 or not fits(vae, len(frames)):
        raise ValueError(
            f"the {len(frames)} frames of the result are not whole groups of VAE {vae.name!r}, so they have no latents of their "
            "own; use output_type pil, np or pt."
        )
    return slice(vae.latent_frames(len(frames)))


def is_continuation(canvas: Canvas, vae: VideoVAE) -> bool:
    """Whether the known frames of a canvas, if any, come first in whole groups, and the rest starts from noise."""
    known = int((~canvas.mask[:, 0, 0]).sum())
    whole = known == 0 or (known - 1) % vae.stride[0] == 0
    return canvas.mask.shape[1] == 1 and whole and bool(canvas.mask[known:].all()) and canvas.strength == 1


def fitting_gaps(vae: VAEGeometry, *, total: int, new: int, begins_clip: bool = False) -> list[int]:
    """The numbers of new frames nearest to `new`, below and above, that fit; `new` alone if it fits.

    New frames fit if they, or the whole clip of `total` frames, are whole groups of the VAE. begins_clip: whether the new
    frames come first, where one frame is a group alone.
    """
    step, first = vae.stride[0], int(begins_clip)

    def fit(count: int) -> bool:
        return fits(vae, total - new + count) or (not vae.temporal_granularity and count % step == first % step)

    if fit(new):
        return [new]
    near = [n for n in range(max(1, new - 2 * step), new + 2 * step + 1) if fit(n)]
    return [n for n in near if n < new][-1:] + [n for n in near if n > new][:1]


def check_gap(vae: VideoVAE, *, total: int, new: int, name: str, begins_clip: bool = False) -> None:
    """Raise ValueError unless `fitting_gaps` has the new frames, called `name` in the message, which has the nearest ones."""
    near = fitting_gaps(vae, total=total, new=new, begins_clip=begins_clip)
    if near != [new]:
        step = vae.stride[0]
        raise ValueError(
            f"{name}={new} is not whole groups of VAE {vae.name!r} ({step} frames each{', and one first' if begins_clip else ''}), "
            f"nor are the {total} frames in all. Use {name}={' or '.join(map(str, near))}."
        )

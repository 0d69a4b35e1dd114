"""A user's own picture, clip or mask, at the size and frame rate a model works at; what was changed is said."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stdit.data.manifest import IMAGE_SUFFIXES
from stdit.data.transforms import cover_size, crop, resize
from stdit.data.video_io import VideoReader


class Input(NamedTuple):
    """pixels (1, 3, F, H, W) in [-1, 1]; note: what was changed to make them fit, "" if nothing; source: (H, W) of the file."""

    pixels: Tensor
    note: str
    source: tuple[int, int]


Size = tuple[int, int]
_MOST = 20_000  # a gap in the time stamps, or a slip in a rate, asks for more than any memory holds


def read_input(path: str | Path, size: Size | Callable[[Size], Size], fps: float, frames: int | None = None) -> Input:
    """A picture (one frame) or clip, scaled to cover `size` (H, W) and cropped, frames picked by time stamps at `fps`.

    size: or a function of the file's own. frames: only the first so many. ValueError (or VideoError) in one line if it
    cannot be read or is too short.
    """
    found, rate = _frames(Path(path), fps, frames)
    source = (found.shape[1], found.shape[2])
    size = size(source) if callable(size) else size
    covering = cover_size(source, size)
    scaled = "" if source == size else f"{source[0]} x {source[1]} -> {size[0]} x {size[1]}"
    if max(covering[0] - size[0], covering[1] - size[1]) > 1:
        scaled += f" (cropped from {covering[0]} x {covering[1]})"
    fitted = crop(resize(found, covering), size)
    pixels = torch.from_numpy(np.ascontiguousarray(fitted)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    return Input(pixels, ", ".join(note for note in (scaled, rate) if note), source)


def read_mask(
    path: str | Path, source: Size, clip: tuple[int, int, int], fps: float, frames: int | None = None
) -> Tensor:
    """A picture or clip, white where pixels are to be made -> (H, W) or (F, H, W) bool.

    source: (H, W) of the clip's file; clip: (F, H, W) as it is worked at. The mask is of either size, and a clip of a mask
    has as many frames at `fps` (frames: only the first so many count).
    """
    path, size = Path(path), clip[1:]
    still = path.suffix.lower() in IMAGE_SUFFIXES
    masks = _picture(path, "L")[None] if still else _frames(path, fps, frames)[0].mean(-1).astype(np.uint8)
    if masks.shape[1:] not in (source, size):
        raise ValueError(
            f"mask {path} is {masks.shape[1]} x {masks.shape[2]}, the clip is {source[0]} x {source[1]}; draw the mask on a "
            "picture of the clip's size."
        )
    if not still and len(masks) != clip[0]:
        raise ValueError(
            f"mask {path} has {len(masks)} frames at {fps:g} fps, the clip has {clip[0]}; give one for each, or a picture for "
            "all."
        )
    if masks.shape[1:] != size:
        covering = cover_size(masks.shape[1:], size)[::-1]
        masks = np.stack([np.asarray(Image.fromarray(m).resize(covering, Image.Resampling.NEAREST)) for m in masks])
        masks = crop(masks, size)
    made = torch.from_numpy(masks > 127)
    return made[0] if still else made


def _frames(path: Path, fps: float, frames: int | None) -> tuple[np.ndarray, str]:
    """(F, H, W, 3) uint8 of a picture or clip at a rate, and what was done to come to it."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        if frames is not None and frames > 1:
            raise ValueError(f"{path} is a picture, --frames {frames} are more than its one; leave --frames out.")
        return _picture(path, "RGB")[None], ""
    with VideoReader(path) as reader:
        count = max(1, int(np.floor(float(reader.timestamps[-1]) * fps + 1e-3)) + 1)
        own = abs(reader.fps / fps - 1) < 0.01  # its own rate: every frame
        count = len(reader) if own else count
        if frames is not None and frames > count:
            raise ValueError(f"{path} has {count} frames at {fps:g} fps, --frames {frames} are more; use fewer.")
        taken = count if frames is None else frames
        if taken > _MOST:
            raise ValueError(
                f"{path} has {count} frames at {fps:g} fps, more than the {_MOST} taken at a time; cut it, or give --frames."
            )
        note = "" if own else f"{len(reader)} frames at {reader.fps:.4g} fps -> {count} at {fps:g}"
        return reader.get_frames(list(range(taken)) if own else reader.indices_at(np.arange(taken) / fps)), note


def _picture(path: Path, mode: str) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert(mode))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{str(path)!r} is not an image that can be read ({error}); give another file.") from error

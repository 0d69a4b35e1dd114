"""Reading a user's image, clip or mask at the size and frame rate of a model, with a note of what was changed."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stdit import legacy
from stdit.data.manifest import IMAGE_SUFFIXES
from stdit.data.transforms import cover_size, crop, resize
from stdit.data.video_io import VideoReader
from stdit.pixels import to_float


class Input(NamedTuple):
    """A user's file, converted to the size and frame rate of a model.

    pixels: (1, 3, F, H, W) in [-1, 1]. note: what was changed to fit, "" if nothing. source: (H, W) of the file.
    """

    pixels: Tensor
    note: str
    source: tuple[int, int]


ImageSize = tuple[int, int]  # (H, W)
# A gap in the time stamps or a mistyped rate can ask for more frames than fit into memory.
MAX_FRAMES = 20_000


def read_input(
    path: str | Path, size: ImageSize | Callable[[ImageSize], ImageSize], fps: float, frames: int | None = None
) -> Input:
    """Read an image (one frame) or a clip, scaled to cover `size` (H, W) and center-cropped.

    size: (H, W), or a function that computes it from the file's (H, W). fps: frames are picked by their time stamps at
    this rate. frames: read only the first `frames`. Raises ValueError (or VideoError) with a message of one line if the
    file cannot be read or is too short.
    """
    original, rate_note = _read_frames(Path(path), fps, frames)
    source = (original.shape[1], original.shape[2])
    size = size(source) if callable(size) else size
    covering = cover_size(source, size)
    size_note = "" if source == size else f"{source[0]} x {source[1]} -> {size[0]} x {size[1]}"
    # A difference of one pixel is rounding, not a crop that a user would notice.
    if max(covering[0] - size[0], covering[1] - size[1]) > 1:
        size_note += f" (cropped from {covering[0]} x {covering[1]})"
    pixels = to_float(crop(resize(original, covering), size))[None]
    return Input(pixels, ", ".join(note for note in (size_note, rate_note) if note), source)


def read_mask(
    path: str | Path, source: ImageSize, clip: tuple[int, int, int], fps: float, frames: int | None = None
) -> Tensor:
    """Read a mask from an image -> (H, W) bool, or from a clip -> (F, H, W) bool; white (true) is to be generated.

    source: (H, W) of the clip's file. clip: (F, H, W) of the clip at the size and rate of the model. The mask must have
    one of these two sizes, and if it is a clip itself, as many frames at `fps` as the clip. frames: read only the first
    `frames`.
    """
    path, size = Path(path), clip[1:]
    is_image = path.suffix.lower() in IMAGE_SUFFIXES
    if is_image:
        grey = _read_image(path, "L")[None]
    else:
        grey = _read_frames(path, fps, frames)[0].mean(-1).astype(np.uint8)
    if grey.shape[1:] not in (source, size):
        raise ValueError(
            f"mask {path} is {grey.shape[1]} x {grey.shape[2]}, but the clip is {source[0]} x {source[1]}; draw the mask "
            "on an image of the clip's size."
        )
    if not is_image and len(grey) != clip[0]:
        raise ValueError(
            f"mask {path} has {len(grey)} frames at {fps:g} fps, but the clip has {clip[0]}; give one mask per frame, or "
            "one image for all frames."
        )
    if grey.shape[1:] != size:
        covering = cover_size(grey.shape[1:], size)[::-1]
        grey = np.stack([np.asarray(Image.fromarray(m).resize(covering, Image.Resampling.NEAREST)) for m in grey])
        grey = crop(grey, size)
    mask = torch.from_numpy(grey > 127)
    return mask[0] if is_image else mask


def _read_frames(path: Path, fps: float, frames: int | None) -> tuple[np.ndarray, str]:
    """(F, H, W, 3) uint8 of an image or a clip at a frame rate, and a note of how the rate was changed."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        if frames is not None and frames > 1:
            raise ValueError(f"{path} is an image of one frame, but --frames is {frames}; leave --frames out.")
        return _read_image(path, "RGB")[None], ""
    with VideoReader(path) as reader:
        keeps_rate = abs(reader.fps / fps - 1) < 0.01  # within 1 percent, every frame of the file is taken
        count = max(1, int(np.floor(float(reader.timestamps[-1]) * fps + 1e-3)) + 1)
        count = len(reader) if keeps_rate else count
        if frames is not None and frames > count:
            raise ValueError(
                f"{path} has {count} frames at {fps:g} fps, but --frames is {frames}; use {count} or fewer."
            )
        num_frames = count if frames is None else frames
        if num_frames > MAX_FRAMES:
            raise ValueError(
                f"{path} has {count} frames at {fps:g} fps, more than the {MAX_FRAMES} that are read at a time; "
                "cut it, or give --frames."
            )
        note = "" if keeps_rate else f"{len(reader)} frames at {reader.fps:.4g} fps -> {count} at {fps:g}"
        indices = list(range(num_frames)) if keeps_rate else reader.indices_at(np.arange(num_frames) / fps)
        return reader.get_frames(indices), note


def _read_image(path: Path, mode: str) -> np.ndarray:
    """An image file as an array, converted to a mode of PIL ("RGB", or "L" for grey)."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert(mode))  # a copy, since PIL's view is read-only
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{str(path)!r} is not an image that can be read ({error}); give another file.") from error


__getattr__ = legacy.aliases(__name__)

"""Reading a user's image, clip or mask at the size and frame rate of a model, with a note of what was changed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stdit import legacy
from stdit.data.media import is_picture
from stdit.data.pictures import BLACK, picture_size, read_picture
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
# A gap in the time stamps or a mistyped rate can ask for more frames than fit into memory, as can a large size.
MAX_FRAMES = 20_000
MAX_PIXELS = 2**29  # of all frames of an input; in float32 they take 6 GiB


def read_input(
    path: str | Path, size: ImageSize | Callable[[ImageSize], ImageSize], fps: float, frames: int | None = None
) -> Input:
    """Read an image (one frame) or a clip, scaled to cover `size` (H, W) and center-cropped.

    size: (H, W), or a function that computes it from the file's (H, W). fps: frames are picked by their time stamps at
    this rate. frames: read only the first `frames`. Raises ValueError (or VideoError) with a message of one line if the
    file cannot be read or is too short.
    """
    path = Path(path)
    if is_picture(path):
        if frames is not None and frames > 1:
            raise ValueError(f"{path} is an image of one frame, but --frames is {frames}; leave --frames out.")
        source, rate_note = picture_size(path), ""
        size = size(source) if callable(size) else size
        covering = cover_size(source, size)
        scaled = read_picture(path, cover=size)[None]
    else:
        with _clip(path, fps, frames) as (reader, indices, rate_note):
            source = reader.size
            size = size(source) if callable(size) else size
            covering = cover_size(source, size)
            _check_memory(path, len(indices), size)
            # One frame at a time, so that no more than one is held at the size of the file.
            scaled = np.concatenate(
                [crop(resize(frame[None], covering), size) for frame in reader.iter_frames(indices)]
            )
    size_note = "" if source == size else f"{source[0]} x {source[1]} -> {size[0]} x {size[1]}"
    # A difference of one pixel is rounding, not a crop that a user would notice.
    if max(covering[0] - size[0], covering[1] - size[1]) > 1:
        size_note += f" (cropped from {covering[0]} x {covering[1]})"
    pixels = to_float(crop(scaled, size))[None]
    return Input(pixels, ", ".join(note for note in (size_note, rate_note) if note), source)


def fit_inside(source: ImageSize, frame: ImageSize, trained: ImageSize) -> ImageSize:
    """The size at which a whole picture fits into `frame`, at most as large as needed to cover the size of training."""
    scale = min(
        *(f / s for f, s in zip(frame, source, strict=True)), max(t / s for t, s in zip(trained, source, strict=True))
    )
    return max(1, round(source[0] * scale)), max(1, round(source[1] * scale))


def read_mask(
    path: str | Path, source: ImageSize, clip: tuple[int, int, int], fps: float, frames: int | None = None
) -> Tensor:
    """Read a mask from an image -> (H, W) bool, or from a clip -> (F, H, W) bool; white (true) is to be generated.

    source: (H, W) of the clip's file. clip: (F, H, W) of the clip at the size and rate of the model. The mask must have
    one of these two sizes, and if it is a clip itself, as many frames at `fps` as the clip. frames: read only the first
    `frames`.
    """
    path, size = Path(path), clip[1:]
    is_image = is_picture(path)
    if is_image:
        # On black, so that white strokes on a transparent layer are a mask.
        _check_mask_size(path, picture_size(path), source, size)
        grey = _mask_of_size(np.asarray(Image.fromarray(read_picture(path, ground=BLACK)).convert("L")), size)[None]
    else:
        with _clip(path, fps, frames) as (reader, indices, _):
            _check_mask_size(path, reader.size, source, size)
            _check_memory(path, len(indices), reader.size)
            greys = (frame.mean(-1).astype(np.uint8) for frame in reader.iter_frames(indices))
            grey = np.stack([_mask_of_size(frame, size) for frame in greys])
    if not is_image and len(grey) != clip[0]:
        raise ValueError(
            f"mask {path} has {len(grey)} frames at {fps:g} fps, but the clip has {clip[0]}; give one mask per frame, or "
            "one image for all frames."
        )
    mask = torch.from_numpy(grey > 127)
    return mask[0] if is_image else mask


def _mask_of_size(grey: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A grey frame (H, W) scaled to cover `size` by its nearest pixels, and cropped."""
    if grey.shape == tuple(size):
        return grey
    covering = cover_size((grey.shape[0], grey.shape[1]), size)[::-1]
    return crop(np.asarray(Image.fromarray(grey).resize(covering, Image.Resampling.NEAREST))[None], size)[0]


def _check_mask_size(path: Path, found: tuple[int, ...], source: ImageSize, size: ImageSize) -> None:
    if found not in (source, size):
        raise ValueError(
            f"mask {path} is {found[0]} x {found[1]}, but the clip is {source[0]} x {source[1]}; draw the mask "
            "on an image of the clip's size."
        )


def _check_memory(path: Path, count: int, size: ImageSize) -> None:
    """ValueError, before any frame is decoded, if the frames together have too many pixels."""
    if count * size[0] * size[1] > MAX_PIXELS:
        raise ValueError(
            f"{count} frames of {size[0]} x {size[1]} of {path} are more than the {MAX_PIXELS >> 20} megapixels that are "
            "read at a time; cut the clip, give --frames, or a smaller size."
        )


@contextmanager
def _clip(path: Path, fps: float, frames: int | None) -> Iterator[tuple[VideoReader, list[int], str]]:
    """A clip's reader, the numbers of its frames at a frame rate, and a note of how the rate was changed."""
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
        if not keeps_rate and reader.fps < fps:
            note += ", some of them twice"
        yield reader, list(range(num_frames)) if keeps_rate else reader.indices_at(np.arange(num_frames) / fps), note


__getattr__ = legacy.aliases(__name__)

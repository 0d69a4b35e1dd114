"""A user's own picture, clip or mask, at the size and frame rate a model works at; what was changed is said."""

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


def read_input(path: str | Path, size: tuple[int, int], fps: float, frames: int | None = None) -> Input:
    """A picture (one frame) or clip, scaled to cover `size` (H, W) and cropped, frames picked by time stamps at `fps`.

    frames: only the first so many. ValueError (or VideoError) in one line if it cannot be read or is too short.
    """
    path = Path(path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        picture = _picture(path, "RGB")[None]
        found, rate = picture, ""
    else:
        with VideoReader(path) as reader:
            count = max(1, int(np.floor(float(reader.timestamps[-1]) * fps + 1e-3)) + 1)
            picked = reader.indices_at(np.arange(count) / fps)
            if abs(reader.fps / fps - 1) < 0.01:  # its own rate: every frame
                picked = list(range(len(reader)))
            rate = (
                ""
                if len(picked) == len(reader)
                else f"{len(reader)} frames at {reader.fps:.4g} fps -> {len(picked)} at {fps:g}"
            )
            if frames is not None and frames > len(picked):
                raise ValueError(
                    f"{path} has {len(picked)} frames at {fps:g} fps, --frames {frames} are more; use fewer."
                )
            found = reader.get_frames(picked[:frames])
    source = (found.shape[1], found.shape[2])
    scaled = "" if source == size else f"{source[0]} x {source[1]} -> {size[0]} x {size[1]}"
    fitted = crop(resize(found, cover_size(source, size)), size)
    pixels = torch.from_numpy(np.ascontiguousarray(fitted)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    return Input(pixels, ", ".join(note for note in (scaled, rate) if note), source)


def read_mask(path: str | Path, source: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A picture, white where pixels are to be made -> (H, W) bool; of the clip's own size, or of the size worked at."""
    mask = _picture(Path(path), "L")
    if mask.shape not in (source, size):
        raise ValueError(
            f"mask {path} is {mask.shape[0]} x {mask.shape[1]}, the clip is {source[0]} x {source[1]}; draw the mask on a "
            "picture of the clip's size."
        )
    if mask.shape != size:
        covering = cover_size(mask.shape, size)
        mask = crop(np.asarray(Image.fromarray(mask).resize(covering[::-1], Image.Resampling.NEAREST))[None], size)[0]
    return torch.from_numpy(mask > 127)


def _picture(path: Path, mode: str) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert(mode))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{str(path)!r} is not an image that can be read ({error}); give another file.") from error

"""Resizing and cropping of frames."""

import numpy as np
from PIL import Image

from stdit.data.media import VideoError

# A strip of 1 x 50,000 pixels that covers a square would become 50,000 times as large as what is left of it.
MAX_CROPPED = 64


def cover_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The smallest (H, W) with the aspect ratio of `size` that covers `target`; VideoError if hardly any of it would fit."""
    heights, widths = target[0] / size[0], target[1] / size[1]
    scale = max(heights, widths)
    if scale > MAX_CROPPED * min(heights, widths):
        raise VideoError(
            f"a picture of {size[0]} x {size[1]} (height x width) is too narrow for {target[0]} x {target[1]}: less than "
            f"1/{MAX_CROPPED} of it would be seen; crop it or leave it out."
        )
    return max(target[0], round(size[0] * scale)), max(target[1], round(size[1] * scale))


def resize(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (F, H, W, 3) or (F, H, W) uint8 to `size` (H, W), bicubic with anti-aliasing."""
    if frames.shape[1:3] == tuple(size):
        return frames
    bicubic = Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(frame).resize(size[::-1], bicubic)) for frame in frames])


def resize_short_side(frames: np.ndarray, size: int) -> np.ndarray:
    """Resize (F, H, W, 3) uint8 so that the shorter side is `size`, keeping the aspect ratio."""
    return resize(frames, cover_size(frames.shape[1:3], (size, size)))


def crop(frames: np.ndarray, target: tuple[int, int], rng: np.random.Generator | None = None) -> np.ndarray:
    """Crop (F, H, W, ...) to `target` (H, W): the center, or a random position if `rng` is given."""
    margins = [actual - wanted for actual, wanted in zip(frames.shape[1:3], target, strict=True)]
    y, x = (int(rng.integers(margin + 1)) if rng is not None else margin // 2 for margin in margins)
    return frames[:, y : y + target[0], x : x + target[1]]

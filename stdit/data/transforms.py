"""Frames to the size a model is trained at."""

import numpy as np
from PIL import Image


def resize_short_side(frames: np.ndarray, size: int) -> np.ndarray:
    """(F, H, W, 3) uint8 -> the shorter side becomes `size`, the aspect stays; anti-aliased."""
    height, width = frames.shape[1:3]
    scale = size / min(height, width)
    target = (max(size, round(width * scale)), max(size, round(height * scale)))
    if target == (width, height):
        return frames
    filter_ = Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(frame).resize(target, filter_)) for frame in frames])

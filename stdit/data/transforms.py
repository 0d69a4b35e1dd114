"""Frames to the size a model is trained at."""

import numpy as np
from PIL import Image


def cover_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The smallest (H, W) of the aspect of `size` that covers `target`."""
    scale = max(target[0] / size[0], target[1] / size[1])
    return max(target[0], round(size[0] * scale)), max(target[1], round(size[1] * scale))


def resize(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(F, H, W, 3) or (F, H, W) uint8 -> `size` (H, W), bicubic, anti-aliased."""
    if frames.shape[1:3] == tuple(size):
        return frames
    filter_ = Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(frame).resize(size[::-1], filter_)) for frame in frames])


def resize_short_side(frames: np.ndarray, size: int) -> np.ndarray:
    """(F, H, W, 3) uint8 -> the shorter side becomes `size`, the aspect stays."""
    return resize(frames, cover_size(frames.shape[1:3], (size, size)))


def crop(frames: np.ndarray, target: tuple[int, int], rng: np.random.Generator | None = None) -> np.ndarray:
    """Cut (F, H, W, 3) to `target` (H, W): the middle, or anywhere if a generator is given."""
    room = [have - want for have, want in zip(frames.shape[1:3], target, strict=True)]
    y, x = (int(rng.integers(r + 1)) if rng is not None else r // 2 for r in room)
    return frames[:, y : y + target[0], x : x + target[1]]

"""Pixels as files hold them (uint8, channels last) and as models take them (floats in [-1, 1], channels first)."""

import numpy as np
import torch
from torch import Tensor


def to_float(frames: Tensor | np.ndarray) -> Tensor:
    """Convert frames (..., F, H, W, 3) uint8 to pixels (..., 3, F, H, W) float32 in [-1, 1]."""
    frames = torch.from_numpy(np.ascontiguousarray(frames)) if isinstance(frames, np.ndarray) else frames
    return frames.movedim(-1, -4).float() / 127.5 - 1


def to_bytes(pixels: Tensor) -> Tensor:
    """Convert pixels (..., 3, F, H, W) in [-1, 1] to frames (..., F, H, W, 3) uint8; values outside are clipped."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-4, -1)

"""Keys and values of finished frames, so that a frame-causal model computes each frame once."""

import numpy as np
import torch
from torch import Tensor, nn


class FrameCache:
    """What attention layers remember of earlier frames; the last `window` - 1 of them, or all.

    Read by every call, written only while `writing`: a frame enters when it is finished.
    """

    def __init__(self, window: int | None = None):
        self.window, self.writing, self.frames = window, False, 0
        self._kept: dict[nn.Module, tuple[Tensor, Tensor, np.ndarray]] = {}

    def seen(
        self, layer: nn.Module, key: Tensor, value: Tensor, frames: np.ndarray
    ) -> tuple[Tensor, Tensor, np.ndarray]:
        """Keys and values (N, L, H, D) with those of earlier frames before them, and the frame of each."""
        if layer in self._kept:
            old_key, old_value, old_frames = self._kept[layer]
            key, value = torch.cat([old_key, key], 1), torch.cat([old_value, value], 1)
            frames = np.concatenate([old_frames, frames])
        if self.writing:
            # The next frame sees window - 1 earlier ones; nothing older is kept.
            first = int(frames.max()) + 2 - self.window if self.window else 0
            begin = int((frames < first).sum())
            self._kept[layer] = (key[:, begin:].clone(), value[:, begin:].clone(), frames[begin:])
        return key, value, frames

    def bytes(self) -> int:
        """What it holds now."""
        return sum(k.nbytes + v.nbytes for k, v, _ in self._kept.values())

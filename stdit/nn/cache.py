"""Keys and values of finished frames, so that a frame-causal model computes each frame once."""

import numpy as np
import torch
from torch import Tensor, nn


class FrameCache:
    """What attention layers remember of earlier frames: the first `sink`, and the last `window` - 1 of the others, or all.

    Read by every call, written only while `writing`: a frame enters when it is finished. Keys are kept as they are before
    they are turned by their places, since those of the first frames come nearer as time goes on.
    """

    def __init__(self, window: int | None = None, sink: int = 0):
        self.window, self.sink, self.writing, self.frames = window, sink, False, 0
        self._kept: dict[nn.Module, tuple[Tensor, Tensor, np.ndarray]] = {}

    def seen(
        self, layer: nn.Module, key: Tensor, value: Tensor, places: np.ndarray
    ) -> tuple[Tensor, Tensor, np.ndarray]:
        """Keys and values (N, L, H, D) with those of earlier frames before them, and the places (L, 3) of all."""
        if layer in self._kept:
            old_key, old_value, old_places = self._kept[layer]
            key, value = torch.cat([old_key, key], 1), torch.cat([old_value, value], 1)
            places = np.concatenate([old_places, places])
        if self.writing:
            # The next frame sees window - 1 earlier ones; nothing older is kept.
            frames = places[:, 0]
            first = int(frames.max()) + 2 - self.window if self.window else 0
            kept = np.flatnonzero((frames >= first) | (frames < self.sink))
            where = torch.from_numpy(kept).to(key.device)
            self._kept[layer] = (key.index_select(1, where), value.index_select(1, where), places[kept])
        return key, value, places

    def bytes(self) -> int:
        """What it holds now."""
        return sum(k.nbytes + v.nbytes for k, v, _ in self._kept.values())

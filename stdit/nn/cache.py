"""Keys and values of finished frames, so that a frame-causal model computes each frame once."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn


class FrameCache:
    """Keys and values of the first `sink` frames and of the last `window` - 1 others (None: of all earlier frames).

    Every call reads it; it is written only while `writing` is true: a frame enters when it is finished. Keys are cached
    before RoPE, because sink positions change as the clip grows.
    """

    def __init__(self, window: int | None = None, sink: int = 0):
        self.window, self.sink, self.writing, self.frames = window, sink, False, 0
        self._entries: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._positions: dict[str, np.ndarray] = {}

    def positions(self, axis: str) -> np.ndarray:
        """(L, 3) positions of the cached keys of every layer that attends along `axis`."""
        return self._positions.get(axis, np.zeros((0, 3), dtype=np.int64))

    def retained(self, positions: np.ndarray) -> np.ndarray:
        """Of keys at positions (L, 3), the indices of those that the next frame still sees."""
        frames = positions[:, 0]
        first = int(frames.max()) + 2 - self.window if self.window else 0  # the next frame sees window - 1 earlier ones
        return np.flatnonzero((frames >= first) | (frames < self.sink))

    def extend(self, layer: nn.Module, key: Tensor, value: Tensor, retained: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values (N, L, H, D) behind a layer's cached ones; what is `retained` of them is cached while writing."""
        if layer in self._entries:
            cached_key, cached_value = self._entries[layer]
            key, value = torch.cat([cached_key, key], 1), torch.cat([cached_value, value], 1)
        if retained is not None:
            self._entries[layer] = (key.index_select(1, retained), value.index_select(1, retained))
        return key, value

    def finish(self, frames: int, positions: Mapping[str, np.ndarray]) -> None:
        """After a writing pass: so many frames were added, and the cached keys of each axis stand at these positions."""
        self.frames += frames
        self._positions.update(positions)

    def bytes(self) -> int:
        """Bytes it holds now."""
        return sum(key.nbytes + value.nbytes for key, value in self._entries.values())

"""Key-value cache of finished frames, so that a frame-causal model computes each frame once."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn


class FrameCache:
    """Keys and values of the first `sink` frames and of the last `window` - 1 other frames (None: all earlier ones).

    Every call of the model reads the cache. A call writes to it only while `writing` is true, so a frame is cached once
    it is fully denoised. Keys are cached before RoPE, because the positions of sink frames change as the clip grows.
    """

    def __init__(self, window: int | None = None, sink: int = 0):
        self.window, self.sink, self.writing, self.frames = window, sink, False, 0
        self._entries: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._positions: dict[str, np.ndarray] = {}

    def positions(self, axis: str) -> np.ndarray:
        """Positions (L, 3) of the cached keys in every layer that attends along `axis`."""
        return self._positions.get(axis, np.zeros((0, 3), dtype=np.int64))

    def retained(self, positions: np.ndarray) -> np.ndarray:
        """Indices of the keys, among keys at positions (L, 3), that the next frame still attends to."""
        frames = positions[:, 0]
        first = int(frames.max()) + 2 - self.window if self.window else 0  # the next frame attends to window - 1 more
        return np.flatnonzero((frames >= first) | (frames < self.sink))

    def extend(self, layer: nn.Module, key: Tensor, value: Tensor, retained: Tensor | None) -> tuple[Tensor, Tensor]:
        """Append keys and values (N, L, H, D) to a layer's cached ones, and return all of them.

        retained: indices of the keys to cache for the next call; None while the cache is only read.
        """
        if layer in self._entries:
            cached_key, cached_value = self._entries[layer]
            key, value = torch.cat([cached_key, key], 1), torch.cat([cached_value, value], 1)
        if retained is not None:
            self._entries[layer] = (key.index_select(1, retained), value.index_select(1, retained))
        return key, value

    def finish(self, frames: int, positions: Mapping[str, np.ndarray]) -> None:
        """Record the frames that a writing pass has added, and the positions of the cached keys of each axis."""
        self.frames += frames
        self._positions.update(positions)

    def copy(self) -> "FrameCache":
        """A cache of the same content, for a clip that goes on in another way. The tensors are shared, and never changed."""
        other = FrameCache(self.window, self.sink)
        other.frames, other._entries, other._positions = self.frames, dict(self._entries), dict(self._positions)
        return other

    def bytes(self) -> int:
        """Memory of the cached keys and values in bytes."""
        return sum(key.nbytes + value.nbytes for key, value in self._entries.values())

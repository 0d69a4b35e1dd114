"""What every dataset offers."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from stdit.data.samplers import ClipSize


class Dataset(Protocol):
    """Samples by number, at the config's size or another.

    `load` gives pixels (F, H, W, 3) uint8 and what the clip is (`ClipFacts`), or latents (C, T, h, w) and raw conditions.
    `record` gives what the data says of a sample: label (a number or None), caption, further columns of a manifest.
    `shape`: frames, height and width that there are.
    """

    num_classes: int
    class_names: list[str] | None

    def __len__(self) -> int: ...
    def record(self, index: int) -> Mapping[str, Any]: ...
    def name(self, index: int) -> str: ...
    def shape(self, index: int) -> tuple[int, int, int]: ...
    def load(self, index: int, rng: np.random.Generator, size: ClipSize | None = None) -> dict[str, Any]: ...

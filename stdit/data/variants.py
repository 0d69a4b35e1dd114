"""Several windows of every clip, and their mirror images, as samples of their own, for caches of latents."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from stdit.conditions import ActionSpace
from stdit.data.actions import known_actions
from stdit.data.base import Dataset, Identity
from stdit.data.identity import identity_of
from stdit.data.samplers import ClipSize

VARIANT = "variant"  # the column of a sample's number among those of its clip


class ClipVariants:
    """`windows` samples for every clip, each with its own random draws; with `mirrored`, each of them mirrored, too.

    The variants of a clip are neighbours. ValueError for mirrored clips with actions, which would no longer be right.
    """

    def __init__(self, dataset: Dataset, windows: int, mirrored: bool):
        self.dataset, self.windows, self.mirrored = dataset, windows, mirrored
        self.num_classes, self.class_names = dataset.num_classes, dataset.class_names
        self.decodes = getattr(dataset, "decodes", True)
        if mirrored and known_actions(dataset) is not None:
            raise ValueError("mirrored clips would have the actions of the clips as they were; leave out --mirrored.")

    @property
    def action_space(self) -> ActionSpace | None:
        """The actions of the clips, None if they have none; ValueError if what the dataset calls actions is something else."""
        return getattr(self.dataset, "action_space", None)

    @property
    def count(self) -> int:
        """Samples of each clip."""
        return self.windows * (1 + self.mirrored)

    @property
    def rates(self) -> list[float]:
        """The frame rates of the dataset's clips, as far as it knows them."""
        return list(getattr(self.dataset, "rates", []))

    def __len__(self) -> int:
        return len(self.dataset) * self.count

    def record(self, index: int) -> Mapping[str, Any]:
        """The annotations of the clip."""
        return self.dataset.record(index // self.count)

    def name(self, index: int) -> str:
        """The name of the clip."""
        return self.dataset.name(index // self.count)

    def shape(self, index: int) -> tuple[int, int, int]:
        """The (frames, height, width) of the clip."""
        return self.dataset.shape(index // self.count)

    def shapes(self) -> np.ndarray | None:
        """The shapes of all samples at once (N, 3), None if the dataset does not know them."""
        known = self.dataset.shapes() if hasattr(self.dataset, "shapes") else None
        return None if known is None else np.repeat(known, self.count, axis=0)

    def identity(self, index: int, *, read: bool = False) -> Identity:
        """The identity of the clip, and which of its samples this is."""
        one = identity_of(self.dataset, index // self.count, read=read)
        return one._replace(columns={**one.columns, VARIANT: index % self.count})

    def window_of(self, index: int) -> int:
        """The number of the clip's window that a sample shows: a mirrored one shows that of the sample before it."""
        return index % self.count // (1 + self.mirrored)

    def load(self, index: int, rng: np.random.Generator, size: ClipSize | None = None) -> dict[str, Any]:
        """Load a window, mirrored if the sample is the second of two."""
        sample = self.dataset.load(index // self.count, rng, size)
        if self.mirrored and index % 2:
            sample["pixels"] = sample["pixels"].flip(2)
        return sample

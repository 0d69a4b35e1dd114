"""Several data sets as one, whose classes are joined by their names."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from stdit.conditions import ActionSpace
from stdit.conditions.label import label_number
from stdit.data.actions import known_actions
from stdit.data.base import Annotated, Dataset, Identity, captions_of
from stdit.data.identity import identity_of
from stdit.data.samplers import ClipSize


class JointDataset(Annotated):
    """Samples of several data sets, one set after another.

    classes: the names to which those of the data sets belong; None: all that there are, in alphabetical order. Classes that
    are numbers in every set stay so. num_classes: with numbers, how many there are at least. ValueError for sets that do not
    go together: labelled and unlabelled ones, names and numbers, pixels and latents, different actions.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        names: Sequence[str],
        classes: Sequence[str] | None = None,
        num_classes: int = 0,
    ):
        self.datasets, self.names = list(datasets), list(names)
        self.parts = [len(one) for one in datasets]
        self._starts = np.cumsum([0, *self.parts])
        self.decodes = any(getattr(one, "decodes", True) for one in datasets)
        self.fixed_sizes = self._common(
            [getattr(one, "fixed_sizes", False) for one in datasets], "latents that are cached and clips"
        )
        self._common([known_actions(one) for one in datasets], "different actions")
        self.num_classes, self.class_names, self._labels = self._join_classes(classes, num_classes)

    @property
    def action_space(self) -> ActionSpace | None:
        """The actions of the clips, None if they have none; ValueError if what a data set calls actions is something else."""
        return next((getattr(one, "action_space", None) for one in self.datasets), None)

    def _common(self, found: Sequence[Any], what: str) -> Any:
        """What all data sets have; ValueError, which names `what`, if they differ."""
        for name, value in zip(self.names, found, strict=True):
            if value != found[0]:
                raise ValueError(
                    f"data.datasets has {what}, {self.names[0]!r} and {name!r}, which cannot be trained on together; use sets of "
                    "one kind."
                )
        return found[0]

    def _join_classes(
        self, classes: Sequence[str] | None, num_classes: int
    ) -> tuple[int, list[str] | None, list[list[int] | None]]:
        """The number of classes, their names, and for each data set what its labels become (None: they stay)."""
        labelled = [one.num_classes > 0 for one in self.datasets]
        named = [one.class_names is not None for one in self.datasets]
        for kind, have in (("labels", labelled), ("names of classes", named)):
            if any(have) and not all(have):
                raise ValueError(
                    f"{self.names[have.index(True)]!r} has {kind}, but {self.names[have.index(False)]!r} has none; give all data "
                    "sets labels of one kind, names or numbers, or none."
                )
        if not all(named) or not all(labelled):
            most = max(one.num_classes for one in self.datasets)
            if classes is not None and most > len(classes):
                raise ValueError(f"the data has labels up to {most - 1}, but there are {len(classes)} classes.")
            count = max(most, num_classes) if any(labelled) else 0
            return count, None if classes is None else list(classes), [None] * len(self.datasets)
        found = [list(one.class_names or ()) for one in self.datasets]
        joined = sorted({name for names in found for name in names}) if classes is None else list(classes)
        maps: list[list[int] | None] = [[label_number(name, len(joined), joined) for name in names] for names in found]
        return len(joined), joined, maps

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _place(self, index: int) -> tuple[int, int]:
        """The number of a sample's data set, and its index there."""
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return part, int(index - self._starts[part])

    def _relabelled(self, part: int, record: Mapping[str, Any]) -> dict[str, Any]:
        labels, label = self._labels[part], record.get("label")
        return dict(record) if labels is None or label is None else {**record, "label": labels[label]}

    @property
    def rates(self) -> list[float]:
        """The frame rates of the clips, as far as the data sets know them."""
        return sorted(rate for one in self.datasets for rate in getattr(one, "rates", []))

    @property
    def shards(self) -> list[int] | None:
        """The number of samples in each shard, None if a data set has no shards."""
        counts = [getattr(one, "shards", None) for one in self.datasets]
        return [n for one in counts for n in one or ()] if all(counts) else None

    def record(self, index: int) -> Mapping[str, Any]:
        """The annotations of a sample, with its label among all classes."""
        part, own = self._place(index)
        return self._relabelled(part, self.datasets[part].record(own))

    def captions(self) -> Iterator[str]:
        """The captions of all samples in their order, empty where there is none."""
        return chain.from_iterable(map(captions_of, self.datasets))

    def name(self, index: int) -> str:
        """The name of a sample in messages."""
        part, own = self._place(index)
        return self.datasets[part].name(own)

    def identity(self, index: int, *, read: bool = False) -> Identity:
        """The `Identity` of a sample, whose source begins with the number of its data set if there are several."""
        part, own = self._place(index)
        found = identity_of(self.datasets[part], own, read=read)
        label = self._relabelled(part, {"label": found.label})["label"]
        return found._replace(source=f"{part}/{found.source}" if len(self.parts) > 1 else found.source, label=label)

    def held_columns(self, index: int) -> dict[str, str]:
        """Columns by which a clip can be held out."""
        part, own = self._place(index)
        dataset = self.datasets[part]
        return (
            dataset.held_columns(own) if hasattr(dataset, "held_columns") else dict(identity_of(dataset, own).columns)
        )

    def group_of(self, index: int) -> str:
        """The file that a clip comes from."""
        part, own = self._place(index)
        dataset = self.datasets[part]
        group = dataset.group_of(own) if hasattr(dataset, "group_of") else identity_of(dataset, own).source
        return f"{part}/{group}" if len(self.parts) > 1 else str(group)

    def shape(self, index: int) -> tuple[int, int, int]:
        """The (frames, height, width) of a sample before it is cut to a size."""
        part, own = self._place(index)
        return self.datasets[part].shape(own)

    def shapes(self) -> np.ndarray | None:
        """The shapes of all samples at once (N, 3), None if a data set does not know them."""
        known = [one.shapes() if hasattr(one, "shapes") else None for one in self.datasets]
        return None if any(one is None for one in known) else np.concatenate(known)  # type: ignore[arg-type]

    def load(self, index: int, rng: np.random.Generator, size: ClipSize | None = None) -> dict[str, Any]:
        """Load a sample, as its data set does."""
        part, own = self._place(index)
        sample = self.datasets[part].load(own, rng, size)
        if "conditions" in sample:
            sample = {**sample, "conditions": self._relabelled(part, sample["conditions"])}
        return sample

"""Clips that are kept from training, so that a run can measure its loss on them."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from stdit.conditions import ActionSpace
from stdit.data.base import Dataset, Identity
from stdit.data.identity import identity_of
from stdit.data.samplers import ClipSize
from stdit.variants import nearest


class Subset:
    """Some samples of a dataset, numbered from 0 in the order of `indices`."""

    def __init__(self, dataset: Dataset, indices: Sequence[int] | np.ndarray):
        self.dataset, self.indices = dataset, np.asarray(indices, dtype=np.int64)
        self.num_classes, self.class_names = dataset.num_classes, dataset.class_names
        self.decodes = getattr(dataset, "decodes", True)
        self.fixed_sizes = getattr(dataset, "fixed_sizes", False)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def action_space(self) -> ActionSpace | None:
        """The actions of the clips, None if they have none; ValueError if what the dataset calls actions is something else."""
        return getattr(self.dataset, "action_space", None)

    @property
    def rates(self) -> list[float]:
        """The frame rates of the dataset's clips, as far as it knows them."""
        return list(getattr(self.dataset, "rates", []))

    @property
    def shards(self) -> list[int] | None:
        """The number of these samples in each shard of the dataset, None if it has no shards."""
        return self._counts(getattr(self.dataset, "shards", None))

    @property
    def parts(self) -> list[int] | None:
        """The number of these samples in each of several data sets, None of a single one."""
        return self._counts(getattr(self.dataset, "parts", None))

    def _counts(self, counts: Sequence[int] | None) -> list[int] | None:
        if not counts:
            return None
        places = np.searchsorted(np.cumsum(counts), self.indices, side="right")
        return [int(count) for count in np.bincount(places, minlength=len(counts))]

    def record(self, index: int) -> Mapping[str, Any]:
        """The annotations of a sample."""
        return self.dataset.record(int(self.indices[index]))

    def name(self, index: int) -> str:
        """The name of a sample in messages."""
        return self.dataset.name(int(self.indices[index]))

    def shape(self, index: int) -> tuple[int, int, int]:
        """The (frames, height, width) of a sample before it is cut to a size."""
        return self.dataset.shape(int(self.indices[index]))

    def shapes(self) -> np.ndarray | None:
        """The shapes of all samples at once (N, 3), None if the dataset does not know them."""
        known = self.dataset.shapes() if hasattr(self.dataset, "shapes") else None
        return None if known is None else known[self.indices]

    def identity(self, index: int, *, read: bool = False) -> Identity:
        """The `Identity` of a sample."""
        return identity_of(self.dataset, int(self.indices[index]), read=read)

    def load(self, index: int, rng: np.random.Generator, size: ClipSize | None = None) -> dict[str, Any]:
        """Load a sample, as the dataset does."""
        return self.dataset.load(int(self.indices[index]), rng, size)


def split(
    dataset: Dataset, share: float, column: str | None = None, values: Sequence[str] = ()
) -> tuple[Subset, Subset]:
    """Split a dataset into the samples to train on and those to hold out.

    share: of the files to hold out, or, with a column of the manifest, of its values, so that the clips of one scene or
    source stay together. A hash of their names decides which, so that every run on this data holds out the same. values:
    hold out these values of the column instead of a share. ValueError if either part would be empty.
    """
    numbers: dict[str, int] = {}  # of the groups; a number for every sample takes less memory than its group's name
    groups = np.fromiter((numbers.setdefault(group, len(numbers)) for group in _groups(dataset, column)), np.int64)
    found = sorted(numbers)
    if unknown := sorted(set(values) - set(found)):
        raise ValueError(
            f"train.holdout_values has {unknown[0]!r}, which the column {column!r} does not.{nearest(unknown[0], found)} It has "
            f"{', '.join(found[:8])}{' ...' if len(found) > 8 else ''}."
        )
    chosen = set(values) or set(sorted(found, key=_hash)[: max(1, round(share * len(found)))])
    if len(chosen) == len(found):
        what = f"{len(found)} value(s) of the column {column!r}" if column else f"{len(found)} file(s)"
        raise ValueError(
            f"the hold-out of {what} leaves no clip to train on; hold out fewer (train.holdout, train.holdout_values), or "
            "give more data."
        )
    held = np.isin(groups, [numbers[group] for group in chosen])
    return Subset(dataset, np.flatnonzero(~held)), Subset(dataset, np.flatnonzero(held))


def _groups(dataset: Dataset, column: str | None) -> Iterator[str]:
    """The value of a column for every sample, or the name of its file."""
    # Where the dataset has columns, since a million rows one by one take 20 seconds.
    values = dataset.column_values(column) if hasattr(dataset, "column_values") else None
    if values is not None:
        for i, value in enumerate(values):
            yield _group(dataset, i, column) if value is None else str(value)
        return
    for i in range(len(dataset)):
        yield _group(dataset, i, column)


def _group(dataset: Dataset, index: int, column: str | None) -> str:
    if column is not None:
        return column_of(dataset, index, column)
    return str(dataset.group_of(index)) if hasattr(dataset, "group_of") else identity_of(dataset, index).source


def column_of(dataset: Dataset, index: int, column: str) -> str:
    """The value of a column for a sample; ValueError if the sample does not have it.

    A manifest's columns, of cached latents those they were made with; `label` is the name of the class, `caption` the
    caption.
    """
    columns = columns_for_holdout(dataset, index)
    if column not in columns:
        cached = (
            " Latents have it once stdit cache-latents, run again, is given it and train.holdout or train.holdout_values."
            if not getattr(dataset, "decodes", True)
            else ""
        )
        raise ValueError(
            f"train.holdout_column={column!r} is no column that {dataset.name(index)} has; it has "
            f"{', '.join(map(str, columns)) or 'none'}. Leave it out to hold out files.{cached}"
        )
    return str(columns[column])


def columns_for_holdout(dataset: Dataset, index: int) -> dict[str, Any]:
    """The columns by which a sample can be held out, with their values."""
    one = identity_of(dataset, index)
    own = dataset.held_columns(index) if hasattr(dataset, "held_columns") else dict(one.columns)
    if one.caption:
        own = {"caption": one.caption, **own}
    if one.label is not None:
        own = {"label": dataset.class_names[one.label] if dataset.class_names else one.label, **own}
    return own


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()

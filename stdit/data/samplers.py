"""Batch samplers: which samples make up a training step, and at what size, as pure functions of (seed, step).

`UniformSampler`: clips of one shape. `BucketSampler`: several shapes, one per step, in batches of about equal cost.
`PackedSampler`: clips of all shapes, packed into sequences of a given number of tokens. `BlockedSampler`: clips of one shape
in an order that reads few shards at a time. `WeightedSampler`: several data sets, each with a sampler of its own.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from stdit import legacy
from stdit.rng import keyed_choices, keyed_rng


class ClipSize(NamedTuple):
    """The size a clip is cropped to: frames, and height and width in pixels."""

    frames: int
    height: int
    width: int


class SampleRef(NamedTuple):
    """A sample's index and the size to load it at (None: the size of the config)."""

    sample: int
    size: ClipSize | None


class BatchSampler(Protocol):
    """The interface of a batch sampler, as the loader uses it."""

    def batch(self, step: int) -> list[SampleRef]:
        """The samples of a step over all processes."""

    def candidates(self, size: ClipSize | None) -> Sequence[int] | np.ndarray:
        """Indices of the samples that may be loaded at `size`; one of them replaces an unreadable sample."""


def sample_index(seed: int, position: int, size: int) -> int:
    """The sample at a position of the endless sequence of shuffled epochs over `size` samples."""
    epoch, offset = divmod(position, size)
    return int(_shuffled(seed, epoch, size)[offset])


@lru_cache(maxsize=16)  # a batch may reach from one epoch into the next, and there may be several data sets
def _shuffled(seed: int, epoch: int, size: int) -> np.ndarray:
    return keyed_rng("order", seed, epoch).permutation(size)


class UniformSampler:
    """Batches of `batch_size` clips, all of the config's size."""

    def __init__(self, seed: int, num_samples: int, batch_size: int):
        self.seed, self.num_samples, self.batch_size = seed, num_samples, batch_size

    def batch(self, step: int) -> list[SampleRef]:
        """The next `batch_size` samples of the endless sequence of shuffled epochs."""
        first = step * self.batch_size
        return [SampleRef(sample_index(self.seed, first + i, self.num_samples), None) for i in range(self.batch_size)]

    def candidates(self, size: ClipSize | None) -> Sequence[int] | np.ndarray:
        """All samples, since they have one size."""
        return range(self.num_samples)


class _Epochs(ABC):
    """Keeps what a sampler derives for two epochs, between which a batch may lie; a copy for a worker derives it anew."""

    @abstractmethod
    def _make(self, epoch: int) -> Any:
        """What the sampler derives for an epoch."""

    def _of(self, epoch: int) -> Any:
        kept = self.__dict__.setdefault("_kept", {})
        if epoch not in kept:
            if len(kept) == 2:
                kept.pop(next(iter(kept)))
            kept[epoch] = self._make(epoch)
        return kept[epoch]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_kept"}


class BlockedSampler(_Epochs):
    """Batches as those of `UniformSampler`, in an order that reads few shards at a time, for stores where jumps are dear.

    counts: samples of each shard, in the order of the dataset. In every epoch the shards are shuffled; the samples of every
    `window` of them in turn are shuffled among each other. Every sample comes once in an epoch.
    """

    def __init__(self, seed: int, counts: Sequence[int], window: int, batch_size: int):
        self.seed, self.window, self.batch_size = seed, window, batch_size
        self.counts = np.asarray(counts, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])

    def _make(self, epoch: int) -> np.ndarray:
        shards = keyed_rng("order", self.seed, epoch, 4).permutation(len(self.counts))
        windows = []
        for number, first in enumerate(range(0, len(shards), self.window)):
            members = [np.arange(self.starts[s], self.starts[s + 1]) for s in shards[first : first + self.window]]
            windows.append(keyed_rng("order", self.seed, epoch, 5, number).permutation(np.concatenate(members)))
        return np.concatenate(windows)

    def batch(self, step: int) -> list[SampleRef]:
        """The next `batch_size` samples of the endless sequence of epochs."""
        first, total = step * self.batch_size, int(self.starts[-1])
        places = (divmod(first + i, total) for i in range(self.batch_size))
        return [SampleRef(int(self._of(epoch)[offset]), None) for epoch, offset in places]

    def candidates(self, size: ClipSize | None) -> Sequence[int] | np.ndarray:
        """All samples, since they have one size."""
        return range(int(self.starts[-1]))


NO_BUCKET = -1


def assign_buckets(
    shapes: Sequence[tuple[int, int, int]] | np.ndarray,
    sizes: Sequence[ClipSize],
    seed: int,
    keys: np.ndarray | None = None,
) -> np.ndarray:
    """Assign each clip of (frames, height, width) to one of `sizes` (N,); -1 where the clip is shorter than all of them.

    Among the sizes that are not longer than the clip, those of the nearest aspect ratio are candidates; one is drawn
    at random, keyed by the seed and the clip's index, or its number in `keys` (N,). Sizes of one frame are for images, and for clips that are too
    short for all others.
    """
    kinds, which = np.unique(np.asarray(shapes, np.int64).reshape(-1, 3), axis=0, return_inverse=True)
    nearest = [_nearest(kind, sizes) for kind in kinds.tolist()]
    which = which.reshape(-1)
    found = np.full((len(kinds), len(sizes)), NO_BUCKET)
    for kind, candidates in enumerate(nearest):
        found[kind, : len(candidates)] = candidates
    buckets, choices = found[which, 0], (found != NO_BUCKET).sum(1)[which]
    for count in np.unique(choices[choices > 1]).tolist():
        rows = np.flatnonzero(choices == count)
        drawn_by = rows if keys is None else keys[rows]
        buckets[rows] = found[which[rows], keyed_choices("order", (seed, drawn_by, 1), count)]
    return buckets


def _nearest(shape: Sequence[int], sizes: Sequence[ClipSize]) -> list[int]:
    """The sizes that a clip of this shape may be cut to."""
    frames, height, width = shape
    fits = [i for i, size in enumerate(sizes) if size.frames <= frames]
    fits = [i for i in fits if sizes[i].frames > 1] or fits
    distances = [abs(math.log(width / height) - math.log(sizes[i].width / sizes[i].height)) for i in fits]
    return [i for i, distance in zip(fits, distances, strict=True) if distance < min(distances) + 1e-6]


def _check_any_assigned(buckets: np.ndarray) -> None:
    if (buckets == NO_BUCKET).all():
        raise ValueError("none of the clips is long enough for any of data.sizes; add a size with fewer frames.")


class BucketSampler:
    """Batches of one size each, of as many clips as fit into `tokens`, in multiples of `processes`.

    buckets: for each sample its index into `sizes`, or -1 to leave it out (`assign_buckets`). costs: tokens of one
    clip of each size. An epoch covers every clip; the last batch of a bucket is filled up with clips from its start. A
    batch has no more clips than its bucket.
    """

    def __init__(
        self,
        seed: int,
        buckets: np.ndarray,
        sizes: Sequence[ClipSize],
        costs: Sequence[int],
        tokens: int,
        processes: int = 1,
    ):
        buckets = np.asarray(buckets)
        _check_any_assigned(buckets)
        self.seed, self.sizes = seed, list(sizes)
        self.members = [np.flatnonzero(buckets == number) for number in range(len(sizes))]
        most = [max(1, tokens // (cost * processes)) for cost in costs]
        held = [-(-len(members) // processes) for members in self.members]
        self.batch_sizes = [max(1, min(pair)) * processes for pair in zip(most, held, strict=True)]
        # Where the batches of every bucket begin among those of an epoch, before shuffling, and their number.
        batches = [-(-len(members) // size) for members, size in zip(self.members, self.batch_sizes, strict=True)]
        self.begins = np.cumsum([0, *batches])

    def batch(self, step: int) -> list[SampleRef]:
        """The samples of a step, all of one size."""
        epoch, offset = divmod(step, int(self.begins[-1]))
        position = int(_shuffled(self.seed, epoch, int(self.begins[-1]))[offset])
        bucket = int(np.searchsorted(self.begins, position, side="right")) - 1
        number = position - int(self.begins[bucket])  # among the batches of this bucket
        members, count = self.members[bucket], self.batch_sizes[bucket]
        order = _shuffled_bucket(self.seed, epoch, bucket, len(members))
        picked = members[order[np.arange(number * count, (number + 1) * count) % len(members)]]
        return [SampleRef(index, self.sizes[bucket]) for index in picked.tolist()]

    def candidates(self, size: ClipSize | None) -> Sequence[int] | np.ndarray:
        """The samples of the bucket of `size`."""
        return self.members[self.sizes.index(size)] if size is not None else np.zeros(0, np.int64)


@lru_cache(maxsize=32)  # the steps of an epoch go from one bucket to the next
def _shuffled_bucket(seed: int, epoch: int, bucket: int, size: int) -> np.ndarray:
    return keyed_rng("order", seed, epoch, bucket, 2).permutation(size)


class PackedSampler(_Epochs):
    """Batches of clips of all sizes, packed without padding.

    Each process has one sequence of at most `tokens` / `processes` tokens per step. The arguments are those of
    `BucketSampler`. An epoch covers every clip once.
    """

    def __init__(
        self,
        seed: int,
        buckets: np.ndarray,
        sizes: Sequence[ClipSize],
        costs: Sequence[int],
        tokens: int,
        processes: int = 1,
    ):
        self.buckets = np.asarray(buckets)
        _check_any_assigned(self.buckets)
        self.seed, self.sizes = seed, list(sizes)
        self.tokens, self.processes = tokens // processes, processes
        self.members = np.flatnonzero(self.buckets != NO_BUCKET)
        self._costs = np.asarray(costs, np.int64)
        self._epoch_starts = [0]  # the first step of each epoch; grows when later steps are asked for
        if max(costs) > self.tokens:
            raise ValueError(
                f"a clip of {max(costs)} tokens does not fit into a pack of {self.tokens} (train.tokens over "
                f"{processes} process(es)); use train.tokens={max(costs) * processes} or more."
            )

    def _make(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's samples in shuffled order, and where each pack begins among them, with their number at the end.

        A new pack begins whenever the next clip does not fit into the last.
        """
        order = self.members[keyed_rng("order", self.seed, epoch, 3).permutation(len(self.members))]
        ends = np.cumsum(self._costs[self.buckets[order]])
        before = np.concatenate([[0], ends[:-1]])
        following = np.searchsorted(ends, before + self.tokens, side="right")  # of a pack that begins there
        begins = [0]
        while begins[-1] < len(order):  # without a list of all, which would leave 40 MB in a worker at a million clips
            begins.append(following.item(begins[-1]))
        return order, np.array(begins)

    def batch(self, step: int) -> list[SampleRef]:
        """The samples of a step: number p + i * processes is the i-th clip of process p.

        The shortest pack of the step limits how many clips every process takes.
        """
        while self._epoch_starts[-1] <= step:
            num_packs = len(self._of(len(self._epoch_starts) - 1)[1]) - 1
            self._epoch_starts.append(self._epoch_starts[-1] + -(-num_packs // self.processes))
        epoch = int(np.searchsorted(self._epoch_starts, step, side="right")) - 1
        order, begins = self._of(epoch)
        first = (step - self._epoch_starts[epoch]) * self.processes
        packs = [(first + p) % (len(begins) - 1) for p in range(self.processes)]
        by_process = [order[begins[pack] : begins[pack + 1]] for pack in packs]
        picked = [int(by_process[p][i]) for i in range(min(map(len, by_process))) for p in range(self.processes)]
        return [SampleRef(index, self.sizes[self.buckets[index]]) for index in picked]

    def candidates(self, size: ClipSize | None) -> Sequence[int] | np.ndarray:
        """The samples that are packed at `size`."""
        return np.flatnonzero(self.buckets == self.sizes.index(size)) if size is not None else np.zeros(0, np.int64)


class WeightedSampler(_Epochs):
    """Draws from the samplers of several data sets by their weights, `draws` batches a step.

    starts: the number of each data set's first sample. In every `ROUND` batches each data set has its share of them, in an
    order that is shuffled; which batch of a data set comes next is counted, so that each goes through its own epochs.
    """

    ROUND = 4096

    def __init__(
        self,
        seed: int,
        samplers: Sequence[BatchSampler],
        starts: Sequence[int],
        weights: Sequence[float],
        *,
        draws: int,
    ):
        self.seed, self.samplers, self.starts, self.draws = seed, list(samplers), list(starts), draws
        exact = np.asarray(weights, float) / sum(weights) * self.ROUND
        self.shares = np.floor(exact).astype(np.int64)
        self.shares[np.argsort(self.shares - exact, kind="stable")[: self.ROUND - int(self.shares.sum())]] += 1
        if (self.shares == 0).any():
            smallest = int(self.shares.argmin())
            raise ValueError(
                f"data.datasets: weight {weights[smallest]:g} is less than 1/{self.ROUND} of the sum; raise it, or leave the data "
                "set out."
            )

    def _make(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Of a round: the data set of each batch, and how many of the round's batches before it are of that set."""
        order = keyed_rng("order", self.seed, epoch, 6).permutation(np.repeat(np.arange(len(self.shares)), self.shares))
        before = np.zeros(self.ROUND, np.int64)
        for number in range(len(self.shares)):
            mine = np.flatnonzero(order == number)
            before[mine] = np.arange(len(mine))
        return order, before

    def batch(self, step: int) -> list[SampleRef]:
        """The samples of the next `draws` batches."""
        found: list[SampleRef] = []
        for position in range(step * self.draws, (step + 1) * self.draws):
            epoch, offset = divmod(position, self.ROUND)
            order, before = self._of(epoch)
            number = int(order[offset])
            drawn = self.samplers[number].batch(epoch * int(self.shares[number]) + int(before[offset]))
            found += [ref._replace(sample=ref.sample + self.starts[number]) for ref in drawn]
        return found

    def candidates(self, size: ClipSize | None) -> Sequence[int] | np.ndarray:
        """The samples of all data sets that may be loaded at `size`."""
        pairs = zip(self.samplers, self.starts, strict=True)
        return np.concatenate([np.asarray(one.candidates(size), np.int64) + start for one, start in pairs])


__getattr__ = legacy.aliases(__name__)

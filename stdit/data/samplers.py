"""Batch samplers: which samples make up a training step, and at what size, as pure functions of (seed, step).

`UniformSampler`: clips of one shape. `BucketSampler`: several shapes, one per step, in batches of about equal cost.
`PackedSampler`: clips of all shapes, packed into sequences of a given number of tokens.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from stdit import legacy
from stdit.rng import keyed_rng


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

    def candidates(self, size: ClipSize | None) -> Sequence[int]:
        """Indices of the samples that may be loaded at `size`; one of them replaces an unreadable sample."""


def sample_index(seed: int, position: int, size: int) -> int:
    """The sample at a position of the endless sequence of shuffled epochs over `size` samples."""
    epoch, offset = divmod(position, size)
    return int(_shuffled(seed, epoch, size)[offset])


@lru_cache(maxsize=2)  # a batch may reach from one epoch into the next
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

    def candidates(self, size: ClipSize | None) -> Sequence[int]:
        """All samples, since they have one size."""
        return range(self.num_samples)


def assign_buckets(shapes: Sequence[tuple[int, int, int]], sizes: Sequence[ClipSize], seed: int) -> list[int | None]:
    """Assign each clip of (frames, height, width) to one of `sizes`; None where the clip is shorter than all of them.

    Among the sizes that are not longer than the clip, those of the nearest aspect ratio are candidates; one is drawn
    at random, keyed by the seed and the clip's index. Sizes of one frame are for images, and for clips that are too
    short for all others.
    """
    buckets: list[int | None] = []
    for index, (frames, height, width) in enumerate(shapes):
        fits = [i for i, size in enumerate(sizes) if size.frames <= frames]
        fits = [i for i in fits if sizes[i].frames > 1] or fits
        if not fits:
            buckets.append(None)
            continue
        distances = [abs(math.log(width / height) - math.log(sizes[i].width / sizes[i].height)) for i in fits]
        nearest = [i for i, distance in zip(fits, distances, strict=True) if distance < min(distances) + 1e-6]
        buckets.append(int(keyed_rng("order", seed, index, 1).choice(nearest)))
    return buckets


def _check_any_assigned(buckets: Sequence[int | None]) -> None:
    if all(bucket is None for bucket in buckets):
        raise ValueError("none of the clips is long enough for any of data.sizes; add a size with fewer frames.")


class BucketSampler:
    """Batches of one size each, of as many clips as fit into `tokens`, in multiples of `processes`.

    buckets: for each sample its index into `sizes`, or None to leave it out (`assign_buckets`). costs: tokens of one
    clip of each size. An epoch covers every clip; the last batch of a bucket is filled up with clips from its start. A
    batch has no more clips than its bucket.
    """

    def __init__(
        self,
        seed: int,
        buckets: Sequence[int | None],
        sizes: Sequence[ClipSize],
        costs: Sequence[int],
        tokens: int,
        processes: int = 1,
    ):
        _check_any_assigned(buckets)
        self.seed, self.sizes = seed, list(sizes)
        self.members = [[i for i, bucket in enumerate(buckets) if bucket == number] for number in range(len(sizes))]
        most = [max(1, tokens // (cost * processes)) for cost in costs]
        held = [-(-len(members) // processes) for members in self.members]
        self.batch_sizes = [max(1, min(pair)) * processes for pair in zip(most, held, strict=True)]
        # The bucket of every batch of an epoch, before shuffling.
        self.plan = [
            bucket
            for bucket, members in enumerate(self.members)
            for _ in range(-(-len(members) // self.batch_sizes[bucket]))
        ]

    def batch(self, step: int) -> list[SampleRef]:
        """The samples of a step, all of one size."""
        epoch, offset = divmod(step, len(self.plan))
        position = int(_shuffled(self.seed, epoch, len(self.plan))[offset])
        bucket = self.plan[position]
        number = position - self.plan.index(bucket)  # among the batches of this bucket
        members, count = self.members[bucket], self.batch_sizes[bucket]
        order = keyed_rng("order", self.seed, epoch, bucket, 2).permutation(len(members))
        picked = [members[order[i % len(members)]] for i in range(number * count, (number + 1) * count)]
        return [SampleRef(index, self.sizes[bucket]) for index in picked]

    def candidates(self, size: ClipSize | None) -> Sequence[int]:
        """The samples of the bucket of `size`."""
        return self.members[self.sizes.index(size)] if size is not None else []


class PackedSampler:
    """Batches of clips of all sizes, packed without padding.

    Each process has one sequence of at most `tokens` / `processes` tokens per step. The arguments are those of
    `BucketSampler`. An epoch covers every clip once.
    """

    def __init__(
        self,
        seed: int,
        buckets: Sequence[int | None],
        sizes: Sequence[ClipSize],
        costs: Sequence[int],
        tokens: int,
        processes: int = 1,
    ):
        _check_any_assigned(buckets)
        self.seed, self.sizes = seed, list(sizes)
        self.buckets = {i: bucket for i, bucket in enumerate(buckets) if bucket is not None}
        self._samples = tuple(self.buckets)
        self._costs = tuple(costs[bucket] for bucket in self.buckets.values())
        self.tokens, self.processes = tokens // processes, processes
        self._epoch_starts = [0]  # the first step of each epoch; grows when later steps are asked for
        if max(costs) > self.tokens:
            raise ValueError(
                f"a clip of {max(costs)} tokens does not fit into a pack of {self.tokens} (train.tokens over "
                f"{processes} process(es)); use train.tokens={max(costs) * processes} or more."
            )

    def _packs(self, epoch: int) -> list[list[int]]:
        return _packed(self.seed, epoch, self._samples, costs=self._costs, tokens=self.tokens)

    def batch(self, step: int) -> list[SampleRef]:
        """The samples of a step: number p + i * processes is the i-th clip of process p.

        The shortest pack of the step limits how many clips every process takes.
        """
        while self._epoch_starts[-1] <= step:
            num_packs = len(self._packs(len(self._epoch_starts) - 1))
            self._epoch_starts.append(self._epoch_starts[-1] + -(-num_packs // self.processes))
        epoch = next(e for e in range(len(self._epoch_starts)) if self._epoch_starts[e + 1] > step)
        packs = self._packs(epoch)
        first = (step - self._epoch_starts[epoch]) * self.processes
        by_process = [packs[(first + p) % len(packs)] for p in range(self.processes)]
        picked = [by_process[p][i] for i in range(min(map(len, by_process))) for p in range(self.processes)]
        return [SampleRef(index, self.sizes[self.buckets[index]]) for index in picked]

    def candidates(self, size: ClipSize | None) -> Sequence[int]:
        """The samples that are packed at `size`."""
        return [i for i, bucket in self.buckets.items() if self.sizes[bucket] == size]


@lru_cache(maxsize=2)  # the loader asks for the steps of one epoch in turn
def _packed(seed: int, epoch: int, samples: tuple[int, ...], costs: tuple[int, ...], tokens: int) -> list[list[int]]:
    """An epoch's samples in shuffled order; a new pack begins whenever the next clip does not fit into the last."""
    packs: list[list[int]] = [[]]
    free = tokens
    for i in keyed_rng("order", seed, epoch, 3).permutation(len(samples)):
        if costs[i] > free:
            packs.append([])
            free = tokens
        packs[-1].append(samples[i])
        free -= costs[i]
    return packs


__getattr__ = legacy.aliases(__name__)

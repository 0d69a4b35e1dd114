"""Which samples make up a step, and at what size: pure functions of (seed, step), whatever ran before.

Clips of one shape (`Uniform`), buckets of several shapes with batches of equal cost (`Buckets`), or clips of all shapes
packed into a row of a given length (`Packs`).
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from stdit.rng import keyed_rng


class Size(NamedTuple):
    """What a clip is cut to."""

    frames: int
    height: int
    width: int


class SampleRef(NamedTuple):
    """A sample's number and its size (None: the one of the config)."""

    sample: int
    size: Size | None


class BatchSampler(Protocol):
    """`batch(step)`: every slot of a step, over all processes. `others(size)`: samples that could stand in for one."""

    def batch(self, step: int) -> list[SampleRef]: ...
    def others(self, size: Size | None) -> Sequence[int]: ...


def sample_index(seed: int, position: int, size: int) -> int:
    """The sample at a position of the endless sequence of shuffled epochs."""
    epoch, place = divmod(position, size)
    return int(_shuffled(seed, epoch, size)[place])


@lru_cache(maxsize=2)
def _shuffled(seed: int, epoch: int, size: int) -> np.ndarray:
    return keyed_rng("order", seed, epoch).permutation(size)


class UniformSampler:
    """`batch_size` clips of the config's size a step."""

    def __init__(self, seed: int, samples: int, batch_size: int):
        self.seed, self.samples, self.batch_size = seed, samples, batch_size

    def batch(self, step: int) -> list[SampleRef]:
        first = step * self.batch_size
        return [SampleRef(sample_index(self.seed, first + i, self.samples), None) for i in range(self.batch_size)]

    def others(self, size: Size | None) -> Sequence[int]:
        return range(self.samples)


def assign(shapes: Sequence[tuple[int, int, int]], sizes: Sequence[Size], seed: int) -> list[int | None]:
    """For each clip of (frames, height, width) the size it is trained at; None where no size is short enough.

    The nearest aspect, and of the lengths that fit into the clip one by lot (of the seed and the clip's number).
    """
    chosen: list[int | None] = []
    for index, (frames, height, width) in enumerate(shapes):
        fits = [i for i, size in enumerate(sizes) if size.frames <= frames]
        if not fits:
            chosen.append(None)
            continue
        gaps = [abs(math.log(width / height) - math.log(sizes[i].width / sizes[i].height)) for i in fits]
        nearest = [i for i, gap in zip(fits, gaps, strict=True) if gap < min(gaps) + 1e-6]
        chosen.append(int(keyed_rng("order", seed, index, 1).choice(nearest)))
    return chosen


class BucketSampler:
    """One size a step; each batch as many clips as `tokens` allows, a multiple of `processes`.

    An epoch takes every clip; the last batch of a bucket is filled up with clips of its beginning.
    """

    def __init__(
        self,
        seed: int,
        chosen: Sequence[int | None],
        sizes: Sequence[Size],
        costs: Sequence[int],
        tokens: int,
        processes: int = 1,
    ):
        self.seed, self.sizes = seed, list(sizes)
        self.members = [[i for i, size in enumerate(chosen) if size == number] for number in range(len(sizes))]
        self.counts = [max(1, tokens // (cost * processes)) * processes for cost in costs]
        self.plan = [g for g, of in enumerate(self.members) for _ in range(-(-len(of) // self.counts[g]))]
        if not self.plan:
            raise ValueError("none of the clips is long enough for any of data.sizes; add a shorter one.")

    def batch(self, step: int) -> list[SampleRef]:
        epoch, place = divmod(step, len(self.plan))
        which = int(_shuffled(self.seed, epoch, len(self.plan))[place])
        group = self.plan[which]
        number = which - self.plan.index(group)  # of the group's batches
        members, count = self.members[group], self.counts[group]
        order = keyed_rng("order", self.seed, epoch, group, 2).permutation(len(members))
        picked = [members[order[i % len(members)]] for i in range(number * count, (number + 1) * count)]
        return [SampleRef(index, self.sizes[group]) for index in picked]

    def others(self, size: Size | None) -> Sequence[int]:
        return self.members[self.sizes.index(size)] if size is not None else []


class PackedSampler:
    """Clips of all sizes, as many a step as fit into `tokens`, one sequence a process without padding."""

    def __init__(
        self,
        seed: int,
        chosen: Sequence[int | None],
        sizes: Sequence[Size],
        costs: Sequence[int],
        tokens: int,
        processes: int = 1,
    ):
        self.seed, self.sizes, self.chosen, self.costs = seed, list(sizes), list(chosen), list(costs)
        self.usable = [i for i, size in enumerate(chosen) if size is not None]
        self.tokens, self.processes = tokens // processes, processes
        self._starts = [0]  # the step at which each epoch begins
        if not self.usable:
            raise ValueError("none of the clips is long enough for any of data.sizes; add a shorter one.")
        if max(costs) > self.tokens:
            raise ValueError(
                f"a clip of {max(costs)} tokens does not fit into a pack of {self.tokens} (train.tokens over "
                f"{processes} process(es)); use train.tokens={max(costs) * processes} or more."
            )

    def _epoch(self, epoch: int) -> list[list[int]]:
        return _filled(self.seed, epoch, tuple(self.usable), tuple(self.chosen), tuple(self.costs), self.tokens)

    def batch(self, step: int) -> list[SampleRef]:
        """Slot p + i * processes is the i-th clip of process p; the shortest pack of a step says how many there are."""
        while self._starts[-1] <= step:
            self._starts.append(self._starts[-1] + -(-len(self._epoch(len(self._starts) - 1)) // self.processes))
        epoch = next(e for e in range(len(self._starts)) if self._starts[e + 1] > step)
        packs = self._epoch(epoch)
        first = (step - self._starts[epoch]) * self.processes
        mine = [packs[(first + p) % len(packs)] for p in range(self.processes)]
        picked = [mine[p][i] for i in range(min(map(len, mine))) for p in range(self.processes)]
        return [SampleRef(index, self.sizes[self.chosen[index] or 0]) for index in picked]

    def others(self, size: Size | None) -> Sequence[int]:
        return [i for i in self.usable if self.sizes[self.chosen[i] or 0] == size]


@lru_cache(maxsize=2)
def _filled(seed: int, epoch: int, usable: tuple, chosen: tuple, costs: tuple, tokens: int) -> list[list[int]]:
    """An epoch's clips in shuffled order, cut whenever the next would not fit."""
    packs: list[list[int]] = [[]]
    room = tokens
    for place in keyed_rng("order", seed, epoch, 3).permutation(len(usable)):
        index = usable[place]
        cost = costs[chosen[index]]
        if cost > room:
            packs.append([])
            room = tokens
        packs[-1].append(index)
        room -= cost
    return packs

"""The loss on held-out clips with fixed noise and levels, measured now and then during a run."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from stdit.data.base import Dataset
from stdit.data.loader import Batch, KeyedSamples, collate
from stdit.data.samplers import ClipSize, SampleRef
from stdit.data.workers import WorkerPool

DRAWS = 64  # clips that are measured, each with a noise and a level; fewer clips are measured several times each
TOGETHER = 8  # draws of one step, by which they are keyed, whatever the number of processes or the size of a batch
_CLIPS_BETWEEN = 64 * DRAWS  # clips trained on between two measurements, which then cost less than 2 % of the time
_STEPS_BETWEEN = 50  # at least
_FIRST_STEP = 1 << 30  # the keys of draws are those of steps that no run takes


class HeldOutDraws:
    """The draws of a held-out loss; they are read once and kept in memory.

    Crop, noise, level and known frames of a draw are functions of its key, as in training. sizes: for each clip the
    size it is measured at (None: that of the config); clips that fit no size are left out of it. together: draws in a
    batch, at most TOGETHER. decoder_process, timeout: whether files are read in a process of its own, as in `WorkerPool`.
    """

    def __init__(
        self,
        dataset: Dataset,
        sizes: dict[int, ClipSize | None],
        seed: int,
        *,
        together: int = TOGETHER,
        decoder_process: bool = False,
        timeout: float = 60.0,
    ):
        self._order = _FixedOrder(sizes)
        self._parts = [
            [(_FIRST_STEP + number, slot) for slot in range(first, min(first + together, len(group)))]
            for number, group in enumerate(self._order.groups)
            for first in range(0, len(group), together)
        ]
        self._samples = KeyedSamples(dataset, seed, self._order)
        self._batches: dict[int, Batch] = {}
        self._decoder_process, self._timeout = decoder_process, timeout

    def losses(
        self,
        loss: Callable[[Batch], Tensor],
        *,
        process: int = 0,
        processes: int = 1,
        set_aside: dict[str, str] | None = None,
    ) -> Tensor:
        """The losses (draws,) on the CPU, 0 for the draws of other processes; loss: a batch -> (B,).

        It is called as often in every process, since those of a sharded model compute together.
        set_aside: name -> reason of files that are not opened; those that crash or stall their process are added.
        """
        parts = self._parts
        mine = [process + i * processes for i in range(-(-len(parts) // processes))]
        read = [number % len(parts) for number in mine]  # the last of some processes is another's, and does not count
        if not self._batches:
            samples = self._read(read, {} if set_aside is None else set_aside)
            self._batches = {number: collate(found) for number, found in zip(read, samples, strict=True)}
        measured = [loss(self._batches[number]).float().cpu() for number in read]
        found = dict(zip(mine, measured, strict=True))
        zeros = {number: torch.zeros(len(part)) for number, part in enumerate(parts)}
        return torch.cat([found.get(number, zeros[number]) for number in zeros])

    def _read(self, numbers: Sequence[int], set_aside: dict[str, str]) -> list[list[dict[str, Any]]]:
        """The samples of each batch."""
        keys = [self._parts[number] for number in numbers]
        if not self._decoder_process:
            return [[self._samples.load(key, set_aside, lambda name: None) for key in group] for group in keys]
        with closing(WorkerPool(self._samples, 1, self._timeout, set_aside)) as pool:
            return list(pool.batches(iter(keys)))


class _FixedOrder:
    """A batch sampler whose steps are groups of the draws of a held-out loss, each of one size."""

    def __init__(self, sizes: dict[int, ClipSize | None]):
        self._sizes = sizes
        samples = list(sizes)
        picked = [samples[i * len(samples) // DRAWS] for i in range(DRAWS)]
        by_size: dict[ClipSize | None, list[SampleRef]] = defaultdict(list)
        for sample in picked:
            by_size[sizes[sample]].append(SampleRef(sample, sizes[sample]))
        self.groups = [
            refs[first : first + TOGETHER] for refs in by_size.values() for first in range(0, len(refs), TOGETHER)
        ]

    def batch(self, step: int) -> list[SampleRef]:
        """The draws of one step."""
        return self.groups[step - _FIRST_STEP]

    def candidates(self, size: ClipSize | None) -> Sequence[int]:
        """The clips that are measured at `size`."""
        return [sample for sample, own in self._sizes.items() if own == size]


def steps_between(clips_per_step: int) -> int:
    """Steps between two measurements."""
    return max(_STEPS_BETWEEN, -(-_CLIPS_BETWEEN // clips_per_step))

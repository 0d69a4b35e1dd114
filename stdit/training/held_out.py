"""The loss on held-out clips with fixed noise and levels, measured now and then during a run."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stdit.data.base import Dataset
from stdit.data.loader import Batch, KeyedSamples, collate
from stdit.data.samplers import ClipSize, SampleRef

DRAWS = 64  # clips that are measured, each with a noise and a level; fewer clips are measured several times each
TOGETHER = 8  # draws in a batch, whatever the number of processes, so that their losses stay the same
_CLIPS_BETWEEN = 64 * DRAWS  # clips trained on between two measurements, which then cost less than 2 % of the time
_STEPS_BETWEEN = 50  # at least
_FIRST_STEP = 1 << 30  # the keys of draws are those of steps that no run takes


class HeldOutDraws:
    """The draws of a held-out loss; they are read once and kept in memory.

    Crop, noise, level and known frames of a draw are functions of its key, as in training. sizes: for each clip the
    size it is measured at (None: that of the config); clips that fit no size are left out of it.
    """

    def __init__(self, dataset: Dataset, sizes: dict[int, ClipSize | None], seed: int):
        self._order = _FixedOrder(sizes)
        self._samples = KeyedSamples(dataset, seed, self._order)
        self._batches: dict[int, Batch] = {}

    def losses(self, loss: Callable[[Batch], Tensor], *, process: int, processes: int) -> Tensor:
        """The losses (draws,) on the CPU, 0 for the draws of other processes; loss: a batch -> (B,)."""
        parts = []
        for number, group in enumerate(self._order.groups):
            mine = number % processes == process
            parts.append(loss(self._batch(number)).float().cpu() if mine else torch.zeros(len(group)))
        return torch.cat(parts)

    def _batch(self, number: int) -> Batch:
        if number not in self._batches:
            step = _FIRST_STEP + number
            slots = range(len(self._order.groups[number]))
            self._batches[number] = collate([self._samples[step, slot] for slot in slots])
        return self._batches[number]


class _FixedOrder:
    """A batch sampler whose steps are the batches of a held-out loss, each of one size."""

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
        """The draws of one batch."""
        return self.groups[step - _FIRST_STEP]

    def candidates(self, size: ClipSize | None) -> Sequence[int]:
        """The clips that are measured at `size`."""
        return [sample for sample, own in self._sizes.items() if own == size]


def steps_between(clips_per_step: int) -> int:
    """Steps between two measurements."""
    return max(_STEPS_BETWEEN, -(-_CLIPS_BETWEEN // clips_per_step))

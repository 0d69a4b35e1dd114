"""Batches whose content is a pure function of (seed, step, slot), whatever the number of workers and processes."""

import signal
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from stdit.data.datasets import Dataset
from stdit.data.video_io import VideoError
from stdit.keys import keyed_rng

_ATTEMPTS = 64


class Batch(NamedTuple):
    """pixels (B, F, H, W, 3) uint8 or latents (B, C, T, h, w), the other None; labels (B,), -1 where there is none.

    restarts: beside cached latents, every frame encoded without those before it (see `VideoVAE.encode_run`).
    keys: (seed, step, slot) of each sample; bad: names of files that could not be read, with the reason.
    """

    pixels: Tensor | None
    latents: Tensor | None
    restarts: Tensor | None
    labels: Tensor
    keys: list[tuple[int, int, int]]
    bad: dict[str, str]


def sample_index(seed: int, position: int, size: int) -> int:
    """The sample at a position of the endless sequence of shuffled epochs."""
    epoch, place = divmod(position, size)
    return int(_order(seed, epoch, size)[place])


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    return keyed_rng("order", seed, epoch).permutation(size)


class KeyedSamples(torch.utils.data.Dataset):
    """Samples by (step, slot). An unreadable file is replaced by another, the same one in every run."""

    def __init__(self, dataset: Dataset, seed: int, batch_size: int):
        self.dataset, self.seed, self.batch_size = dataset, seed, batch_size
        self._bad: dict[int, str] = {}

    def __getitem__(self, key: tuple[int, int]) -> dict:
        step, slot = key
        position, bad = step * self.batch_size + slot, {}
        for attempt in range(_ATTEMPTS):
            if attempt:
                position = int(keyed_rng("sample", self.seed, step, slot, attempt).integers(2**40))
            index = sample_index(self.seed, position, len(self.dataset))
            try:
                if index in self._bad:  # found before by this worker: same outcome, no second try
                    raise VideoError(self._bad[index])
                sample = self.dataset.load(index, keyed_rng("sample", self.seed, step, slot))
            except VideoError as error:
                self._bad[index] = bad[self.dataset.name(index)] = str(error)
                continue
            label = self.dataset.label(index)
            return {**sample, "label": -1 if label is None else label, "key": (self.seed, step, slot), "bad": bad}
        raise ValueError(f"{len(bad)} files in a row could not be read; the last: {list(bad.values())[-1]}")


def collate(samples: list[dict]) -> Batch:
    def stack(name: str) -> Tensor | None:
        return torch.stack([sample[name] for sample in samples]) if name in samples[0] else None

    bad = {name: reason for sample in samples for name, reason in sample["bad"].items()}
    labels = torch.tensor([sample["label"] for sample in samples])
    return Batch(
        stack("pixels"), stack("latents"), stack("restarts"), labels, [sample["key"] for sample in samples], bad
    )


def batches(
    dataset: Dataset,
    seed: int,
    batch_size: int,
    start_step: int = 0,
    micro_batch: int | None = None,
    process: int = 0,
    processes: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """Endless micro-batches of this process, from `start_step` on.

    `batch_size` counts clips of a step over all processes; process p takes every slot equal to p modulo `processes`,
    `micro_batch` slots at a time.
    """
    slots = list(range(process, batch_size, processes))
    size = micro_batch or len(slots)

    def keys() -> Iterator[list[tuple[int, int]]]:
        step = start_step
        while True:
            for first in range(0, len(slots), size):
                yield [(step, slot) for slot in slots[first : first + size]]
            step += 1

    loader = DataLoader(
        KeyedSamples(dataset, seed, batch_size),
        batch_sampler=_Endless(keys),
        collate_fn=collate,
        num_workers=workers,
        # A live decoder does not survive fork.
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_quiet_worker,
        timeout=300 if workers else 0,
    )
    return iter(loader)


class _Endless:
    def __init__(self, keys):
        self.keys = keys

    def __iter__(self):
        return self.keys()


def _quiet_worker(_: int) -> None:
    """The main process decides what an interrupt means; one thread a worker, so that many do not fight."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)

"""Batches whose content is a pure function of (seed, step, slot), whatever the number of workers and processes."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stdit.conditions import ClipFacts, collate_conditions, read_conditions
from stdit.data.datasets import Dataset
from stdit.data.samplers import BatchSampler, SampleRef, UniformSampler
from stdit.data.video_io import VideoError
from stdit.data.workers import WorkerPool
from stdit.rng import keyed_rng
from stdit.text import Encoded

CaptionReader = Callable[[str], Encoded]
_ATTEMPTS = 64  # unreadable files in a row, after which loading fails


class Batch(NamedTuple):
    """A micro-batch of clips, as pixels or as cached latents.

    pixels: (B, F, H, W, 3) uint8, or None. latents: (B, C, T, h, w), or None. Both are lists if clips have different
    shapes. reencoded: with cached latents, every frame encoded without those before it (see `VideoVAE.encode_segment`),
    or None. conditions: collated values by the name of their conditioner. keys: (seed, step, slot) of each sample. bad:
    names of files that could not be read, with the reason. total: clips per step over all processes. captions: tokens of
    captions that were read with the clips.
    """

    pixels: Tensor | list[Tensor] | None
    latents: Tensor | list[Tensor] | None
    reencoded: Tensor | list[Tensor] | None
    conditions: dict[str, Any]
    keys: list[tuple[int, int, int]]
    bad: dict[str, str]
    total: int
    captions: Mapping[str, Encoded] = {}


class KeyedSamples:
    """Samples by (step, slot). An unreadable file is replaced by another of its size, the same one in every run.

    captions: reads the tokens of a caption, here instead of in the process that trains.
    """

    def __init__(self, dataset: Dataset, seed: int, order: BatchSampler, captions: CaptionReader | None = None):
        self.dataset, self.seed, self.order, self.captions = dataset, seed, order, captions
        self._bad: dict[str, str] = {}
        self._last: tuple[int, list[SampleRef]] = (-1, [])

    def slots(self, step: int) -> list[SampleRef]:
        """Every sample of a step, over all processes."""
        if self._last[0] != step:
            self._last = (step, self.order.batch(step))
        return self._last[1]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """The sample of (step, slot)."""
        return self.load(key, {}, lambda name: None)

    def load(
        self, key: tuple[int, int], set_aside: Mapping[str, str], reading: Callable[[str], None]
    ) -> dict[str, Any]:
        """The sample of (step, slot), never from the files in `set_aside` (name -> reason).

        `reading(name)` is called before each file that is opened. ValueError if one file after another cannot be read.
        """
        step, slot = key
        slots, bad = self.slots(step), {}
        index, size = slots[slot]
        for attempt in range(_ATTEMPTS):
            if attempt:
                candidates = self.order.candidates(size)
                index = int(
                    candidates[int(keyed_rng("sample", self.seed, step, slot, attempt).integers(len(candidates)))]
                )
            name = self.dataset.name(index)
            try:
                known = set_aside.get(name) or self._bad.get(name)
                if known:  # found before: the same outcome, no second try
                    raise VideoError(known)
                reading(name)
                sample = self.dataset.load(index, keyed_rng("sample", self.seed, step, slot), size)
                conditions = conditions_of_sample(self.dataset, index, sample)  # a table may be what is damaged
            except VideoError as error:
                self._bad[name] = bad[name] = str(error)
                continue
            text = conditions.get("caption")
            captions = {text: self.captions(text)} if text and self.captions is not None else {}
            found = {**sample, "conditions": conditions, "captions": captions}
            return {**found, "key": (self.seed, step, slot), "bad": bad, "total": len(slots)}
        raise ValueError(f"{len(bad)} files in a row could not be read; the last: {list(bad.values())[-1]}")


def conditions_of_sample(dataset: Dataset, index: int, sample: dict[str, Any]) -> dict[str, Any]:
    """Raw conditions of a loaded sample: those that a cache holds, or what the conditioners read from its record."""
    if "conditions" in sample:
        return sample["conditions"]
    return read_conditions(dataset.record(index), sample.get("clip") or ClipFacts(dataset.shape(index), 1.0))


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Collate samples of one step to a batch."""

    def stack(name: str) -> Tensor | list[Tensor] | None:
        if name not in samples[0]:
            return None
        values = [sample[name] for sample in samples]
        return torch.stack(values) if len({value.shape for value in values}) == 1 else values

    return Batch(
        pixels=stack("pixels"),
        latents=stack("latents"),
        reencoded=stack("reencoded"),
        conditions=collate_conditions([sample["conditions"] for sample in samples]),
        keys=[sample["key"] for sample in samples],
        bad={name: reason for sample in samples for name, reason in sample["bad"].items()},
        total=samples[0]["total"],
        captions={text: found for sample in samples for text, found in sample["captions"].items()},
    )


def batches(
    dataset: Dataset,
    seed: int,
    batch_size: int,
    start_step: int = 0,
    *,
    micro_batch: int | None = None,
    process: int = 0,
    processes: int = 1,
    workers: int = 0,
    order: BatchSampler | None = None,
    timeout: float = 60.0,
    set_aside: dict[str, str] | None = None,
    captions: CaptionReader | None = None,
) -> Generator[Batch, None, None]:
    """Endless micro-batches of this process, from `start_step` on.

    `batch_size` counts clips per step over all processes, unless an `order` says otherwise; process p takes every slot
    equal to p modulo `processes`, `micro_batch` slots at a time. `close()` ends the worker processes. timeout,
    set_aside: see `WorkerPool`. captions: see `KeyedSamples`.
    """
    order = order or UniformSampler(seed, len(dataset), batch_size)
    samples = KeyedSamples(dataset, seed, order, captions)
    set_aside = {} if set_aside is None else set_aside

    def keys() -> Iterator[list[tuple[int, int]]]:
        step = start_step
        while True:
            slots = range(process, len(samples.slots(step)), processes)
            size = micro_batch or len(slots)
            for first in range(0, len(slots), size):
                yield [(step, slot) for slot in slots[first : first + size]]
            step += 1

    if workers:
        with closing(WorkerPool(samples, workers, timeout, set_aside)) as pool:
            yield from map(collate, pool.batches(keys()))
    else:
        for group in keys():
            yield collate([samples.load(key, set_aside, lambda name: None) for key in group])

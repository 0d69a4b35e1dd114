"""Latents encoded once, read as they are."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from stdit.conditions import ClipFacts, read_conditions
from stdit.data.config import DataConfig
from stdit.data.samplers import ClipSize
from stdit.data.video_io import VideoError

# Tensors of caches that version 0.1.0 wrote, and what they are called now.
_RENAMED = {"restarts": "reencoded"}


class CachedLatents:
    """What `cache_latents` wrote: shards of normalised latents, with the fingerprint of their VAE.

    Beside each clip's latents (C, T, h, w) stands `reencoded`: every frame encoded without those before it. A shard's
    record holds labels, captions and the raw values of further conditions.
    """

    def __init__(self, root: Path, config: DataConfig):
        self.root, self.info = root, json.loads((root / "cache.json").read_text())
        self.num_classes, self.class_names = self.info["num_classes"], self.info["class_names"]
        size = (self.info["num_frames"], self.info["height"], self.info["width"])
        asked = (config.num_frames, config.height, config.width)
        if size != asked:
            raise ValueError(
                f"the latents in {str(root)!r} are of (frames, height, width) {size}, the config asks for {asked}; set "
                "data.num_frames, height and width to theirs, or cache again."
            )
        self._starts = np.cumsum([0] + [shard["count"] for shard in self.info["shards"]])
        self._records = [record for shard in self.info["shards"] for record in _records(shard)]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def record(self, index: int) -> dict[str, Any]:
        return self._records[index]

    def name(self, index: int) -> str:
        return f"{self.root}[{index}]"

    def shape(self, index: int) -> tuple[int, int, int]:
        return (self.info["num_frames"], self.info["height"], self.info["width"])

    def load(self, index: int, rng: np.random.Generator, size: ClipSize | None = None) -> dict[str, Any]:
        """Latents (C, T, h, w), reencoded (C, T, h, w) and raw conditions of one clip."""
        cached = ClipSize(*self.shape(index))
        if size is not None and size != cached:
            raise ValueError(
                f"{self.root} holds latents of {tuple(cached)} alone; train buckets from the clips themselves."
            )
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        file = self._shard(shard)
        row = index - int(self._starts[shard])
        sample = {_RENAMED.get(name, name): file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118 (no mapping)
        if not all(torch.isfinite(value).all() for value in sample.values()):
            raise VideoError(f"{self.name(index)} is not finite; cache the latents again.")
        record = self._records[index]
        read = read_conditions(record, ClipFacts(cached, self.info["fps"] or 8.0))
        return {**sample, "conditions": {**read, **record.get("conditions", {})}}

    def _shard(self, number: int):
        if number not in self._open_shards:
            file = self.root / self.info["shards"][number]["file"]
            if not file.is_file():
                raise ValueError(f"{file} is missing; run cache_latents again with the same --output.")
            self._open_shards[number] = safe_open(file, framework="pt")
        return self._open_shards[number]

    @cached_property
    def _open_shards(self) -> dict:
        return {}

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_open_shards"}


def _records(shard: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of a shard's clips; caches made before captions were kept have none."""
    count = shard["count"]
    captions = shard.get("captions", [""] * count)
    further = shard.get("conditions", [{}] * count)
    return [
        {"label": label, "caption": caption, "conditions": conditions}
        for label, caption, conditions in zip(shard["labels"], captions, further, strict=True)
    ]

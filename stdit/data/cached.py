"""A dataset of latents that `cache_latents` encoded in advance."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from stdit.conditions import ClipFacts, read_conditions
from stdit.data.base import Annotated
from stdit.data.config import DataConfig
from stdit.data.samplers import ClipSize
from stdit.data.video_io import VideoError

# Tensor names in caches of version 0.1.0, and their current names.
_RENAMED = {"restarts": "reencoded"}


class CachedLatents(Annotated):
    """Normalised latents in shards, as `cache_latents` writes them, with the fingerprint of their VAE.

    Each clip has `latents` (C, T, h, w), and `reencoded` (C, T, h, w), in which every latent frame is encoded without
    the frames before it. cache.json holds labels, captions and the raw values of further conditions.
    """

    decodes = False

    def __init__(self, root: Path, config: DataConfig):
        self.root, self.info = root, json.loads((root / "cache.json").read_text())
        self.num_classes, self.class_names = self.info["num_classes"], self.info["class_names"]
        size = (self.info["num_frames"], self.info["height"], self.info["width"])
        asked = (config.num_frames, config.height, config.width)
        if size != asked:
            raise ValueError(
                f"the latents in {str(root)!r} are of (frames, height, width) {size}, but the config asks for {asked}; set "
                "data.num_frames, height and width to those of the latents, or cache again."
            )
        self._starts = np.cumsum([0] + [shard["count"] for shard in self.info["shards"]])
        self._records = [record for shard in self.info["shards"] for record in _records(shard)]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def record(self, index: int) -> dict[str, Any]:
        """Label, caption and further conditions of a clip, from cache.json."""
        return self._records[index]

    def name(self, index: int) -> str:
        """The folder of the cache and the number of the clip."""
        return f"{self.root}[{index}]"

    def shape(self, index: int) -> tuple[int, int, int]:
        """The (frames, height, width) in pixels that all clips were encoded at."""
        return (self.info["num_frames"], self.info["height"], self.info["width"])

    def load(self, index: int, rng: np.random.Generator, size: ClipSize | None = None) -> dict[str, Any]:
        """Read the latents (C, T, h, w), reencoded (C, T, h, w) and raw conditions of one clip."""
        cached = ClipSize(*self.shape(index))
        if size is not None and size != cached:
            raise ValueError(
                f"{self.root} holds latents of size {tuple(cached)} only, got {tuple(size)}; train buckets from the clips themselves."
            )
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        file = self._shard(shard)
        row = index - int(self._starts[shard])
        sample = {_RENAMED.get(name, name): file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118 (no mapping)
        if not all(torch.isfinite(value).all() for value in sample.values()):
            raise VideoError(f"{self.name(index)} has values that are not finite; cache the latents again.")
        record = self._records[index]
        read = read_conditions(record, ClipFacts(cached, self.info["fps"] or 8.0))
        return {**sample, "conditions": {**read, **record.get("conditions", {})}}

    def _shard(self, number: int) -> Any:
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
    """The records of a shard's clips; caches of early versions have neither captions nor conditions."""
    count = shard["count"]
    captions = shard.get("captions", [""] * count)
    further = shard.get("conditions", [{}] * count)
    return [
        {"label": label, "caption": caption, "conditions": conditions}
        for label, caption, conditions in zip(shard["labels"], captions, further, strict=True)
    ]

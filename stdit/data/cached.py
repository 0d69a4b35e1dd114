"""Latents encoded once, read as they are."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from stdit.data.config import DataConfig, micro_conditions_of
from stdit.data.samplers import ClipSize
from stdit.data.video_io import VideoError


class CachedLatents:
    """What `tools/cache_latents.py` wrote: shards of normalised latents, with the fingerprint of their VAE."""

    def __init__(self, root: Path, config: DataConfig):
        self.root, self.info = root, json.loads((root / "cache.json").read_text())
        self.num_classes, self.class_names = self.info["num_classes"], self.info["class_names"]
        made = (self.info["num_frames"], self.info["height"], self.info["width"])
        asked = (config.num_frames, config.height, config.width)
        if made != asked:
            raise ValueError(
                f"the latents in {str(root)!r} are of (frames, height, width) {made}, the config asks for {asked}; set data.num_frames, height and width to theirs, or cache again."
            )
        self._starts = np.cumsum([0] + [shard["count"] for shard in self.info["shards"]])
        self._labels = [label for shard in self.info["shards"] for label in shard["labels"]]
        # Latents that were cached before captions were kept have none.
        self._captions = [
            text for shard in self.info["shards"] for text in shard.get("captions", [""] * shard["count"])
        ]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def label(self, index: int) -> int | None:
        return self._labels[index]

    def caption(self, index: int) -> str:
        return self._captions[index]

    def name(self, index: int) -> str:
        return f"{self.root}[{index}]"

    def shape(self, index: int) -> tuple[int, int, int]:
        return (self.info["num_frames"], self.info["height"], self.info["width"])

    def load(self, index: int, rng: np.random.Generator, size: ClipSize | None = None) -> dict[str, Any]:
        made = ClipSize(*self.shape(index))
        if size is not None and size != made:
            raise ValueError(
                f"{self.root} holds latents of {tuple(made)} alone; train buckets from the clips themselves."
            )
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        file = self._shard(shard)
        row = index - int(self._starts[shard])
        sample = {name: file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118 (no mapping)
        if not all(torch.isfinite(value).all() for value in sample.values()):
            raise VideoError(f"{self.name(index)} is not finite; cache the latents again.")
        return {**sample, "info": micro_conditions_of(made, self.info["fps"] or 8.0)}

    def _shard(self, number: int):
        if number not in self._open_shards:
            file = self.root / self.info["shards"][number]["file"]
            if not file.is_file():
                raise ValueError(f"{file} is missing; run tools/cache_latents.py again with the same --output.")
            self._open_shards[number] = safe_open(file, framework="pt")
        return self._open_shards[number]

    @cached_property
    def _open_shards(self) -> dict:
        return {}

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_open_shards"}

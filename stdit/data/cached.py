"""A dataset of latents that `cache_latents` encoded in advance."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stdit.conditions import ActionSpace, ClipFacts, read_conditions
from stdit.data.base import Annotated, Identity
from stdit.data.columns import Columns, annotation_values
from stdit.data.config import DataConfig
from stdit.data.errors import VideoError
from stdit.data.media import ask_for, open_regular, state_of
from stdit.data.rates import DEFAULT_FPS
from stdit.data.samplers import ClipSize
from stdit.data.stores import is_remote
from stdit.data.tensor_rows import TensorRows, checksum_of, draw_latents
from stdit.hashes import difference

# Tensor names in caches of version 0.1.0, and their current names.
_RENAMED = {"restarts": "reencoded"}
HASHED_AT_START = 1 << 28  # bytes of a cache whose shards are compared with their hashes before a run begins
AGAIN = "run stdit cache-latents again with the same --output."
MOST_OPEN = 64  # shards that a process has open, since a system allows some hundred files


class CachedLatents(Annotated):
    """Normalised latents in shards, as `cache_latents` writes them, with the fingerprint of their VAE.

    Each clip has `latents` (C, T, h, w), and `reencoded` (C, T, h, w), in which every latent frame is encoded without
    the frames before it. A cache of moments also has their standard deviations, `latents_std` and `reencoded_std`, and latents
    are drawn when a clip is loaded. cache.json names the shards, and the table of the clips' labels, captions, further conditions and
    checksums, which a copy in another process maps anew instead of receiving it.
    """

    decodes = False
    fixed_sizes = True

    def __init__(self, root: Path, config: DataConfig):
        self.root, self.info = root, _read_index(root / "cache.json")
        self.num_classes, self.class_names = self.info["num_classes"], self.info["class_names"]
        space = self.info.get("action_space")
        self.action_space = None if space is None else ActionSpace.of(space, f"{root / 'cache.json'}: action_space")
        self._check_sizes(config)
        _check_augmentation(root, self.info, config)
        _check_rate(root, self.rates, config)
        self._check_shards()
        self._starts = np.cumsum([0] + [shard["count"] for shard in self.info["shards"]])
        plain = (self.info["num_frames"], self.info["height"], self.info["width"])
        self._sizes = [ClipSize(*shard.get("size", plain)) for shard in self.info["shards"]]
        self._table = _open_table(root, self.info)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shards(self) -> list[int]:
        """The number of clips in each shard."""
        return [shard["count"] for shard in self.info["shards"]]

    @property
    def rates(self) -> list[float]:
        """The frame rate of the clips, as a list; empty for caches that were written without one."""
        rate = self.info["fps"] or self.info.get("rate")
        return [float(rate)] if rate else []

    def record(self, index: int) -> dict[str, Any]:
        """Label, caption and further conditions of a clip."""
        label, conditions = int(self._table["label"][index]), self._table.text("conditions", index)
        return {
            "label": None if label < 0 else label,
            "caption": self._table.text("caption", index),
            "conditions": json.loads(conditions) if conditions else {},
        }

    def name(self, index: int) -> str:
        """The folder of the cache and the number of the clip."""
        return f"{self.root}[{index}]"

    def identity(self, index: int, *, read: bool = False) -> Identity:
        """The shard and row, what the shard was encoded from, and the annotations of the clip."""
        shard, row = self._place(index)
        record, info = self.record(index), self.info["shards"][shard]
        columns = {**record["conditions"], **{key: self.info.get(key) for key in ("seed", "fps", "crop", "flip")}}
        for name, plain in (("dtype", "float16"), ("posterior", "mean")):  # caches of before have neither
            if self.info.get(name, plain) != plain:
                columns[name] = self.info[name]
        return Identity(
            f"{info['file']}[{row}]", info.get("sources"), record["label"], record["caption"], columns=columns
        )

    def group_of(self, index: int) -> str:
        """The file that a clip comes from, which several of its windows share; caches of before have one name for each clip."""
        return self._table.text("source", index) or self.identity(index).source

    def held_columns(self, index: int) -> dict[str, str]:
        """The values of the columns by which clips can be held out; they are no part of the identity."""
        text = self._table.text("columns", index)
        return json.loads(text) if text else {}

    def captions(self) -> Iterator[str]:
        """The captions of all clips in their order, empty where there is none."""
        return self._table.texts("caption")

    def column_values(self, column: str | None) -> Iterator[Any]:
        """The value of a column for every clip, or the name of the file it comes from; None where it is missing."""
        if column is None:
            return (text or None for text in self._table.texts("source"))
        return annotation_values(self._table, column, self.class_names)

    @property
    def known_fingerprint(self) -> dict[str, Any] | None:
        """The fingerprint of all clips as the cache has it, None in caches of before."""
        return self.info.get("fingerprint")

    def shape(self, index: int) -> tuple[int, int, int]:
        """The (frames, height, width) in pixels that a clip was encoded at."""
        frames, height, width = self._sizes[self._place(index)[0]]
        return frames, height, width

    def shapes(self) -> np.ndarray:
        """The shape of every clip (N, 3)."""
        counts = [shard["count"] for shard in self.info["shards"]]
        return np.repeat(np.array(self._sizes, np.int64).reshape(-1, 3), counts, axis=0)

    def _check_sizes(self, config: DataConfig) -> None:
        """Raise ValueError unless the config asks for the sizes that the clips were encoded at."""
        several = [tuple(size) for size in self.info.get("sizes") or []]
        if several:
            if sorted(several) != sorted(tuple(size) for size in config.sizes):
                given = [list(size) for size in several]
                raise ValueError(
                    f"the latents in {str(self.root)!r} are of the sizes {given}; set data.sizes to these and train.tokens, or "
                    "cache again."
                )
            return
        size = (self.info["num_frames"], self.info["height"], self.info["width"])
        asked = (config.num_frames, config.height, config.width)
        if size != asked:
            raise ValueError(
                f"the latents in {str(self.root)!r} are of (frames, height, width) {size}, but the config asks for {asked}; set "
                "data.num_frames, height and width to those of the latents, or cache again."
            )

    def _check_shards(self) -> None:
        """Raise ValueError if a shard is not as cache.json says, before a run loses anything.

        The hashes of a large cache are not compared, which takes a second for every gigabyte, nor those of one in a store; its
        rows have checksums.
        """
        ask_for(self.root / shard["file"] for shard in self.info["shards"])
        for shard in self.info["shards"]:
            size = state_of(self.root / shard["file"])[0]
            if size < 0 or shard.get("bytes") not in (None, size):
                what = "is missing" if size < 0 else f"has {size} bytes instead of {shard['bytes']}"
                raise ValueError(f"{self.root}: {shard['file']} {what}; {AGAIN}")
        if not is_remote(self.root) and sum(shard.get("bytes", 0) for shard in self.info["shards"]) <= HASHED_AT_START:
            self._compare_hash(*self.info["shards"])

    def _compare_hash(self, *shards: dict[str, Any]) -> None:
        """Raise ValueError unless shards have the hashes of cache.json."""
        if reason := difference(self.root, {shard["file"]: shard for shard in shards}):
            raise ValueError(f"{self.root}: {reason}; {AGAIN}")

    def load(self, index: int, rng: np.random.Generator, size: ClipSize | None = None) -> dict[str, Any]:
        """Read the latents (C, T, h, w), reencoded (C, T, h, w) and raw conditions of one clip."""
        cached = ClipSize(*self.shape(index))
        if size is not None and size != cached:
            raise ValueError(
                f"{self.root} holds latents of size {tuple(cached)} only, got {tuple(size)}; train buckets from the clips themselves."
            )
        shard, row = self._place(index)
        file = self._shard(shard)
        sample = {name: file.row(name, row) for name in file.names()}
        if "checksum" in self._table and checksum_of(sample) != self._table["checksum"][index]:
            raise VideoError(  # the run goes on without this clip
                f"{self.root}: row {row} of {self.info['shards'][shard]['file']} does not match its checksum; {AGAIN}"
            )
        sample = {_RENAMED.get(name, name): value for name, value in sample.items()}
        if "latents_std" in sample:
            noise = rng.standard_normal(tuple(sample["latents"].shape), dtype=np.float32)
            sample = draw_latents(sample, torch.from_numpy(noise))
        if not all(torch.isfinite(value).all() for value in sample.values()):
            raise VideoError(f"{self.name(index)} has values that are not finite; cache the latents again.")
        record = self.record(index)
        read = read_conditions(record, ClipFacts(cached, self.rates[0] if self.rates else DEFAULT_FPS))
        return {**sample, "conditions": {**read, **record["conditions"]}}

    def _place(self, index: int) -> tuple[int, int]:
        """The number of a clip's shard, and its row there."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def _shard(self, number: int) -> TensorRows:
        """An open shard; one of a cache of before, whose rows have no checksums, is compared with its hash."""
        shard = self._open_shards.pop(number, None)
        if shard is None:
            info = self.info["shards"][number]
            file = self.root / info["file"]
            if "checksum" not in self._table and not is_remote(file):
                self._compare_hash(info)
            try:
                shard = TensorRows(file)
            except ValueError as error:
                if state_of(file)[0] < 0:  # no unreadable clip, which a run goes on without
                    raise ValueError(
                        f"{file} is gone: it was removed, or the cache was updated twice since this run began; start the run again, "
                        "which goes on from its last checkpoint."
                    ) from error
                if isinstance(error, VideoError):
                    raise
                raise ValueError(f"{error}; {AGAIN}") from error
            while len(self._open_shards) >= MOST_OPEN:  # the one that was read longest ago closes with its last reader
                with suppress(KeyError, StopIteration, RuntimeError):  # of threads that do the same
                    self._open_shards.pop(next(iter(self._open_shards)))
        self._open_shards[number] = shard
        return shard

    @cached_property
    def _open_shards(self) -> dict[int, TensorRows]:
        """Open shards in the order in which they were read."""
        return {}

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_open_shards"}


def _read_index(path: Path) -> dict[str, Any]:
    """The content of cache.json; ValueError in one line if it is not what `cache_latents` writes."""
    try:
        with open_regular(path) as stream:
            info = json.loads(stream.read())
        for key in ("num_classes", "class_names", "num_frames", "height", "width", "vae", "vae_fingerprint", "fps"):
            info[key]
        for key in ("fps", "rate"):
            if not (info.get(key) is None or isinstance(info[key], int | float)):
                raise ValueError(f"{key} is {info[key]!r}, not a number")
        for shard in info["shards"]:
            if Path(shard["file"]).name != shard["file"]:
                raise ValueError(f"{shard['file']!r} is not the name of a file")
            if "table" not in info and len(shard["labels"]) != shard["count"]:
                raise ValueError(f"{shard['file']} has {shard['count']} clips but {len(shard['labels'])} labels")
            if not all(isinstance(one, dict) for one in shard.get("conditions", [])):
                raise ValueError(f"{shard['file']} has conditions that are no objects")
        if "table" in info and Path(info["table"]).name != info["table"]:
            raise ValueError(f"{info['table']!r} is not the name of a file")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}); {AGAIN}") from error
    return info


def _check_rate(root: Path, rates: list[float], config: DataConfig) -> None:
    if config.fps is not None and rates and abs(config.fps / rates[0] - 1) > 0.01:
        raise ValueError(
            f"data.fps={config.fps:g}, but the clips of {root} were encoded at {rates[0]:g} frames a second; set data.fps={rates[0]:g} "
            "(or null), or cache them again."
        )


def _check_augmentation(root: Path, info: dict[str, Any], config: DataConfig) -> None:
    """Raise ValueError for a mirroring or cropping at random that the latents do not have."""
    had = {"flip": bool(info.get("flip") or info.get("mirrored")), "crop": info.get("crop")}
    for name, plain, remedy in (("flip", False, "cache them again with --mirrored, "), ("crop", "center", "")):
        asked = getattr(config, name)
        if asked not in (plain, had[name]):
            raise ValueError(
                f"data.{name}={str(asked).lower()} cannot change the latents in {str(root)!r}, which are encoded already; use "
                f"data.{name}={str(plain).lower()}, {remedy}or train from the clips themselves."
            )


def table_columns(clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The columns of the table of clips: label, caption, conditions, the file they come from, columns for hold-outs, checksum.

    What a clip does not have is left out of its mapping; without a checksum of every clip the table has none.
    """
    labels = [clip.get("label") for clip in clips]
    columns: dict[str, Any] = {
        "label": np.array([-1 if label is None else label for label in labels], np.int32),
        "caption": [clip.get("caption") or "" for clip in clips],
        "source": [clip.get("source") or "" for clip in clips],
    }
    for name in ("conditions", "columns"):
        columns[name] = [json.dumps(clip[name]) if clip.get(name) else "" for clip in clips]
    if all("checksum" in clip for clip in clips):
        columns["checksum"] = np.array([clip["checksum"] for clip in clips], np.int64)
    return columns


def _open_table(root: Path, info: dict[str, Any]) -> Columns:
    """The table of a cache's clips; of caches of before, which list them in cache.json, in memory."""
    count = sum(shard["count"] for shard in info["shards"])
    try:
        if "table" not in info:
            clips = [clip for shard in info["shards"] for clip in _listed(shard)]
            return Columns.of(table_columns(clips), root / "cache.json")
        table = Columns(root / info["table"])
        if len(table) != count:
            raise ValueError(f"{table.path} has {len(table)} clips, and the shards {count}")
        table.check()
        return table
    except (ValueError, LookupError, TypeError) as error:
        where = "" if "table" in info else f"{root / 'cache.json'} lists its clips wrongly: "
        raise ValueError(f"{where}{error}; {AGAIN}") from error


def _listed(shard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The clips of a shard as caches of before list them; the earliest have neither captions nor conditions."""
    for row in range(shard["count"]):
        clip = {"label": shard["labels"][row]}
        for name, key in (("caption", "captions"), ("conditions", "conditions"), ("source", "clips")):
            clip |= {name: shard[key][row]} if shard.get(key) else {}
        yield clip | {"columns": {name: values[row] for name, values in shard.get("columns", {}).items()}}

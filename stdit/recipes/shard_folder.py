"""The shards of cached latents in a folder: which clips they hold, and what other processes do there."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from stdit.data.cache_locks import is_locked, lock_of
from stdit.data.datasets import Dataset
from stdit.data.identity import clip_of, columns_of, hash_of, identity_of
from stdit.data.media import state_of
from stdit.data.samplers import ClipSize
from stdit.data.variants import VARIANT
from stdit.hashes import difference
from stdit.recipes.encoding import Draw

_COMPARED = 200  # clips of the data that are looked for in a folder, and of the folder in the data


class Part(NamedTuple):
    """The clips of a shard, by their numbers in the dataset, and the size of all of them (None: that of the config)."""

    indices: Sequence[int]
    size: ClipSize | None = None


class Row(NamedTuple):
    """Where the latents of a clip are: the record of a shard, and the row there."""

    record: dict[str, Any]
    number: int


def key_of(dataset: Dataset, index: int, size: ClipSize | None) -> str:
    """A hash of what a clip's latents and stored conditions are made from: what is in it, its further columns, the size."""
    one = identity_of(dataset, index, read=True)
    return hash_of([*clip_of(one), hash_of(columns_of(one)), *(size or ())])


def draw_of(dataset: Dataset, index: int) -> Draw:
    """What the random choices of a clip depend on: the clip, wherever it lies, and which of its windows this is."""
    one = identity_of(dataset, index, read=True)
    columns = [column for column in columns_of(one) if column[0] != VARIANT]
    window = dataset.window_of(index) if hasattr(dataset, "window_of") else 0
    return Draw(int(hash_of([*clip_of(one), hash_of(columns)]), 16), window)


class ShardFolder:
    """The shards in a folder. Records are read as they are on the disk, since other processes write there, too.

    settings: a hash of what latents depend on besides their clips; shards of others are no part of the folder.
    """

    def __init__(self, path: Path, settings: str):
        self.path, self.settings = path, settings
        self._own: Path | None = None  # the lock of this process
        self._whole: dict[str, bool] = {}  # by file, whether it is as its record says

    def file(self, number: int, keys: Sequence[str]) -> Path:
        """The file of a shard by its number and the keys of the clips that are in it."""
        return self.path / f"latents-{number:05d}-{hash_of([self.settings, *keys])[:12]}.safetensors"

    def records(self, number: int | None = None) -> Iterator[dict[str, Any]]:
        """The records of all shards that have one, or of those of a number, the newest first."""
        found = self.path.glob("latents-*.json" if number is None else f"latents-{number:05d}*.json")
        for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True):
            record = _read_record(path.with_suffix(".safetensors"))
            if record is not None and record.get("settings", self.settings) == self.settings:
                yield record

    def is_whole(self, record: dict[str, Any]) -> bool:
        """Whether a shard's file is as its record says."""
        return difference(self.path, {record["file"]: record}) is None

    @cached_property
    def rows(self) -> dict[str, Row]:
        """Where the latents of clips are, by their keys, in the shards that were there when they were first asked for."""
        found: dict[str, Row] = {}
        for record in self.records():
            for key, number in zip(record["keys"], record["rows"], strict=True):
                if number is not None:  # what could not be read is tried again
                    found.setdefault(key, Row(record, number))
        return found

    def find(self, key: str) -> Row | None:
        """Where the latents of a clip are, in a shard that is whole; None if nowhere."""
        row = self.rows.get(key)
        if row is None:
            return None
        name = row.record["file"]
        if name not in self._whole:
            self._whole[name] = self.is_whole(row.record)
        return row if self._whole[name] else None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """A context manager that has other processes leave all files here."""
        with lock_of(self.path, "writer") as self._own:
            yield

    def is_used_elsewhere(self) -> bool:
        """Whether another process writes here, or may need what is here."""
        return is_locked(self.path, "writer", besides=self._own)

    def is_read(self) -> bool:
        """Whether a training reads what is here."""
        return is_locked(self.path, "reader")

    def is_current(self, dataset: Dataset, parts: Sequence[Part]) -> bool:
        """Whether any of some parts is as the data are now."""
        return any(
            one["described"] == description_of(dataset, part)
            for number, part in enumerate(parts[:4])
            for one in self.records(number)
        )

    def check_overlap(self, dataset: Dataset, parts: Sequence[Part]) -> None:
        """Raise ValueError if the folder has clips and none of them is found in the data, where some are looked for."""
        clips = [(index, part.size) for part in parts for index in part.indices]
        compared = clips[:: max(1, len(clips) // _COMPARED)]
        if not self.rows or any(key_of(dataset, index, size) in self.rows for index, size in compared):
            return
        # Of many clips those of the folder may be few: some of these are looked for by their names.
        known = {
            name: key for record in self.records() for name, key in zip(record["clips"], record["keys"], strict=True)
        }
        wanted = dict(list(known.items())[:: max(1, len(known) // _COMPARED)])
        for index, size in clips:
            name = identity_of(dataset, index).source
            if name in wanted and key_of(dataset, index, size) in self.rows:
                return
        raise ValueError(
            f"{self.path} holds latents of other clips, which these would replace; choose another --output, or remove it."
        )


def description_of(dataset: Dataset, part: Part) -> str:
    """A hash of a part's clips as far as it is known without reading them: by names, sizes and times of change."""
    clips = [(identity_of(dataset, i), state_of(Path(dataset.name(i)))) for i in part.indices]
    return hash_of(
        [[one.source, one.content, *state, hash_of(columns_of(one)), *(part.size or ())] for one, state in clips]
    )


def _read_record(file: Path) -> dict[str, Any] | None:
    """The record of a shard; None if it is missing or does not say what the shard was made from."""
    try:
        record = json.loads(file.with_suffix(".json").read_text())
        if "keys" not in record:
            record |= _of_version_before(record)
        counted = sum(row is not None for row in record["rows"]) == len(record["conditions"]) == record["count"]
        counted = counted and all(isinstance(one, dict) for one in record["conditions"])
        counted = counted and all(isinstance(one, int) for one in record["checksums"] or [])
        counted = counted and (record["checksums"] is None or len(record["checksums"]) == record["count"])
        return record if counted and len(record["keys"]) == len(record["rows"]) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


def _of_version_before(record: dict[str, Any]) -> dict[str, Any]:
    """What a record of before lacks: keys in place of the clips' identities, checksums of their rows."""
    keys, names = [], []
    for source, content, *further in record["sources"]:
        clip = [content] if isinstance(content, str) and len(content) == 32 else [source, content]
        keys.append(hash_of([*clip, *further]))
        names.append(source)
    known = {"keys": keys, "clips": names, "sources": hash_of(record["sources"]), "bad": {}}
    return {**known, "described": None, "checksums": None}

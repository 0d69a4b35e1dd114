"""The files of cached latents: shards that processes share out among them, and that are brought up to date clip by clip.

A shard is named by its number and by what its clips are, and never changes: other clips make another file, into which the
latents of clips that any shard has already are copied. Files of before go once cache.json names the new ones.
"""

import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file

from stdit.data.actions import known_actions
from stdit.data.cached import MOST_OPEN, CachedLatents, table_columns
from stdit.data.columns import write_columns
from stdit.data.config import DataConfig
from stdit.data.datasets import Dataset
from stdit.data.holdout import column_of
from stdit.data.identity import clip_of, columns_of, fingerprint, hash_of, identity_of
from stdit.data.media import state_of
from stdit.data.samplers import ClipSize
from stdit.data.tensor_rows import TensorRows, checksum_of
from stdit.data.variants import VARIANT
from stdit.files import atomic_write, claimed, write_text
from stdit.hashes import difference, file_sha256
from stdit.progress import Progress
from stdit.recipes.encoding import Draw, Form, Shard, encode_shard
from stdit.vae import VideoVAE

_COMPARED = 200  # clips that are looked for in the folder when the data have moved
_SHARD = re.compile(r"latents-\d{5,}(-[0-9a-f]{12})?\.(safetensors|json)")
_TABLE = re.compile(r"clips-[0-9a-f]{12}\.safetensors")


class Part(NamedTuple):
    """The clips of a shard, by their numbers in the dataset, and the size of all of them (None: that of the config)."""

    indices: Sequence[int]
    size: ClipSize | None = None


class Row(NamedTuple):
    """Where the latents of a clip are: the record of a shard, and the row there."""

    record: dict[str, Any]
    number: int


def rank_of_process() -> tuple[int, int]:
    """The index of this process and the number of processes, as torchrun sets them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


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
        self._own = self.path / f".process-{uuid4().hex}.lock"
        with FileLock(self._own):
            try:
                yield
            finally:
                self._own.unlink(missing_ok=True)

    def is_used_elsewhere(self) -> bool:
        """Whether another process writes here, or may need what is here."""
        return any(_is_held(lock) for lock in self.path.glob(".process-*.lock") if lock != self._own)

    def is_current(self, dataset: Dataset, parts: Sequence[Part]) -> bool:
        """Whether any of some parts is as the data are now."""
        return any(
            one["described"] == _description(dataset, part)
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


def write_shards(
    folder: ShardFolder, dataset: Dataset, vae: VideoVAE, parts: Sequence[Part], *, seed: int, form: Form
) -> int:
    """Write the shards of this process, encoding the clips that no shard has, and those of missing or damaged shards.

    Returns the number of shards that were left to other processes, which were writing them.
    """
    (rank, world), waited, began = rank_of_process(), 0.0, time.perf_counter()
    done = Counter[str]()
    for number in Progress(range(len(parts))[rank::world], unit="shard", desc="encoding", disable=rank > 0):
        with ExitStack() as claim:
            try:
                claim.enter_context(claimed([folder.path / f"latents-{number:05d}.safetensors"]))
            except ValueError:  # the same command runs twice: the other process has this shard
                done["elsewhere"] += 1
                continue
            waited += _write_shard(
                folder, number, parts[number], dataset=dataset, vae=vae, seed=seed, form=form, done=done
            )
    if not rank:
        print(f"waited {waited:.1f} s of {time.perf_counter() - began:.1f} s for data")
    if done["elsewhere"]:
        print(f"{done['elsewhere']} shards were being written by another process")
    if done["kept"]:
        print(f"{done['kept']} clips kept, {done['encoded']} encoded")
    return done["elsewhere"]


def _write_shard(
    folder: ShardFolder,
    number: int,
    part: Part,
    *,
    dataset: Dataset,
    vae: VideoVAE,
    seed: int,
    form: Form,
    done: Counter[str],
) -> float:
    """Bring one shard up to date; counts what was done -> seconds spent waiting for data."""
    indices, described = part.indices, _description(dataset, part)
    keys = [key_of(dataset, i, part.size) for i in indices]
    same = next((one for one in folder.records(number) if one["keys"] == keys and folder.is_whole(one)), None)
    if same is not None and None not in same["rows"]:
        done["kept"] += len(indices)
        newest = next(folder.records(number))
        if same["described"] != described or newest["file"] != same["file"]:
            names = [identity_of(dataset, i).source for i in indices]
            further = {"described": described, "clips": names, "checksums": _checksums(folder, same)}
            _write_record(folder, {**same, **further})
        return 0.0
    found = {i: folder.find(key) for i, key in zip(indices, keys, strict=True)}
    rows = {i: row for i, row in found.items() if row is not None}
    wanted = [i for i in indices if i not in rows]
    done.update(kept=len(rows), encoded=len(wanted))
    shard = encode_shard(
        dataset, vae, wanted, draws=[draw_of(dataset, i) for i in wanted], seed=seed, size=part.size, form=form
    )
    there = [key for i, key in zip(indices, keys, strict=True) if i in rows or i in shard.indices]
    record = _merge(folder, folder.file(number, there), shard, indices=indices, rows=rows)
    bad = {key: shard.bad.get(dataset.name(i), "") for i, key in zip(indices, keys, strict=True) if i not in rows}
    record |= {"bad": {key: reason for key, reason in bad.items() if reason}, "keys": keys, "sources": hash_of(keys)}
    record |= {"clips": [identity_of(dataset, i).source for i in indices], "settings": folder.settings}
    record |= {"described": described, **({} if part.size is None else {"size": list(part.size)})}
    _write_record(folder, record)
    return shard.waited


def _description(dataset: Dataset, part: Part) -> str:
    """A hash of a part's clips as far as it is known without reading them: by names, sizes and times of change."""
    clips = [(identity_of(dataset, i), state_of(Path(dataset.name(i)))) for i in part.indices]
    return hash_of(
        [[one.source, one.content, *state, hash_of(columns_of(one)), *(part.size or ())] for one, state in clips]
    )


def _merge(folder: ShardFolder, file: Path, shard: Shard, *, indices: Sequence[int], rows: dict[int, Row]) -> dict:
    """Write the tensors of a shard, those that other shards have and the new ones, in the order of `indices` -> its record.

    The record has the row of every index in `rows`, None for a file that could not be read.
    """
    new = {i: row for row, i in enumerate(shard.indices)}
    before: dict[str, TensorRows] = {}
    clips, conditions = [], []
    for i in indices:
        if i in new:
            clips.append({name: tensor[new[i]] for name, tensor in shard.tensors.items()})
            conditions.append(shard.conditions[new[i]])
        elif i in rows:
            row = rows[i]
            name = row.record["file"]
            if name not in before:
                if len(before) >= MOST_OPEN:
                    before.pop(next(iter(before)))
                before[name] = TensorRows(folder.path / name)
            clips.append({part: before[name].row(part, row.number) for part in before[name].names()})
            conditions.append(row.record["conditions"][row.number])
    tensors = {name: torch.stack([clip[name] for clip in clips]) for name in (clips[0] if clips else ())}
    with atomic_write(file) as tmp:
        save_file(tensors or {"latents": torch.zeros(0)}, tmp)
        digest, size = file_sha256(tmp), tmp.stat().st_size
    numbers = iter(range(len(clips)))
    there = [i in new or i in rows for i in indices]
    return {
        "file": file.name, "count": len(clips), "bytes": size, "sha256": digest, "conditions": conditions,
        "checksums": [checksum_of(clip) for clip in clips], "rows": [next(numbers) if one else None for one in there],
    }  # fmt: skip


def _checksums(folder: ShardFolder, record: dict[str, Any]) -> list[int]:
    """The checksums of a shard's rows, computed where a record of before has none."""
    if record["checksums"] is not None:
        return record["checksums"]
    file = TensorRows(folder.path / record["file"])
    return [checksum_of({name: file.row(name, row) for name in file.names()}) for row in range(record["count"])]


def _is_held(lock: Path) -> bool:
    """Whether a process has a lock of its own; one that was killed has left it."""
    try:
        with FileLock(lock, timeout=0):
            lock.unlink(missing_ok=True)
            return False
    except Timeout:
        return True


def _write_record(folder: ShardFolder, record: dict[str, Any]) -> None:
    write_text((folder.path / record["file"]).with_suffix(".json"), json.dumps(record))


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


def write_index(
    folder: ShardFolder,
    head: dict,
    dataset: Dataset,
    parts: Sequence[Part],
    *,
    rate: float,
    form: Form,
    config: DataConfig,
    elsewhere: int,
) -> int:
    """Write cache.json once every shard is there and of this data (the last process does).

    rate: frames per second. elsewhere: shards that this process left to others.
    """
    output, records = folder.path, []
    for number, part in enumerate(parts):
        described = _description(dataset, part)
        record = next((one for one in folder.records(number) if one["described"] == described), None)
        if record is None:
            if rank_of_process()[1] == 1 and not elsewhere and not folder.is_used_elsewhere():
                raise ValueError(
                    f"clips changed while they were encoded, and {output} lacks latents of some; run the same command again."
                )
            print(f"process {rank_of_process()[0]} is done; the last process to finish writes {output / 'cache.json'}")
            return 0
        records.append(record)
    bad = _unreadable(dataset, parts, records)
    if not any(record["count"] for record in records):
        raise ValueError(
            f"none of the {len(dataset)} clips could be read; stdit check-media lists the reasons, the first is: {next(iter(bad.values()))}"
        )
    clips = list(_clips(dataset, parts, records, form.columns))
    digest = hashlib.sha256(json.dumps([[record["file"] for record in records], clips]).encode())
    table = output / f"clips-{digest.hexdigest()[:12]}.safetensors"
    write_columns(table, table_columns(clips), {})
    classes: dict[str, Any] = {"num_classes": dataset.num_classes, "class_names": dataset.class_names}
    space = known_actions(dataset)
    classes |= {"action_space": None if space is None else space.plain}
    named = ("file", "count", "bytes", "sha256", "sources", "size")
    head = {
        **head, **classes, "clips": len(clips), "rate": rate, "table": table.name, "columns": list(form.columns),
        "shards": [{name: record[name] for name in named if name in record} for record in records], "skipped": bad,
    }  # fmt: skip
    write_text(output / "cache.json", json.dumps(head))
    # Known here, it need not be found from all clips at the start of every run.
    whole = fingerprint(CachedLatents(output, config))
    write_text(output / "cache.json", json.dumps({**head, "fingerprint": whole}))
    if not folder.is_used_elsewhere():
        _remove_others(output, {table.name, *(record["file"] for record in records)})
    for reason in list(bad.values())[:10]:
        print(f"skipped a file: {reason}")
    skipped = f"; {len(bad)} skipped" if bad else ""
    print(f"{len(clips)} clips as latents of {head['vae']!r} in {output}{skipped}")
    return 0


def _clips(
    dataset: Dataset, parts: Sequence[Part], records: Sequence[dict], columns: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """What the table says of every clip that has latents."""
    for part, record in zip(parts, records, strict=True):
        for i, row in zip(part.indices, record["rows"], strict=True):
            if row is not None:
                one = dataset.record(i)
                yield {
                    "label": one["label"], "caption": one["caption"], "source": identity_of(dataset, i).source,
                    "conditions": record["conditions"][row], "checksum": record["checksums"][row],
                    "columns": {name: column_of(dataset, i, name) for name in columns},
                }  # fmt: skip


def _unreadable(dataset: Dataset, parts: Sequence[Part], records: Sequence[dict]) -> dict[str, str]:
    """The reason for every file that could not be read."""
    bad = {}
    for part, record in zip(parts, records, strict=True):
        for i, key, row in zip(part.indices, record["keys"], record["rows"], strict=True):
            if row is None:
                bad[dataset.name(i)] = record["bad"].get(key, f"{dataset.name(i)} could not be read")
    return bad


def _remove_others(output: Path, named: set[str]) -> None:
    """Remove shards and tables that cache.json names no more: other files replace them, or the data have fewer clips."""
    stems = {Path(name).stem for name in named}
    for path in sorted(output.iterdir()):
        if path.stem not in stems and (_SHARD.fullmatch(path.name) or _TABLE.fullmatch(path.name)):
            path.unlink(missing_ok=True)

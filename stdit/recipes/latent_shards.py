"""The files of cached latents: shards that processes share out among them, and that are brought up to date clip by clip.

A shard is named by its number and by what its clips are, and never changes: other clips make another file, into which the
latents of clips that any shard has already are copied. Files that an update replaces stay until the next one, and as long as
a training reads the folder.
"""

import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from stdit.data.actions import known_actions
from stdit.data.cached import MOST_OPEN, CachedLatents, table_columns
from stdit.data.columns import write_columns
from stdit.data.config import DataConfig
from stdit.data.datasets import Dataset
from stdit.data.holdout import column_of
from stdit.data.identity import fingerprint, hash_of, identity_of
from stdit.data.tensor_rows import TensorRows, checksum_of
from stdit.files import atomic_write, claimed, write_text
from stdit.hashes import file_sha256
from stdit.progress import Progress
from stdit.recipes.encoding import Form, Shard, encode_shard
from stdit.recipes.shard_folder import Part, Row, ShardFolder, description_of, draw_of, key_of
from stdit.vae import VideoVAE

_SHARD = re.compile(r"latents-\d{5,}(-[0-9a-f]{12})?\.(safetensors|json)")
_TABLE = re.compile(r"clips-[0-9a-f]{12}\.safetensors")


def rank_of_process() -> tuple[int, int]:
    """The index of this process and the number of processes, as torchrun sets them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


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
    indices, described = part.indices, description_of(dataset, part)
    keys = [key_of(dataset, i, part.size) for i in indices]
    same = next((one for one in folder.records(number) if one["keys"] == keys and folder.is_whole(one)), None)
    if same is not None:
        rows = {i: Row(same, row) for i, row in zip(indices, same["rows"], strict=True) if row is not None}
    else:
        found = {i: folder.find(key) for i, key in zip(indices, keys, strict=True)}
        rows = {i: row for i, row in found.items() if row is not None}
    wanted = [i for i in indices if i not in rows]  # what could not be read is tried again
    draws = [draw_of(dataset, i) for i in wanted]
    shard = encode_shard(dataset, vae, wanted, draws=draws, seed=seed, size=part.size, form=form)
    done.update(kept=len(rows), encoded=len(shard.indices))
    if same is not None and not shard.indices:
        record = {**same, "checksums": _checksums(folder, same)}
    else:
        there = [key for i, key in zip(indices, keys, strict=True) if i in rows or i in shard.indices]
        record = _merge(folder, folder.file(number, there), shard, indices=indices, rows=rows)
        record |= {"keys": keys, "sources": hash_of(keys)}
    bad = {
        key: shard.bad[dataset.name(i)] for i, key in zip(indices, keys, strict=True) if dataset.name(i) in shard.bad
    }
    record |= {"clips": [identity_of(dataset, i).source for i in indices], "settings": folder.settings, "bad": bad}
    record |= {"described": described, **({} if part.size is None else {"size": list(part.size)})}
    if record != same or next(folder.records(number))["file"] != record["file"]:
        _write_record(folder, record)
    return shard.waited


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


def _write_record(folder: ShardFolder, record: dict[str, Any]) -> None:
    write_text((folder.path / record["file"]).with_suffix(".json"), json.dumps(record))


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
    before: set[str],
) -> int:
    """Write cache.json once every shard is there and of this data (the last process does).

    rate: frames per second. elsewhere: shards that this process left to others. before: the files that cache.json named when
    this process began, which runs may read; it may name others by now, if another process was done first.
    """
    output, records = folder.path, []
    for number, part in enumerate(parts):
        described = description_of(dataset, part)
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
    new = {table.name, *(record["file"] for record in records)}
    write_text(output / "cache.json", json.dumps(head))
    # Known here, it need not be found from all clips at the start of every run.
    whole = fingerprint(CachedLatents(output, config))
    write_text(output / "cache.json", json.dumps({**head, "fingerprint": whole}))
    # The locks of runs on other machines may not be seen here, so what this update replaces stays in any case.
    others, read = _others(output, new), folder.is_read()
    staying = {path for path in others if read or path.with_suffix(".safetensors").name in before}
    if not folder.is_used_elsewhere():
        for path in sorted(set(others) - staying):
            path.unlink(missing_ok=True)
    if staying:
        files = sum(path.suffix == ".safetensors" for path in staying)
        print(
            f"{files} replaced files are kept, since trainings may read them; the same command again removes them once these have ended"
        )
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


def files_of_cache(output: Path) -> set[str]:
    """The shards and the table that cache.json names; none where it cannot be read."""
    try:
        info = json.loads((output / "cache.json").read_text())
        return {shard["file"] for shard in info["shards"]} | ({info["table"]} if "table" in info else set())
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def _others(output: Path, named: set[str]) -> list[Path]:
    """The files of shards and tables with other names than these."""
    stems = {Path(name).stem for name in named}
    files = (path for path in output.iterdir() if path.stem not in stems)
    return [path for path in files if _SHARD.fullmatch(path.name) or _TABLE.fullmatch(path.name)]

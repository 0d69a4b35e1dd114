"""The files of cached latents: shards that processes share out among them, and that are brought up to date clip by clip."""

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from stdit.data.actions import known_actions
from stdit.data.datasets import Dataset
from stdit.data.holdout import column_of
from stdit.data.identity import columns_of, hash_of, identity_of
from stdit.data.samplers import ClipSize
from stdit.files import atomic_write, claimed, write_text
from stdit.hashes import difference, file_sha256
from stdit.progress import Progress
from stdit.recipes.encoding import Form, Shard, encode_shard
from stdit.vae import VideoVAE


class Part(NamedTuple):
    """The clips of a shard, by their numbers in the dataset, and the size of all of them (None: that of the config)."""

    indices: Sequence[int]
    size: ClipSize | None = None


def rank_of_process() -> tuple[int, int]:
    """The index of this process and the number of processes, as torchrun sets them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def write_shards(
    output: Path, dataset: Dataset, vae: VideoVAE, parts: Sequence[Part], *, seed: int, form: Form
) -> None:
    """Write the shards of this process, encoding the clips that are new or changed, and those of missing or damaged shards."""
    (rank, world), waited, began = rank_of_process(), 0.0, time.perf_counter()
    done: Counter[str] = Counter()
    for number in Progress(range(len(parts))[rank::world], unit="shard", desc="encoding", disable=rank > 0):
        file = output / f"latents-{number:05d}.safetensors"
        with ExitStack() as claim:
            try:
                claim.enter_context(claimed([file]))
            except ValueError:  # the same command runs twice: the other process has this shard
                done["elsewhere"] += 1
                continue
            waited += _write_shard(file, dataset, vae, parts[number], seed=seed, form=form, done=done)
    if not rank:
        print(f"waited {waited:.1f} s of {time.perf_counter() - began:.1f} s for data")
    if done["elsewhere"]:
        print(f"{done['elsewhere']} shards were being written by another process")
    if done["kept"]:
        print(
            f"{done['kept']} clips kept, {done['encoded']} encoded; labels, captions or columns of {done['annotated']} shards renewed"
        )


def _write_shard(
    file: Path, dataset: Dataset, vae: VideoVAE, part: Part, *, seed: int, form: Form, done: Counter[str]
) -> float:
    """Bring one shard up to date; counts what was done -> seconds spent waiting for data."""
    indices = part.indices
    sources = [[*source_of(dataset, i), *(part.size or ())] for i in indices]
    old = _read_record(file)
    unchanged = {
        i: old["rows"][n] for n, i in enumerate(indices) if n < len(old["rows"]) and old["sources"][n] == sources[n]
    }
    wanted = [i for i in indices if i not in unchanged]
    done.update(kept=len(unchanged), encoded=len(wanted))
    annotations = _hash_of_annotations(dataset, indices, form.columns)
    if not wanted and len(old["rows"]) == len(indices):
        if old["annotations"] != annotations:
            done["annotated"] += 1
            record = {**old, **_annotations(dataset, [i for i in indices if unchanged[i] is not None], form.columns)}
            write_text(file.with_suffix(".json"), json.dumps({**record, "annotations": annotations}))
        return 0.0
    shard = encode_shard(dataset, vae, wanted, seed=seed, size=part.size, form=form)
    record = _merge(file, old, shard, unchanged=unchanged, indices=indices)
    kept = {dataset.name(i) for i in unchanged}
    bad = {name: reason for name, reason in old["bad"].items() if name in kept}
    record |= {"bad": bad | shard.bad, "sources": sources, "annotations": annotations}
    kept_rows = [number for number, row in enumerate(record["rows"]) if row is not None]
    record |= {"clips": [sources[number][0] for number in kept_rows]}  # what variants of one clip share
    record |= {} if part.size is None else {"size": list(part.size)}
    found = [i for i, row in zip(indices, record["rows"], strict=True) if row is not None]
    record |= _annotations(dataset, found, form.columns)
    write_text(file.with_suffix(".json"), json.dumps(record))
    return shard.waited


def source_of(dataset: Dataset, index: int) -> list:
    """What a clip's latents and stored conditions are made from: its file, what is in it, and its further columns."""
    one = identity_of(dataset, index, read=True)
    return [one.source, one.content, hash_of(columns_of(one))]


def _annotations(dataset: Dataset, indices: Sequence[int], columns: Sequence[str]) -> dict[str, Any]:
    """Labels and captions, and the values of columns by which clips can be held out."""
    rows = [dataset.record(i) for i in indices]
    found: dict[str, Any] = {"labels": [row["label"] for row in rows], "captions": [row["caption"] for row in rows]}
    return found | {"columns": {name: [column_of(dataset, i, name) for i in indices] for name in columns}}


def _hash_of_annotations(dataset: Dataset, indices: Sequence[int], columns: Sequence[str]) -> str:
    rows = [dataset.record(i) for i in indices]
    values = [part for name in columns for part in (name, [column_of(dataset, i, name) for i in indices])]
    return hash_of([rows, *values] if values else rows)


def _merge(file: Path, old: dict, shard: Shard, *, unchanged: dict[int, int | None], indices: Sequence[int]) -> dict:
    """Write the tensors of a shard, those of the clips that are kept and of the new ones in the order of `indices`.

    unchanged: index of a clip -> its row in the old shard, None for a file that could not be read. The record that is returned
    has the row of every index in `rows`.
    """
    before = load_file(file) if any(row is not None for row in unchanged.values()) else {}
    new = {i: row for row, i in enumerate(shard.indices)}
    origins = {i: (before, unchanged[i], old["conditions"]) for i in unchanged if unchanged[i] is not None}
    origins |= {i: (shard.tensors, row, shard.conditions) for i, row in new.items()}
    order = [origins[i] for i in indices if i in origins]
    tensors = {
        name: torch.stack([part[name][row] for part, row, _ in order]) for name in (order[0][0] if order else ())
    }
    with atomic_write(file) as tmp:
        save_file(tensors or {"latents": torch.zeros(0)}, tmp)
        digest, size = file_sha256(tmp), tmp.stat().st_size
    numbers = iter(range(len(order)))
    return {
        "file": file.name, "count": len(order), "bytes": size, "sha256": digest,
        "conditions": [conditions[row] for _, row, conditions in order],
        "rows": [next(numbers) if i in origins else None for i in indices],
    }  # fmt: skip


# The record of a shard that is not there.
_NOTHING: dict[str, Any] = {"rows": [], "sources": [], "conditions": [], "bad": {}, "annotations": None}


def _read_record(file: Path) -> dict[str, Any]:
    """The record of a shard; one without rows if it is missing, damaged, or does not say what it was made from."""
    try:
        record = json.loads(file.with_suffix(".json").read_text())
        rows = [row for row in record["rows"] if row is not None]
        whole = (
            len(record["sources"]) == len(record["rows"]) and len(record["conditions"]) == len(rows) == record["count"]
        )
        return {**_NOTHING, **record} if whole and difference(file.parent, {file.name: record}) is None else _NOTHING
    except (OSError, ValueError, KeyError, TypeError):
        return _NOTHING


def write_index(output: Path, head: dict, dataset: Dataset, parts: Sequence[Part], *, rate: float, form: Form) -> int:
    """Write cache.json once every shard is there and of this data (the last process does). rate: frames per second."""
    records = []
    for number, part in enumerate(parts):
        path = output / f"latents-{number:05d}.json"
        record = json.loads(path.read_text()) if path.is_file() else {}
        if record.get("annotations") != _hash_of_annotations(dataset, part.indices, form.columns):
            print(f"process {rank_of_process()[0]} is done; the last process to finish writes {output / 'cache.json'}")
            return 0
        index = {key: value for key, value in record.items() if key not in ("rows", "annotations")}
        records.append({**index, "sources": hash_of(record["sources"])})
    bad = {name: reason for record in records for name, reason in record.pop("bad").items()}
    if not any(record["count"] for record in records):
        raise ValueError(
            f"none of the {len(dataset)} clips could be read; stdit check-media lists the reasons, the first is: {next(iter(bad.values()))}"
        )
    classes: dict[str, Any] = {"num_classes": dataset.num_classes, "class_names": dataset.class_names}
    space = known_actions(dataset)
    classes |= {"action_space": None if space is None else space.plain}
    count = sum(record["count"] for record in records)
    head = {**head, **classes, "clips": count, "rate": rate, "shards": records, "skipped": bad}
    write_text(output / "cache.json", json.dumps(head))
    _remove_further(output, len(records))
    for reason in list(bad.values())[:10]:
        print(f"skipped a file: {reason}")
    skipped = f"; {len(bad)} skipped" if bad else ""
    print(f"{count} clips as latents of {head['vae']!r} in {output}{skipped}")
    return 0


def _remove_further(output: Path, count: int) -> None:
    """Remove shards of an earlier run on more clips."""
    names = {f"latents-{number:05d}" for number in range(count)}
    for path in output.glob("latents-*"):
        if path.stem not in names and path.stem.removeprefix("latents-").isdecimal():
            print(f"removed {path}, of clips that the data no longer has")
            path.unlink()

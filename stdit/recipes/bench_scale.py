"""How opening data and drawing batches grow from a thousand rows to a million (`stdit bench scale`)."""

import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np

from stdit.data.clips import VideoClips
from stdit.data.config import DataConfig
from stdit.data.index import MediaIndex, write_index
from stdit.data.loader import KeyedSamples
from stdit.data.manifest import Row, Table, read_manifest
from stdit.data.media import state_of
from stdit.data.records import write_records
from stdit.data.samplers import (
    BatchSampler,
    BlockedSampler,
    BucketSampler,
    ClipSize,
    PackedSampler,
    UniformSampler,
    assign_buckets,
)
from stdit.data.video_write import write_video
from stdit.data.workers import WorkerPool
from stdit.text import CaptionCache, HashedWordEncoder

_SHARDS = 1000  # that the rows are shared among
_SIZES = [ClipSize(5, 32, 32), ClipSize(9, 32, 32), ClipSize(9, 32, 48), ClipSize(1, 32, 32)]
_COSTS = [8, 12, 18, 4]
_KINDS = [
    (20, 48, 86),
    (24, 36, 64),
    (8, 32, 32),
    (40, 40, 44),
]  # frames, height, width of clips; the last fit two sizes
_TOKENS = 256
_STEPS = 200
_CONFIG = """
name: bench
data: {num_frames: 5, height: 32, width: 32, workers: 0}
model: {size: S/2, depth: 1, hidden_size: 32, num_heads: 2}
train: {steps: 1, batch_size: 4, samples: 0, precision: fp32, resume: never}
"""
# Beside the plain training: what asks for something of every row.
_ALL = [
    f"data.sizes={[list(size) for size in _SIZES]}", f"train.tokens={_TOKENS}", "train.holdout=0.01", "text.encoder=words",
    "text.cache=text",
]  # fmt: skip


def bench_scale(largest: int) -> None:
    """Print a row of figures for every power of ten from a thousand rows on.

    worker MB: private memory of a loader process that has read clips of packs and their captions. sent kB: what it is sent.
    train s: a training of one step, plain and with captions (encoded before), sizes and a hold-out, from the start of its
    process to the end.
    """
    columns = ("rows", "manifest s", "index MB", "open s", "us a row", "sent kB", "worker MB", "train s", "train all s")
    names = ("uniform", "blocked", "buckets", "packs")
    orders = [f"{name} {what}" for name in names for what in ("first s", "ms a step")]
    print("  ".join(f"{name:>17}" for name in (*columns, *orders)))
    count = 1000
    while count <= largest:
        with tempfile.TemporaryDirectory() as folder:
            figures = _figures(Path(folder), count)
        print("  ".join(f"{value:>17.4g}" for value in (count, *figures)), flush=True)
        count *= 10


def _figures(folder: Path, count: int) -> list[float]:
    rows, entries = _clips(folder, count)
    listed = [{"path": row.path.name, "label": f"class {row.label}", "caption": row.caption} for row in rows]
    for i in range(_SHARDS):
        (folder / f"clip{i:03d}.mp4").touch()
    write_records(
        folder / "manifest.jsonl", [{**row, "path": f"clip{i % _SHARDS:03d}.mp4"} for i, row in enumerate(listed)]
    )
    manifest = _seconds(lambda: read_manifest(folder / "manifest.jsonl"))
    path = folder / "media.index"
    write_index(
        path, Table(rows, 100, [f"class {i}" for i in range(100)]), entries, source=folder / "clips.jsonl", root=folder,
        fingerprint={"rows": count}, action_space=None,
    )  # fmt: skip
    opening = _seconds(lambda: MediaIndex(path).check())
    index = MediaIndex(path)
    reading = _seconds(lambda: [index[i] for i in range(0, count, max(1, count // 1000))]) / 1000 * 1e6
    buckets, shards = assign_buckets(index.shapes(None), _SIZES, 0), [count // _SHARDS] * _SHARDS
    make: dict[str, Callable[[], BatchSampler]] = {
        "uniform": lambda: UniformSampler(0, count, 64),
        "blocked": lambda: BlockedSampler(0, shards, 16, 64),
        "buckets": lambda: BucketSampler(0, buckets, _SIZES, _COSTS, tokens=_TOKENS),
        "packs": lambda: PackedSampler(0, buckets, _SIZES, _COSTS, tokens=_TOKENS),
    }
    _train(folder, *_ALL)  # which encodes the captions, as the first training on them does
    trained = [_train(folder, *overrides) for overrides in ([], _ALL)]
    clips = VideoClips(index.table, DataConfig(root=str(folder)))
    samples = KeyedSamples(clips, 0, make["packs"](), CaptionCache(folder / "text", HashedWordEncoder()).read)
    sent = len(ForkingPickler.dumps(samples)) / 1e3
    found = [manifest, path.stat().st_size / 1e6, opening, reading, sent, _worker_memory(samples), *trained]
    for name in make:
        found += _order(make[name])
    return found


def _clips(folder: Path, count: int) -> tuple[list[Row], dict[str, dict[str, Any]]]:
    """The rows of `count` clips in tar shards, which all hold the same four, and what is measured of them."""
    rng, parts = np.random.default_rng(0), []
    with tarfile.open(folder / "shard000.tar", "w") as tar:
        for number, shape in enumerate(_KINDS):
            file = folder / f"{number}.mp4"
            write_video(file, rng.integers(0, 256, (*shape, 3), np.uint8), 24)
            tar.add(file, file.name)
    with tarfile.open(folder / "shard000.tar") as tar:
        parts = [f"{member.offset_data}+{member.size}" for member in tar]
    for number in range(1, _SHARDS):
        os.link(folder / "shard000.tar", folder / f"shard{number:03d}.tar")
    rows, entries = [], {}
    for i in range(count):
        kind = i % len(_KINDS)
        path = folder / f"shard{i * _SHARDS // count:03d}.tar@{parts[kind]}/clip{i:07d}.mp4"
        rows.append(Row(path, i % 100, f"a caption of clip {i}"))
        (size, modified), (frames, height, width) = state_of(path), _KINDS[kind]
        measured = {"frames": frames, "last": (frames - 1) / 24, "fps": 24.0, "height": height, "width": width}
        entries[str(path)] = {"bytes": size, "modified": modified, **measured}
    return rows, entries


def _train(folder: Path, *overrides: str) -> float:
    """Seconds of a training of one step in a process of its own."""
    (folder / "bench.yaml").write_text(_CONFIG)
    data = ["data.root=.", "data.manifest=media.index"]
    command = [sys.executable, "-m", "stdit", "train", "bench.yaml", *data, *overrides]
    return _seconds(lambda: subprocess.run(command, cwd=folder, check=True, capture_output=True))


def _order(make: Callable[[], BatchSampler]) -> tuple[float, float]:
    """Seconds to the first batch of a run that resumes in its third epoch or at step 100000, and ms of every further one."""
    began = time.perf_counter()
    order = make()
    order.batch(100_000)
    first = time.perf_counter() - began
    return first, _seconds(lambda: [order.batch(100_001 + i) for i in range(_STEPS)]) / _STEPS * 1e3


def _worker_memory(samples: KeyedSamples) -> float:
    """Private memory (MB, "unique set size") of a loader process once it has read the clips of a few steps."""
    import psutil

    pool = WorkerPool(samples, 1, 60.0, {})
    with closing(pool.batches(iter([(step, slot) for slot in range(4)] for step in range(20)))) as batches:
        for _ in range(16):
            next(batches)
        return psutil.Process(pool.pids[0]).memory_full_info().uss / 1e6


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began

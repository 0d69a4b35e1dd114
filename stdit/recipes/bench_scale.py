"""How opening data and drawing batches grow from a thousand rows to a million (`stdit bench scale`)."""

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stdit.data.index import MediaIndex, write_index
from stdit.data.manifest import Row, Table, read_manifest
from stdit.data.media import state_of
from stdit.data.samplers import BatchSampler, BucketSampler, ClipSize, PackedSampler, UniformSampler, assign_buckets

_FILES = 1000  # that the rows are shared among
_SIZES = [ClipSize(17, 256, 256), ClipSize(33, 256, 256), ClipSize(33, 192, 336), ClipSize(1, 256, 256)]
_COSTS = [1280, 2304, 2268, 256]
_KINDS = [(97, 480, 854), (121, 720, 1280), (33, 256, 256), (200, 1080, 1920)]  # frames, height, width of files
_STEPS = 200


def bench_scale(largest: int) -> None:
    """Print a row of figures for every power of ten from a thousand rows on."""
    columns = ("rows", "manifest s", "index MB", "open s", "worker MB", "us a row", "pickle bytes")
    orders = [f"{name} {what}" for name in ("uniform", "buckets", "packs") for what in ("first s", "ms a step")]
    print("  ".join(f"{name:>16}" for name in (*columns, *orders)))
    count = 1000
    while count <= largest:
        with tempfile.TemporaryDirectory() as folder:
            figures = _figures(Path(folder), count)
        print("  ".join(f"{value:>16.4g}" for value in (count, *figures)), flush=True)
        count *= 10


def _figures(folder: Path, count: int) -> list[float]:
    files = [folder / f"clip{i:03d}.mp4" for i in range(_FILES)]
    for file in files:
        file.touch()
    with open(folder / "manifest.jsonl", "w") as stream:
        for i in range(count):
            row = {"path": files[i % _FILES].name, "label": f"class {i % 100}", "caption": f"a caption of clip {i}"}
            stream.write(json.dumps(row) + "\n")
    manifest = _seconds(lambda: read_manifest(folder / "manifest.jsonl"))
    path = _write(folder, files, count)
    opening = _seconds(lambda: MediaIndex(path).check())
    index = MediaIndex(path)
    rows = _seconds(lambda: [index[i] for i in range(0, count, max(1, count // 1000))]) / 1000 * 1e6
    found = [manifest, path.stat().st_size / 1e6, opening, _worker_memory(path), rows, len(pickle.dumps(index))]
    buckets = assign_buckets(index.shapes(None), _SIZES, 0)
    make: dict[str, Callable[[], BatchSampler]] = {
        "uniform": lambda: UniformSampler(0, count, 64),
        "buckets": lambda: BucketSampler(0, buckets, _SIZES, _COSTS, tokens=32768),
        "packs": lambda: PackedSampler(0, buckets, _SIZES, _COSTS, tokens=32768),
    }
    for name in make:
        found += _order(make[name])
    return found


def _write(folder: Path, files: list[Path], count: int) -> Path:
    """An index of `count` rows on files that exist."""
    rows = [Row(files[i % _FILES], i % 100, f"a caption of clip {i}") for i in range(count)]
    entries: dict[str, dict[str, Any]] = {}
    for i, file in enumerate(files):
        frames, height, width = _KINDS[i % len(_KINDS)]
        size, modified = state_of(file)
        measured = {"frames": frames, "last": frames / 24, "fps": 24.0, "height": height, "width": width}
        entries[str(file)] = {"bytes": size, "modified": modified, **measured}
    names = [f"class {i}" for i in range(100)]
    write_index(
        folder / "media.index", Table(rows, 100, names), entries, source=folder / "manifest.jsonl", root=folder,
        fingerprint={}, action_space=None,
    )  # fmt: skip
    return folder / "media.index"


def _order(make: Callable[[], BatchSampler]) -> tuple[float, float]:
    """Seconds to the first batch of a run that resumes in its third epoch or at step 100000, and ms of every further one."""
    began = time.perf_counter()
    order = make()
    order.batch(100_000)
    first = time.perf_counter() - began
    return first, _seconds(lambda: [order.batch(100_001 + i) for i in range(_STEPS)]) / _STEPS * 1e3


def _worker_memory(path: Path) -> float:
    """Private memory (MB) that opening an index and reading a thousand rows adds to a process."""
    script = (
        "import psutil, sys; from stdit.data.index import MediaIndex; "
        "own = lambda: psutil.Process().memory_full_info().uss; before = own(); index = MediaIndex(sys.argv[1]); "
        "rows = [index[i] for i in range(0, len(index), max(1, len(index) // 1000))]; print((own() - before) / 1e6)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, env=os.environ, check=True
    )
    return float(done.stdout)


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began

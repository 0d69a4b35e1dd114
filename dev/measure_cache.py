"""What a cache of latents costs by its number of clips: to open, to send to a process, to read, to train from.

    python dev/measure_cache.py 1000 1000000

A shard of 1000 clips is encoded once and stands for all shards (hard links).
"""

import json
import os
import pickle
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from stdit.data.cached import CachedLatents, table_columns
from stdit.data.columns import write_columns
from stdit.data.config import DataConfig
from stdit.data.identity import fingerprint
from stdit.recipes import cache_latents, train

SHARD = 1000
SIZE = DataConfig(num_frames=5, height=32, width=32)
CONFIG = f"""
name: cache
data: {{source: shapes, num_shapes: {SHARD}, num_frames: 5, height: 32, width: 32, workers: 0}}
model: {{size: S/2, depth: 1, hidden_size: 16, num_heads: 2}}
train: {{steps: 2, batch_size: 8, samples: 0, precision: fp32}}
"""


def make(count: int) -> Path:
    """A cache of `count` clips."""
    folder, one = Path(f"cache{count}"), CachedLatents(Path("one"), SIZE)
    folder.mkdir()
    (shard,), shards, clips = one.info["shards"], [], []
    rows = [{**one.record(i), "checksum": int(one._table["checksum"][i])} for i in range(SHARD)]
    for number in range(count // SHARD):
        name = f"latents-{number:05d}-000000000000.safetensors"
        os.link(Path("one") / shard["file"], folder / name)
        shards.append({**shard, "file": name})
        clips += [{**row, "source": f"{number}/{i}", "caption": f"clip {i}"} for i, row in enumerate(rows)]
    write_columns(folder / "clips-000000000000.safetensors", table_columns(clips), {})
    info = {**one.info, "shards": shards, "clips": count, "table": "clips-000000000000.safetensors"}
    del info["fingerprint"]
    (folder / "cache.json").write_text(json.dumps(info))
    whole = fingerprint(CachedLatents(folder, SIZE))  # as cache-latents keeps it
    (folder / "cache.json").write_text(json.dumps({**info, "fingerprint": whole}))
    return folder


def figures(count: int) -> dict[str, float]:
    """Seconds, milliseconds a clip, and MB."""
    folder, own = make(count), psutil.Process()
    before, began = own.memory_full_info().uss, time.perf_counter()
    dataset = CachedLatents(folder, SIZE)
    found = {"open s": time.perf_counter() - began, "open MB": (own.memory_full_info().uss - before) / 1e6}
    found["sent MB"] = len(pickle.dumps(dataset)) / 1e6
    rng = np.random.default_rng(0)
    drawn, began = rng.integers(0, count, 2000).tolist(), time.perf_counter()
    for i in drawn:
        dataset.load(i, rng)
    found["ms a clip"] = (time.perf_counter() - began) / len(drawn) * 1e3
    began = time.perf_counter()
    assert not train.run(["c.yaml", "data.source=latents", f"data.root={folder}", f"name=c{count}"])
    return {**found, "two steps s": time.perf_counter() - began}


def main() -> None:
    """Print a line for each number of clips."""
    with tempfile.TemporaryDirectory() as home:
        os.chdir(home)
        Path("c.yaml").write_text(CONFIG)
        assert not cache_latents.main(["c.yaml", "--output", "one", "--shard-size", str(SHARD)])
        found = {count: figures(count) for count in map(int, sys.argv[1:] or ["1000"])}
    for count, row in found.items():
        print(f"{count:>9} clips: " + ", ".join(f"{value:.3g} {name}" for name, value in row.items()))


if __name__ == "__main__":
    main()

"""A run has the same losses from every shape of its data."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from run_files import state
from safetensors.torch import load_file
from store_server import environment, serving

from stdit.data import stores, write_video
from stdit.data.parquet import write_parquet
from stdit.files import claimed
from stdit.recipes import cache_latents, index, train
from stdit.training.metrics import MetricsLogger

pytest.importorskip("obstore", reason="needs pip install 'stdit[stores]'")
CLIPS, FRAMES = 8, 5  # every clip has one window, so that a cache holds what is drawn from files
CONFIG = f"""
name: t
data: {{root: clips, manifest: clips/manifest.jsonl, num_frames: {FRAMES}, height: 32, width: 32, workers: 0}}
model: {{size: S/2, depth: 2, hidden_size: 32, num_heads: 2}}
train: {{steps: 10, batch_size: 4, lr: 1.0e-3, checkpoint_every: 1000, log_every: 10, preview_every: 1000, samples: 0,
        precision: fp32}}
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The same clips as files with a manifest, as an index, in tar shards, and as a parquet table with its own columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MetricsLogger, "curves", lambda self, last=False: None)  # not what is tested here
    (tmp_path / "t.yaml").write_text(CONFIG)
    for folder in ("clips", "shards"):
        (tmp_path / folder).mkdir()
    rows = []
    for i in range(CLIPS):
        frames = np.full((FRAMES, 48, 64, 3), 20 * i, np.uint8)
        for number, frame in enumerate(frames):
            frame[4 + 5 * number : 14 + 5 * number, 6 * i : 6 * i + 12] = (250, 60 * (i % 4), 30)
        write_video(f"clips/{i}.mp4", frames, 8)
        rows.append({"path": f"{i}.mp4", "label": i % 2})
    Path("clips/manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_parquet(Path("clips/table.parquet"), [{"video": row["path"], "kind": row["label"]} for row in rows])
    for shard in range(2):
        with tarfile.open(f"shards/{shard}.tar", "w") as tar:
            for i in range(shard * CLIPS // 2, (shard + 1) * CLIPS // 2):
                tar.add(f"clips/{i}.mp4", f"{i}.mp4")
                member = tarfile.TarInfo(f"{i}.cls")
                member.size = 1
                tar.addfile(member, io.BytesIO(str(i % 2).encode()))
    assert index.main(["clips/manifest.jsonl", "--output", "clips.index", "--workers", "0"]) == 0
    monkeypatch.setenv("STDIT_CACHE", str(tmp_path / "cache"))
    with serving(tmp_path) as server:  # every folder is a bucket
        for name, value in environment(server).items():
            monkeypatch.setenv(name, value)
        stores.forget()
        stores._store.cache_clear()
        yield tmp_path
        stores._store.cache_clear()


SHAPES = {
    "index": ["data.manifest=clips.index"],
    "tar": ["data.root=shards", "data.manifest=null"],
    "a store": ["data.root=s3://clips", "data.manifest=manifest.jsonl"],
    "tar in a store": ["data.root=s3://shards", "data.manifest=null"],
    "parquet": ["data.manifest=clips/table.parquet", "data.columns={path: video, label: kind}"],
}


def losses(name: str, steps: int, *overrides: str) -> list[float]:
    assert train.run(["t.yaml", f"name={name}", f"train.steps={steps}", *overrides]) == 0
    return recorded(name, steps)


def recorded(name: str, steps: int) -> list[float]:
    with open(f"output/{name}/training_metrics.csv", newline="") as stream:
        found = [float(row["loss"]) for row in csv.DictReader(stream)]
    assert len(found) == steps
    return found


def furthest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


def cache(output: str, *overrides: str) -> list[str]:
    return ["t.yaml", *overrides, "--output", output, "--shard-size", "2"]


def cached(root: str) -> list[str]:
    return [f"data.root={root}", "data.manifest=null", "data.source=latents"]


def compare(steps: int) -> dict[str, float]:
    """The largest relative differences of losses from those of clips in a folder."""
    raw = losses("raw", steps)
    found = {name: furthest(raw, losses(name, steps, *how)) for name, how in SHAPES.items()}
    assert cache_latents.main(cache("float32", "data.cache_dtype=float32")) == 0
    assert cache_latents.main(cache("one")) == 0
    half = losses("float16", steps, *cached("one"))
    found["cached in float16"] = furthest(raw, half)
    assert losses("stored", steps, *cached("s3://one")) == half
    found["cached in float32"] = furthest(raw, losses("float32", steps, *cached("float32")))
    return found


def check(found: dict[str, float]) -> None:
    for name, difference in found.items():
        assert difference <= (2e-3 if name == "cached in float16" else 1e-6), f"{name} differs by {difference:.1e}"


def same_latents(one: str, other: str) -> bool:
    folders = [sorted(Path(folder).glob("latents-*.safetensors")) for folder in (one, other)]
    assert len(folders[0]) == len(folders[1]) == CLIPS // 2
    pairs = [(load_file(first), load_file(second)) for first, second in zip(*folders, strict=True)]
    return all(a.keys() == b.keys() and all((a[key] == b[key]).all() for key in a) for a, b in pairs)


def test_a_run_has_the_losses_of_its_clips_from_an_index_tar_shards_parquet_stores_and_cached_latents(home):
    check(compare(10))


def test_a_run_that_was_stopped_and_goes_on_has_the_weights_of_an_undisturbed_one_from_every_shape_of_its_data(home):
    assert cache_latents.main(cache("float32", "data.cache_dtype=float32")) == 0
    assert cache_latents.main(cache("float16")) == 0
    cached_ones = {name: cached(name) for name in ("float32", "float16", "s3://float16")}
    for number, how in enumerate([[], *SHAPES.values(), *cached_ones.values()]):
        given = ["model.depth=1", "train.checkpoint_every=3", *how]  # stopped within the second pass over the clips
        losses(f"whole{number}", 5, *given)
        shutil.copytree(f"checkpoints/whole{number}/step-3", f"checkpoints/parts{number}/step-3")
        assert train.run(["t.yaml", f"name=parts{number}", "train.steps=5", *given]) == 0
        whole, parts = state(f"whole{number}", 5), state(f"parts{number}", 5)
        assert whole.keys() == parts.keys()
        assert [name for name, value in whole.items() if not torch.equal(value, parts[name])] == [], how


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_from_tar_shards(home):
    one = losses("one", 10, *SHAPES["tar"])
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "stdit", "train"]
    command = [sys.executable, *launcher, "t.yaml", "name=two", *SHAPES["tar"]]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    difference = furthest(one, recorded("two", 10))
    print(f"two processes differ by {difference:.1e}")
    assert difference <= 1e-6


def test_latents_are_the_same_bits_whichever_process_claims_a_shard_and_whatever_the_clips_lie_in(home):
    assert cache_latents.main(cache("one")) == 0
    Path("two").mkdir()
    with claimed([home / "two/latents-00001.safetensors", home / "two/latents-00002.safetensors"]):
        assert cache_latents.main(cache("two")) == 0  # leaves two of the four to the other process
    assert cache_latents.main(cache("two")) == 0
    assert cache_latents.main(cache("three", *SHAPES["tar"])) == 0
    assert same_latents("one", "two") and same_latents("one", "three")


@pytest.mark.slow
def test_two_hundred_steps_have_the_same_losses_and_two_processes_write_the_same_cache(home):
    found = compare(200)
    print({name: f"{difference:.1e}" for name, difference in found.items()})
    check(found)
    command = [sys.executable, "-m", "stdit", "cache-latents", *cache("two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    assert same_latents("one", "two")

import copy
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

from stdit.config import Config, to_plain
from stdit.training import metrics
from stdit.training.config import TrainConfig
from stdit.training.resume import find_checkpoint
from stdit.training.run import RunFolders
from stdit.training.state import (
    damage,
    flatten_optimizer,
    list_checkpoints,
    load_checkpoint,
    restore_optimizer,
    save_checkpoint,
)


def state(step: int) -> dict:
    return {"model": {"w": torch.full((1000,), float(step)), "b": torch.arange(3)}, "optimizer_0": {}}


@pytest.fixture
def folder(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, state(step), {"note": step}, keep=3)
    return tmp_path


def test_what_is_saved_is_loaded(folder):
    checkpoint = load_checkpoint(folder)
    assert checkpoint.step == 3
    assert checkpoint.info["note"] == 3
    assert torch.equal(checkpoint.tensors["model"]["w"], torch.full((1000,), 3.0))


def test_a_missing_and_an_empty_folder_have_no_checkpoint(tmp_path):
    assert load_checkpoint(tmp_path / "none") is None
    assert load_checkpoint(tmp_path) is None


def test_the_two_newest_checkpoints_by_step_are_kept(tmp_path):
    for step in (9, 10, 11):
        save_checkpoint(tmp_path, step, state(step), {}, keep=1)
        os.utime(tmp_path / f"step-{step}", (1e9 - step, 1e9 - step))
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-11", "step-10"]


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "remove", "no_manifest", "manifest_not_json"])
def test_a_damaged_checkpoint_is_detected_and_the_previous_one_is_loaded(folder, harm, capsys):
    weights, manifest = folder / "step-3" / "model.safetensors", folder / "step-3" / "MANIFEST.json"
    data = bytearray(weights.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
    elif harm == "cut":
        weights.write_bytes(data[:-10])
    elif harm == "empty":
        weights.write_bytes(b"")
    elif harm == "remove":
        weights.unlink()
    elif harm == "no_manifest":
        manifest.unlink()
    else:
        manifest.write_text("{")
    assert damage(folder / "step-3")
    assert load_checkpoint(folder).step == 2
    assert "step-3 is damaged" in capsys.readouterr().err


def test_every_single_flipped_byte_is_found(folder):
    for name in ("model.safetensors", "info.json", "optimizer_0.safetensors"):
        path = folder / "step-3" / name
        data = path.read_bytes()
        for place in range(0, len(data), max(1, len(data) // 12)):
            path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
            assert damage(folder / "step-3"), (name, place)
        path.write_bytes(data)
    assert damage(folder / "step-3") is None


def test_damage_to_all_checkpoints_is_an_error(folder):
    for path in folder.iterdir():
        (path / "MANIFEST.json").unlink()
    with pytest.raises(ValueError, match=r"No undamaged checkpoint .*step-3.*step-2.*step-1.*train.resume=never"):
        load_checkpoint(folder)


WRITER = """
import sys, torch
from stdit.training.state import save_checkpoint
step = int(sys.argv[2])
print("ready", flush=True)
while True:
    step += 1
    save_checkpoint(sys.argv[1], step, {"model": {"w": torch.full((300_000,), float(step))}}, {}, keep=2)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_fifty_kills_while_writing_lose_no_saved_step(tmp_path):
    import random

    last = 0
    for trial in range(50):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(last)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        try:
            process.wait(timeout=random.Random(trial).uniform(0.005, 0.1))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        told = [int(line) for line in process.stdout.read().split()]
        process.wait()
        checkpoint = load_checkpoint(tmp_path)
        last = max([last, *told])
        assert last == 0 or checkpoint.step in (last, last + 1)
        last = checkpoint.step if checkpoint else 0


def test_a_full_disk_keeps_earlier_checkpoints_and_the_error_names_the_space_needed(folder):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(
            OSError,
            match=r"Checkpoint of step 4 could not be written .* MB are free; earlier checkpoints are untouched",
        ):
            save_checkpoint(folder, 4, state(4), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert load_checkpoint(folder).step == 3
    assert not list(folder.glob(".tmp-*"))
    save_checkpoint(folder, 4, state(4), {})
    assert load_checkpoint(folder).step == 4


def test_files_are_synced_before_the_checkpoint_is_renamed(tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append("rename"), rename(a, b)))
    save_checkpoint(tmp_path, 1, state(1), {})
    place = calls.index("rename")
    assert {os.path.basename(c) for c in calls[:place]} >= {"model.safetensors", "info.json", "MANIFEST.json"}
    assert calls[place + 1] == str(tmp_path)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Muon])
def test_an_optimizer_is_restored_exactly(kind, tmp_path):
    def steps(weight, optimizer, first, last):
        for i in range(first, last):
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
            optimizer.step()

    whole = torch.nn.Parameter(torch.ones(4, 4))
    steps(whole, kind([whole], lr=0.1), 0, 6)
    half = torch.nn.Parameter(torch.ones(4, 4))
    first = kind([half], lr=0.1)
    steps(half, first, 0, 3)
    tensors, numbers = flatten_optimizer(first)
    save_checkpoint(tmp_path, 3, {"optimizer": tensors}, {"optimizer": numbers})
    checkpoint = load_checkpoint(tmp_path)
    second = kind([half], lr=0.5)
    restore_optimizer(second, checkpoint.tensors["optimizer"], json.loads(json.dumps(checkpoint.info["optimizer"])))
    steps(half, second, 3, 6)
    assert torch.equal(whole, half)


def test_a_config_key_that_is_newer_than_the_checkpoint_counts_as_its_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    now, folders = to_plain(Config()), RunFolders("old")
    old = copy.deepcopy(now)
    del old["model"]["sink"], old["text"]
    save_checkpoint(folders.checkpoints, 1, {"model": {"w": torch.zeros(1)}}, {"config": old}, keep=2)
    config = TrainConfig()
    assert find_checkpoint(config, folders, now, to_plain(Config())) is not None
    now["model"]["sink"] = 1
    with pytest.raises(ValueError, match=r"model\.sink: 0 -> 1"):
        find_checkpoint(config, folders, now, to_plain(Config()))


def test_mask_probs_are_compared_by_their_normalised_values(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders, defaults = RunFolders("old"), to_plain(Config())

    def saved(scheme, shares):
        old = copy.deepcopy(defaults)
        old["objective"] |= {"mask_strategy": scheme, "mask_probs": shares}
        save_checkpoint(folders.checkpoints, 1, {"model": {"w": torch.zeros(1)}}, {"config": old}, keep=2)

    def found(scheme, shares):
        now = copy.deepcopy(defaults)
        now["objective"] |= {"mask_strategy": scheme, "mask_probs": {**defaults["objective"]["mask_probs"], **shares}}
        return find_checkpoint(TrainConfig(), folders, now, defaults)

    saved("shared", {"shared": 0.5, "prefix": 0.5})  # mask_probs have no effect with mask_strategy=shared
    assert found("shared", {}) is not None
    none = dict.fromkeys(defaults["objective"]["mask_probs"], 0.0)
    saved("mixed", {"shared": 1.0, "prefix": 3.0})  # a checkpoint older than the strategy `motion`
    assert found("mixed", {**none, "shared": 0.25, "prefix": 0.75}) is not None
    with pytest.raises(ValueError, match=r"objective\.mask_probs\.motion"):
        found("mixed", {**none, "shared": 0.25, "prefix": 0.75, "motion": 0.1})


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-5],
        lambda whole: whole + bytes(200),
        lambda whole: whole + b"hello,1,2,3,4,5,6,7,8,9,10,11,12,13\n",
        lambda whole: bytes(range(256)) * 10,
        lambda whole: b"",
        lambda whole: b"a,b\n1,2\n",
        lambda whole: whole + b"x" * 200_000 + b"\n",
    ],
)
def test_a_damaged_record_of_metrics_stops_no_run(tmp_path, damage):
    row = {name: 1 for name in metrics.columns(metrics.LEVELS)}
    logger = metrics.MetricsLogger(tmp_path, 0)
    logger.write([row, {**row, "step": 2}])
    logger.close()
    file = tmp_path / "training_metrics.csv"
    file.write_bytes(damage(file.read_bytes()))
    again = metrics.MetricsLogger(tmp_path, 2)
    again.write([{**row, "step": 3}])
    again.close()
    steps = [int(row["step"]) for row in metrics.read_metrics(file)]
    assert steps[-1] == 3 and steps == sorted(set(steps))


def test_damaged_newer_checkpoints_do_not_replace_the_last_intact_one(tmp_path):
    for step in (100, 200, 300):
        save_checkpoint(tmp_path, step, {"model": {"w": torch.full((10,), float(step))}}, {}, keep=3)
    for step in (200, 300):
        file = tmp_path / f"step-{step}" / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    save_checkpoint(tmp_path, 150, {"model": {"w": torch.zeros(10)}}, {}, keep=2)
    assert {path.name for path in list_checkpoints(tmp_path)} == {"step-300", "step-200", "step-150", "step-100"}
    assert load_checkpoint(tmp_path).step == 150


def test_a_checkpoint_with_non_finite_numbers_is_skipped(tmp_path):
    from safetensors.torch import save_file

    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"model": {"w": torch.ones(3)}}, {})
    path = tmp_path / "step-2"
    save_file({"w": torch.tensor([1.0, float("nan")])}, path / "model.safetensors")
    manifest = json.loads((path / "MANIFEST.json").read_text())
    data = (path / "model.safetensors").read_bytes()
    manifest["model.safetensors"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    assert load_checkpoint(tmp_path).step == 1

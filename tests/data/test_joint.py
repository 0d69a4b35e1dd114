"""Several data sets as one: drawn by weight, a pure function of (seed, step), with classes joined by name."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from stdit.config import Config, load_typed
from stdit.data.config import DataConfig, DatasetConfig
from stdit.data.datasets import build_dataset
from stdit.data.holdout import split
from stdit.data.identity import fingerprint
from stdit.data.joint import JointDataset
from stdit.data.samplers import BlockedSampler, BucketSampler, ClipSize, PackedSampler, UniformSampler, WeightedSampler
from stdit.recipes.order import build_order
from stdit.training.metrics import MetricsLogger
from stdit.vae import load_vae


class Clips:
    """Labelled clips that are numbers."""

    def __init__(self, count, names=None, num_classes=None):
        self.count, self.class_names = count, names
        self.num_classes = len(names) if names else num_classes or 0

    def __len__(self):
        return self.count

    def record(self, index):
        return {"label": index % self.num_classes if self.num_classes else None, "caption": str(index)}

    def name(self, index):
        return f"clip {index}"

    def shape(self, index):
        return (9, 32, 32)

    def load(self, index, rng, size=None):
        return {"latents": torch.tensor([index]), "conditions": dict(self.record(index))}


SIZES = [ClipSize(9, 32, 32), ClipSize(5, 32, 48)]


def inner(kind, seed, count):
    if kind == "uniform":
        return UniformSampler(seed, count, 1)
    if kind == "blocked":
        return BlockedSampler(seed, [count // 2, count - count // 2], 2, 1)
    buckets = np.arange(count) % 2
    sampler = BucketSampler if kind == "bucket" else PackedSampler
    return sampler(seed, buckets, SIZES, [16, 8], tokens=64)


def weighted(kind="uniform", weights=(3, 1), draws=8, seed=5):
    return WeightedSampler(seed, [inner(kind, 1, 20), inner(kind, 2, 10)], [0, 20], weights, draws=draws)


@pytest.mark.parametrize("kind", ["uniform", "blocked", "bucket", "packed"])
def test_a_step_depends_on_seed_and_step_alone_whatever_was_asked_before(kind):
    draws = 1 if kind in ("bucket", "packed") else 8
    one, two = weighted(kind, draws=draws), weighted(kind, draws=draws)
    steps = list(range(700, 720))
    assert [one.batch(s) for s in steps] == [two.batch(s) for s in reversed(steps)][::-1]
    assert [weighted(kind, draws=draws, seed=6).batch(s) for s in steps] != [one.batch(s) for s in steps]
    for ref in one.batch(3):
        assert ref.sample in one.candidates(ref.size)


def test_shares_are_exact_over_a_round_and_every_clip_of_a_set_comes_once_in_its_epochs():
    sampler = weighted()
    drawn = [ref.sample for step in range(WeightedSampler.ROUND // 8) for ref in sampler.batch(step)]
    assert sum(sample >= 20 for sample in drawn) == WeightedSampler.ROUND // 4
    for first, count in ((0, 20), (20, 10)):
        own = [sample for sample in drawn if first <= sample < first + count]
        for start in range(0, len(own) - count, count):
            assert sorted(own[start : start + count]) == list(range(first, first + count))
    halves = Counter(sample >= 20 for sample in drawn[:400])
    assert 60 < halves[True] < 140  # mixed within a round, too


def test_the_draws_go_on_from_one_round_to_the_next():
    sampler = weighted(draws=WeightedSampler.ROUND)
    own = [ref.sample for step in range(2) for ref in sampler.batch(step) if ref.sample >= 20]
    assert all(sorted(own[i : i + 10]) == list(range(20, 30)) for i in range(0, len(own) - 10, 10))


def test_a_weight_too_small_to_be_drawn_is_refused():
    with pytest.raises(ValueError, match=r"weight 1e-05 is less than 1/4096 of the sum"):
        weighted(weights=(1, 1e-5))


def test_classes_are_joined_by_their_names():
    joint = JointDataset([Clips(4, ["cat", "dog"]), Clips(4, ["ant", "dog"])], ["a", "b"])
    assert joint.class_names == ["ant", "cat", "dog"]
    assert [joint.record(i)["label"] for i in range(8)] == [1, 2, 1, 2, 0, 2, 0, 2]
    loaded = [joint.load(i, np.random.default_rng(0)) for i in (1, 5)]
    assert [sample["conditions"]["label"] for sample in loaded] == [2, 2]
    assert [int(sample["latents"]) for sample in loaded] == [1, 1]
    assert joint.identity(5).label == 2 and joint.identity(5).source == "1/clip 1"
    assert JointDataset([Clips(4, num_classes=3), Clips(2, num_classes=2)], ["a", "b"]).num_classes == 3


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ([Clips(4, ["a"]), Clips(4)], "'one' has labels, but 'two' has none"),
        ([Clips(4, ["a"]), Clips(4, num_classes=2)], "'one' has names of classes, but 'two' has none"),
    ],
)
def test_data_sets_that_do_not_go_together_are_refused(datasets, message):
    with pytest.raises(ValueError, match=message):
        JointDataset(datasets, ["one", "two"])


def test_a_hold_out_keeps_the_data_sets_apart():
    joint = JointDataset([Clips(30, ["a"]), Clips(10, ["b"])], ["one", "two"])
    kept, held = split(joint, 0.2)
    assert [k + h for k, h in zip(kept.parts, held.parts, strict=True)] == [30, 10]
    assert sum(kept.parts) == len(kept) and [kept.record(i)["label"] for i in range(len(kept))] == sorted(
        kept.record(i)["label"] for i in range(len(kept))
    )


def config(*overrides, path="t.yaml"):
    return load_typed(Config, path, list(overrides))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MetricsLogger, "curves", lambda *args, **options: None)  # a drawing takes longer than the run
    text = """
name: t
data: {num_frames: 5, height: 32, width: 32, workers: 0, datasets: [{root: a, source: shapes, weight: 3}, {root: b, source: shapes}]}
model: {size: S/2, depth: 1, hidden_size: 32, num_heads: 2}
train: {steps: 6, batch_size: 4, checkpoint_every: 2, samples: 0, precision: fp32}
"""
    (tmp_path / "t.yaml").write_text(text)
    return tmp_path


def test_a_config_gives_an_order_by_weight_and_another_weight_another_order(home, capsys):
    built = config("data.num_shapes=12")
    dataset = build_dataset(built.data)
    assert len(dataset) == 24 and dataset.parts == [12, 12]
    order = build_order(built, dataset, load_vae("tiny"), patch=(1, 2, 2), processes=1)
    assert "a: 12 clips, 75.0% of what is drawn" in capsys.readouterr().out
    drawn = [ref.sample for step in range(1024) for ref in order.batch(step)]
    assert sum(sample >= 12 for sample in drawn) == 1024
    assert fingerprint(dataset) != fingerprint(build_dataset(config("data.num_shapes=11").data))


def test_a_run_on_cached_latents_of_two_folders_resumes_bit_for_bit(home, capsys):
    from stdit.recipes import cache_latents, train
    from stdit.training.state import list_checkpoints, read_checkpoint

    for name, count in (("one", 12), ("two", 5)):
        given = ["t.yaml", "data.datasets=[]", "data.source=shapes", f"data.num_shapes={count}", "--output", name]
        assert cache_latents.main(given) == 0
    with pytest.raises(ValueError, match="cache each data set by itself"):
        cache_latents.main(["t.yaml", "--output", "x"])
    both = "data.datasets=[{root: one, weight: 1}, {root: two, weight: 2}]"
    assert train.run(["t.yaml", "name=whole", both]) == 0
    for steps in (3, 6):
        assert train.run(["t.yaml", "name=parts", both, f"train.steps={steps}"]) == 0
    states = [read_checkpoint(list_checkpoints(Path("checkpoints") / name)[0]).tensors for name in ("whole", "parts")]
    for group, tensors in states[0].items():
        assert all(torch.equal(value, states[1][group][key]) for key, value in tensors.items())
    capsys.readouterr()
    assert train.run(["t.yaml", "name=parts", both.replace("weight: 2", "weight: 3"), "train.steps=7"]) == 1
    assert "data.datasets" in capsys.readouterr().err
    info = json.loads(Path("two/cache.json").read_text())
    Path("two/cache.json").write_text(json.dumps({**info, "vae_fingerprint": "0" * 16}))
    assert train.run(["t.yaml", "name=other", both]) == 1
    assert "the latents in 'two' were made with VAE 'tiny', whose weights differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("[{weight: 2}]", "has no root"),
        ("[{root: a, weight: 0}]", "weight must be > 0"),
        ("[{root: a, source: shapes}, {root: none}]", "'none' does not exist"),
    ],
)
def test_entries_that_are_none_are_refused_in_one_line(home, entries, message):
    with pytest.raises(ValueError, match=message) as found:
        build_dataset(config(f"data.datasets={entries}").data)
    assert "\n" not in str(found.value)


def test_latents_and_clips_are_not_mixed(home):
    from stdit.recipes import cache_latents

    assert (
        cache_latents.main(["t.yaml", "data.datasets=[]", "data.source=shapes", "data.num_shapes=3", "--output", "l"])
        == 0
    )
    both = [DatasetConfig("l"), DatasetConfig("a", source="shapes")]
    with pytest.raises(ValueError, match="latents that are cached and clips"):
        build_dataset(DataConfig(num_frames=5, height=32, width=32, datasets=both))

"""The loss on held-out clips, and averages whose length is chosen afterwards."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from stdit.data.config import DataConfig
from stdit.data.datasets import build_dataset
from stdit.data.holdout import split
from stdit.recipes import average as average_recipe
from stdit.recipes import entry, train
from stdit.training.averages import PowerAverages, Snapshot, average, exponent, read_snapshots, weights_of
from stdit.training.held_out import HeldOutDraws, steps_between

ROOT = Path(__file__).resolve().parents[2]
TINY = """
name: t
data: {source: shapes, num_frames: 5, height: 32, width: 32, num_shapes: 40, workers: 0}
model: {size: S/2, depth: 1, hidden_size: 32, num_heads: 2}
objective: {mask_strategy: mixed}
train: {steps: 60, batch_size: 2, lr: 1.0e-3, ema_decay: 0.9, checkpoint_every: 20, log_every: 7, preview_every: 1000,
        samples: 0, precision: fp32, holdout: 0.2, average_lengths: [0.05, 0.1]}
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.yaml").write_text(TINY)
    return tmp_path


def go(*overrides: str) -> int:
    return train.run(["t.yaml", *overrides])


def measured(name: str) -> dict[int, float]:
    with open(f"output/{name}/training_metrics.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {int(row["step"]): float(row["held_out_loss"]) for row in rows if row["held_out_loss"]}


def shapes(count: int = 40):
    return build_dataset(DataConfig(source="shapes", num_frames=5, height=32, width=32, num_shapes=count))


def table(folder: Path, rows: list[str]):
    """A dataset of a manifest whose files are never opened."""
    for row in rows[1:]:
        (folder / row.split(",")[0]).write_bytes(row.encode())
    (folder / "clips.csv").write_text("\n".join(rows) + "\n")
    return build_dataset(
        DataConfig(root=str(folder), manifest=str(folder / "clips.csv"), num_frames=5, height=32, width=32)
    )


def test_a_share_of_the_files_is_held_out_and_each_is_on_one_side():
    kept, held = split(shapes(), 0.2)
    assert len(held) == 8 and len(kept) == 32
    assert sorted([*kept.indices, *held.indices]) == list(range(40))
    assert list(split(shapes(), 0.2)[1].indices) == list(held.indices)


def test_clips_of_one_value_of_a_column_stay_together(tmp_path):
    data = table(tmp_path, ["path,scene", *(f"{i}.mp4,scene{i % 5}" for i in range(20))])
    kept, held = split(data, 0.4, "scene")
    scenes = [{part.record(i)["scene"] for i in range(len(part))} for part in (kept, held)]
    assert len(scenes[1]) == 2 and not scenes[0] & scenes[1]
    kept, held = split(data, 0.0, "scene", ["scene3"])
    assert len(held) == 4 and {held.record(i)["scene"] for i in range(4)} == {"scene3"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0.99,), "leaves no clip to train on"),
        ((0.0, "scene", ["scene0", "scene1"]), "leaves no clip to train on"),
        ((0.2, "place"), "it has scene"),
        (
            (0.0, "scene", ["scene7"]),
            r"'scene7', which the column 'scene' does not. Did you mean 'scene1'\? It has scene0, scene1",
        ),
    ],
)
def test_a_holdout_that_cannot_be_is_refused(tmp_path, arguments, words):
    data = table(tmp_path, ["path,scene", *(f"{i}.mp4,scene{i % 2}" for i in range(4))])
    with pytest.raises(ValueError, match=words):
        split(data, *arguments)


def test_the_held_out_loss_is_written_and_no_held_out_clip_is_trained_on(home, monkeypatch):
    trained, loaded = set(), build_dataset
    original = train.batches

    def watching(dataset, *args, **kwargs):
        trained.update(dataset.indices.tolist())
        return original(dataset, *args, **kwargs)

    monkeypatch.setattr(train, "batches", watching)
    assert go("train.steps=4") == 0
    assert list(measured("t")) == [4]  # after the last step
    held = split(loaded(DataConfig(source="shapes", num_frames=5, height=32, width=32, num_shapes=40)), 0.2)[1]
    assert trained and not trained & set(held.indices.tolist())


def test_the_held_out_loss_is_in_the_curves_and_in_tensorboard(home, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **k: drawn.append(self) or Path(path).touch())
    monkeypatch.setattr(train, "steps_between", lambda clips: 5)
    assert go("train.steps=14", "train.average_lengths=[]") == 0
    expected = measured("t")
    assert list(expected) == [5, 10, 14]
    points = events.EventAccumulator("output/t/tensorboard").Reload().Scalars("train/held_out_loss")
    assert {one.step: one.value for one in points} == pytest.approx(expected, rel=1e-6)
    line = next(one for one in drawn[-1].axes[0].lines if one.get_label() == "held out, averaged weights")
    assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == pytest.approx(expected, rel=1e-6)


def test_a_resumed_run_measures_the_same_held_out_losses_and_averages(home, monkeypatch):
    monkeypatch.setattr(train, "steps_between", lambda clips: 20)
    assert go("name=whole") == 0
    assert go("name=parts", "train.steps=40") == 0
    assert go("name=parts") == 0
    assert list(measured("whole")) == [20, 40, 60] and measured("parts") == measured("whole")
    for step in (20, 40, 60):
        one, two = (load_file(f"checkpoints/{n}/averages/step-{step}.safetensors") for n in ("whole", "parts"))
        assert one and all(torch.equal(value, two[key]) for key, value in one.items())


def test_draws_do_not_depend_on_the_number_of_processes_or_the_size_of_a_batch():
    draws, fewer = (HeldOutDraws(shapes(7), dict.fromkeys(range(7)), seed=0, together=n) for n in (8, 3))
    sizes = set()

    def loss(batch):
        sizes.add(len(batch.keys))
        return batch.pixels.float().flatten(1).mean(1) + torch.tensor([key[1] + key[2] for key in batch.keys])

    alone = draws.losses(loss, process=0, processes=1)
    shared = sum(draws.losses(loss, process=p, processes=3) for p in range(3))
    assert len(alone) == 64 and torch.equal(alone, shared) and sizes == {8}
    assert torch.equal(fewer.losses(loss), alone) and sizes == {8, 3, 2}
    assert torch.equal(sum(fewer.losses(loss, process=p, processes=5) for p in range(5)), alone)


def test_unreadable_held_out_files_are_said_and_replaced(tmp_path):
    data = table(tmp_path, ["path", *(f"{i}.mp4" for i in range(3))])
    draws = HeldOutDraws(data, dict.fromkeys(range(3)), seed=0)
    with pytest.raises(ValueError, match="could not be read"):  # none of them is a video
        draws.losses(lambda batch: torch.zeros(len(batch.keys)))
    aside: dict[str, str] = {}
    processed = HeldOutDraws(shapes(4), dict.fromkeys(range(4)), seed=0, decoder_process=True, timeout=30)
    here = HeldOutDraws(shapes(4), dict.fromkeys(range(4)), seed=0)
    means = [
        d.losses(lambda batch: batch.pixels.float().flatten(1).mean(1), set_aside=aside) for d in (processed, here)
    ]
    assert torch.equal(*means) and not aside


def test_a_subset_knows_the_rates_of_its_clips():
    whole = shapes(4)
    whole.rates = [25.0]
    assert split(whole, 0.5)[0].rates == [25.0]


def test_measuring_takes_less_than_two_percent_of_the_clips():
    for clips in (1, 4, 16, 256, 4096):
        assert 64 / (steps_between(clips) * clips) < 0.02


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.holdout=1.0", "holdout"),
        ("train.holdout_column=scene", "scene"),
        ("train.holdout_values=[a]", "holdout_column"),
        ("train.average_lengths=[0.5]", "0.288"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(home, capsys, override, words):
    (home / "t.yaml").write_text(TINY.replace("holdout: 0.2, ", "") if "holdout_column" in override else TINY)
    assert go(override) == 1
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said


def test_exponents_have_the_lengths_of_their_power_functions():
    for length in (0.02, 0.05, 0.1, 0.25):
        gamma = exponent(length)
        assert ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5 == pytest.approx(length, rel=1e-9)


def test_snapshots_give_averages_of_other_lengths(tmp_path):
    """Of weights that move at random, against the average that was kept all along."""
    torch.manual_seed(0)
    model = nn.Linear(30, 30)
    kept, truth = PowerAverages(model, [0.05, 0.1]), PowerAverages(model, [0.07, 0.13])
    for step in range(1, 801):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * torch.randn_like(p))
        for averages in (kept, truth):
            averages.update(model, step)
        if step % 100 == 0:
            kept.write(model, tmp_path, step)
    snapshots = read_snapshots(tmp_path, 800)
    for length, values in zip(truth.lengths, truth.values, strict=True):
        found = average(snapshots, length, 800)
        wanted = dict(zip(truth.names, values, strict=True))
        last = (model.weight - wanted["weight"]).norm()
        assert (found["weight"] - wanted["weight"]).norm() < 0.05 * last
    assert np.isclose(weights_of(snapshots, 0.08, 800).sum(), 1, atol=0.01)


def test_a_length_that_the_snapshots_cannot_give_is_refused(tmp_path):
    model = nn.Linear(2, 2)
    averages = PowerAverages(model, [0.05, 0.1])
    averages.write(model, tmp_path, 100)
    with pytest.raises(ValueError, match=r"do not give an average of length 0\.01 .*choose one between"):
        weights_of(read_snapshots(tmp_path, 100), 0.01, 100)
    with pytest.raises(ValueError, match="has no snapshots"):
        read_snapshots(tmp_path / "none", 100)


@pytest.mark.parametrize("length", [0.001, 0.05, 0.08, 0.2])
def test_a_snapshot_is_to_be_restored_only_where_it_would_give_the_length(length):
    found = [
        Snapshot(Path(f"step-{step}.safetensors"), i, step, exponent(own))
        for step in (20, 40, 60) for i, own in enumerate((0.05, 0.1))
    ]  # fmt: skip
    try:
        weights_of(found, length, 60)
        words = "restore step-60.safetensors"
    except ValueError as error:
        words = "do not give an average of length .*; choose one between"
        assert re.search(words, str(error))
    with pytest.raises(ValueError, match=words):
        weights_of(found[:4], length, 60)


def test_further_averages_cannot_begin_within_a_run(home, capsys):
    assert go("train.steps=20", "train.average_lengths=[]") == 0
    assert go("train.steps=40", "train.allow_changes=true") == 1
    assert "they begin with a run" in capsys.readouterr().err


def test_averages_do_not_go_on_as_those_of_other_lengths(home, capsys):
    assert go("train.steps=20") == 0
    assert go("train.steps=40", "train.average_lengths=[0.05,0.2]", "train.allow_changes=true") == 1
    assert "averages of the lengths [0.05, 0.1], but train.average_lengths=[0.05, 0.2]" in capsys.readouterr().err
    assert go("train.average_lengths=[0.1,0.1]") == 1
    assert "has one length twice" in capsys.readouterr().err


def test_the_average_command_writes_the_length_with_the_least_held_out_loss(home, capsys):
    assert go() == 0
    capsys.readouterr()
    assert entry.run(average_recipe.main, ["t"]) == 0
    said = capsys.readouterr().out
    tried = {
        float(line.split()[1].rstrip(":")): float(line.split()[2]) for line in said.splitlines() if "  length" in line
    }
    best = min(tried, key=tried.__getitem__)
    assert len(tried) > 3 and f"over a length of {best:.3f}" in said
    assert (home / "models/t-average/model_index.json").is_file()
    assert entry.run(average_recipe.main, ["t"]) == 1 and "exists" in capsys.readouterr().err
    assert entry.run(average_recipe.main, ["t", "--length", "0.07", "--output", "models/other"]) == 0
    assert entry.run(average_recipe.main, ["t", "--length", "0.001", "--output", "models/none"]) == 1
    assert "do not give" in capsys.readouterr().err
    step = max((home / "checkpoints/t").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    assert entry.run(average_recipe.main, [str(step), "--length", "0.07", "--output", "models/of-step"]) == 0
    newest = home / f"checkpoints/t/averages/{step.name}.safetensors"
    newest.rename(newest.with_suffix(".lost"))
    assert entry.run(average_recipe.main, ["t", "--length", "0.07", "--output", "models/none"]) == 1
    assert f"restore {Path('checkpoints/t/averages', newest.name)}" in capsys.readouterr().err.replace(f"{home}/", "")


@pytest.mark.parametrize(
    ("lost", "overrides", "words"),
    [
        ("step-60", [], "the last snapshot is of step 40, .*restore .*step-60.safetensors, or train for more steps"),
        ("step-none", ["train.holdout=0", "train.steps=20"], "held no clips out"),
    ],
)
def test_an_average_that_cannot_be_chosen_is_refused_before_the_model_is_loaded(
    home, monkeypatch, capsys, lost, overrides, words
):
    assert go(*overrides) == 0
    Path(f"checkpoints/t/averages/{lost}.safetensors").unlink(missing_ok=True)
    monkeypatch.setattr(average_recipe, "pipeline_of", None)
    capsys.readouterr()
    assert entry.run(average_recipe.main, ["t"]) == 1
    said = capsys.readouterr().err.strip()
    assert re.search(words, said) and "\n" not in said

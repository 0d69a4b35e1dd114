"""Measurements of `stdit evaluate` refuse, before any work, what would have no influence on them."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from stdit.evaluation.held_out import EvalResult, Metric
from stdit.files import read_json
from stdit.recipes import evaluate, evaluate_tasks
from stdit.recipes.against import paired_difference, read_saved
from stdit.recipes.entry import run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "clips", "--shift", "3"], "--shift is for sampling, and --input measures clips that are there"),
        (["--input", "clips", "--reference", "clips", "--seed", "2"], "--seed is for sampling, and --input measures"),
        (["--input", "clips", "--clips", "4"], "--clips has no influence on the shapes of clips that are there"),
        (["--features", "vae"], "--features has no influence on the shapes of a model's clips; leave it out"),
        (["--reference", "clips", "--against", "a.json"], "--against has no influence on distances to a reference"),
        (
            ["--captions", "red circle", "--reference", "clips"],
            "--reference has no influence on how captions are followed",
        ),
        (["--paired", "--reference", "clips"], "--paired compares --input with --reference"),
        (["--noise", "0.3"], "--noise has no influence on the shapes of a model's clips"),
        (["--round-trip", "tiny", "--shift", "3"], "--shift has no influence on the round trip of drawn clips"),
        (["--round-trip", "tiny", "--noise", "-1"], "--noise must be >= 0, got -1.0"),
        (["--round-trip", "tiny", "--size", "16"], "--size must be >= 32, got 16"),
        (["--clips", "0"], "--clips must be >= 1, got 0"),
        (["--seed", "-1"], "--seed must be >= 0, got -1"),
        (["--frames", "1"], "--frames must be >= 2, got 1"),
    ],
)
def test_an_argument_without_influence_is_refused_in_one_line(arguments, message, capsys):
    assert run(evaluate.main, arguments) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_the_round_trip_adds_noise_of_the_asked_deviation_to_the_latents_of_drawn_clips(monkeypatch, capsys):
    pixels = SimpleNamespace(device="cpu", encode=lambda clips: clips, decode=lambda latents: latents)
    monkeypatch.setattr(evaluate, "load_vae", lambda name, key: SimpleNamespace(to=lambda device: pixels))

    def psnr_of(*arguments):
        small = ["--clips", "36", "--frames", "5", "--size", "48"]
        assert evaluate.main(["--round-trip", "pixels", *small, *arguments]) == 0
        out = capsys.readouterr().out
        assert "drawn clips: shape by fill 100.0%" in out and "shape by fill       36" in out
        return float(out.split("PSNR ")[1].split(" dB")[0])

    assert psnr_of() > 120
    assert psnr_of("--noise", "0.1") == pytest.approx(20 * np.log10(2 / 0.1), abs=0.02)


def test_an_evaluation_of_another_seed_or_without_clips_is_refused(tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"seed": 3, "right": {"shape": [True]}}))
    args = SimpleNamespace(against=str(path), seed=1)
    assert read_saved(args, "right", seed=3, frames=17) == {"shape": [True]}
    assert read_saved(args, "right") == {"shape": [True]}
    with pytest.raises(ValueError, match=r"measured with seed 3, which cannot be compared with seed 1; add --seed 3\."):
        read_saved(args, "right", seed=1)
    with pytest.raises(ValueError, match="is what this evaluation writes; copy it to another name first"):
        read_saved(args, "right", path, seed=3)
    path.write_text(json.dumps({"seed": 3}))
    with pytest.raises(ValueError, match="holds no clips to compare with"):
        read_saved(args, "right", seed=3)


def test_an_unknown_task_and_no_clips_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(evaluate_tasks, "load", lambda path: None)
    monkeypatch.setattr(evaluate_tasks, "straight", lambda *given: {"animate": None})
    assert run(evaluate_tasks.main, ["--model", "m", "--tasks", "animate", "edit"]) == 1
    assert "--tasks 'edit' is not a task of this model; choose from animate" in capsys.readouterr().err
    assert run(evaluate_tasks.main, ["--model", "m", "--clips", "0"]) == 1
    assert "--clips must be >= 1, got 0" in capsys.readouterr().err


def test_the_interval_of_a_difference_of_shares_ends_at_one():
    assert paired_difference([True] * 4, [False] * 4)[::2] == (1.0, 1.0)


def test_the_interval_of_a_difference_of_means_is_that_of_the_paired_values():
    ours, theirs = [1.0, 2.0, 3.0, 6.0], [0.0, 2.0, 2.0, 4.0]  # differences 1, 0, 1, 2: standard deviation 0.8165
    assert paired_difference(ours, theirs) == pytest.approx(
        (1.0, 1 - 1.96 * 0.8165 / 2, 1 + 1.96 * 0.8165 / 2), abs=1e-4
    )
    assert paired_difference([5.0], [4.0]) == (1.0, -np.inf, np.inf)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A function that measures two tasks of a model of fixed results: their shares right and errors; None: never."""
    monkeypatch.chdir(tmp_path)
    config = SimpleNamespace(num_frames=17, height=64)
    monkeypatch.setattr(evaluate_tasks, "load", lambda path: SimpleNamespace(config=config))

    def measure(correct, errors, *arguments):
        def task():
            assert correct is not None, "sampled before the file was read"
            share, error = Metric.share("right", np.array(correct)), Metric.mean("error", np.array(errors), "px")
            return EvalResult([share, error, Metric("jump", float("inf"))], [])

        monkeypatch.setattr(evaluate_tasks, "straight", lambda *_: {"edit": task, "animate": task})
        return run(evaluate_tasks.main, ["--model", "models/m", "--clips", "4", *arguments])

    return measure


def test_tasks_are_compared_with_saved_ones_clip_by_clip(measured, capsys):
    assert measured([True, True, False, True], [1.0, 2.0, 3.0, np.nan]) == 0
    assert "against" not in capsys.readouterr().out
    written = read_json(Path("output/m/tasks.json"))  # which refuses what is no number of JSON
    assert written["values"]["edit"] == {"right": [True, True, False, True], "error": [1.0, 2.0, 3.0, None]}
    assert [one["value"] for one in written["figures"]] == [0.75, None, None] * 2
    Path("output/m/tasks.json").rename("base.json")
    assert measured([True, False, False, False], [1.5, 2.0, 4.0, 9.0], "--tasks", "edit", "--against", "base.json") == 0
    right, error = [line.split() for line in capsys.readouterr().out.splitlines() if "against base.json" in line]
    assert right[:4] == ["right", "4", "-50.0", "points"]
    assert error[:4] == ["error", "3", "+0.50", "px"]  # a clip without value is left out
    assert error[-4:] == ["%:", "-0.07", "to", "+1.07)"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "2"], "base.json was measured with seed 1, which cannot be compared with seed 2; add --seed 1."),
        (
            ["--clips", "5"],
            "base.json was measured with clips 4, which cannot be compared with clips 5; add --clips 4.",
        ),
        ([], "base.json has no task animate; add --tasks edit."),
        (["--tasks", "animate"], "base.json has no task animate; give one of --tasks animate."),
        (["--bounce", "b"], "--against compares one model, and 2 are given; give one."),
    ],
)
def test_tasks_of_other_clips_are_refused_before_any_sampling(measured, capsys, arguments, message):
    assert measured([True] * 4, [1.0] * 4, "--tasks", "edit") == 0
    Path("output/m/tasks.json").rename("base.json")
    assert measured(None, None, *arguments, "--against", "base.json") == 1
    assert capsys.readouterr().err == message + "\n"

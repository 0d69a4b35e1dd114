"""Measurements of `stdit evaluate` refuse, before any work, what would have no influence on them."""

import json

import pytest

from stdit.evaluation.shapes import paired_difference
from stdit.recipes import evaluate, evaluate_tasks
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


def test_an_evaluation_of_another_seed_or_without_clips_is_refused(tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"seed": 3, "right": {"shape": [True]}}))
    assert evaluate.read_evaluation(path, seed=3, frames=17) == {"shape": [True]}
    assert evaluate.read_evaluation(path) == {"shape": [True]}
    with pytest.raises(ValueError, match=r"clips of seed 3, which cannot be compared with seed 1; add --seed 3\."):
        evaluate.read_evaluation(path, seed=1)
    path.write_text(json.dumps({"seed": 3}))
    with pytest.raises(ValueError, match="holds no clips to compare with"):
        evaluate.read_evaluation(path, seed=3)


def test_an_unknown_task_and_no_clips_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(evaluate_tasks, "load", lambda path: None)
    monkeypatch.setattr(evaluate_tasks, "straight", lambda *given: {"animate": None})
    assert run(evaluate_tasks.main, ["--model", "m", "--tasks", "animate", "edit"]) == 1
    assert "--tasks 'edit' is not a task of this model; choose from animate" in capsys.readouterr().err
    assert run(evaluate_tasks.main, ["--model", "m", "--clips", "0"]) == 1
    assert "--clips must be >= 1, got 0" in capsys.readouterr().err


def test_the_interval_of_a_difference_of_shares_ends_at_one():
    assert paired_difference([True] * 4, [False] * 4)[::2] == (1.0, 1.0)

"""Measurements of `stdit evaluate` refuse, before any work, what would have no influence on them."""

import json

import pytest

from stdit.recipes import evaluate
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
    assert evaluate.read_evaluation(path, 3) == {"shape": [True]}
    assert evaluate.read_evaluation(path, None) == {"shape": [True]}
    with pytest.raises(ValueError, match=r"is of seed 3, and clips of seed 1 are not the same ones; add --seed 3\."):
        evaluate.read_evaluation(path, 1)
    path.write_text(json.dumps({"seed": 3}))
    with pytest.raises(ValueError, match="holds no clips to compare with"):
        evaluate.read_evaluation(path, 3)

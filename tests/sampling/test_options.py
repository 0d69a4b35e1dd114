"""Sampling options validate themselves, define the command-line flags, and load without torch."""

import argparse
import dataclasses
import json
import subprocess
import sys
import warnings
from typing import get_args

import pytest

from stdit import legacy
from stdit.precision import Precision
from stdit.sampling import options
from stdit.sampling.labels import read_labels
from stdit.sampling.options import SamplingOptions, add_flags, make_options, options_from
from stdit.sampling.schedule import ARRANGEMENTS


def parse(*arguments: str) -> SamplingOptions:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return options_from(parser.parse_args(arguments))


def test_options_and_labels_import_neither_torch_nor_diffusers_nor_accelerate():
    code = (
        "import sys, stdit.sampling.options, stdit.sampling.labels; stdit.sampling.options.SamplingOptions(seed=3); "
        "print([m for m in ('torch', 'diffusers', 'accelerate', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_of_options_are_those_of_the_tables():
    assert get_args(options.Arrangement) == tuple(ARRANGEMENTS)
    assert get_args(options.Precision) == get_args(Precision)


def test_without_flags_options_have_their_defaults_and_each_flag_sets_its_field():
    assert parse() == SamplingOptions()
    given = parse(
        *[
            "--steps",
            "ddim50",
            "--shift",
            "2.5",
            "--guidance",
            "3",
            "--guidance-interval",
            "0.1",
            "0.9",
            "--guidance-channels",
            "3",
            "--guider",
            "cfg_zero",
            "--history-guidance",
            "2",
            "--history-noise",
            "0.3",
            "--seed",
            "4",
        ],
        *[
            "--solver",
            "heun",
            "--arrangement",
            "pyramid",
            "--stagger",
            "2",
            "--window",
            "9",
            "--overlap",
            "5",
            "--blend",
            "1",
            "--tile",
            "16",
            "--fps",
            "12",
        ],
    )
    changed = [f.name for f in dataclasses.fields(SamplingOptions) if getattr(given, f.name) != f.default]
    with_flag = [f.name for f in dataclasses.fields(SamplingOptions) if f.metadata["flag"]]
    assert set(with_flag) - set(changed) == {"chunk_size"}  # of another arrangement
    assert (given.num_inference_steps, given.guidance_interval, given.fps) == ("ddim50", (0.1, 0.9), 12.0)
    assert parse("--arrangement", "autoregressive", "--chunk-size", "3").chunk_size == 3
    assert parse("--steps", "12").num_inference_steps == 12


def test_every_option_has_a_help_text_and_the_old_flag_is_hidden(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert all(f.metadata["help"] for f in dataclasses.fields(SamplingOptions))
    parser = argparse.ArgumentParser()
    add_flags(parser)
    shown = parser.format_help()
    assert "--stagger" in shown
    assert "euler, heun, ab2, dpmpp_2m, flow_map, ddim, ddpm" in shown
    assert "--every" not in shown


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be >= 1, got 0."),
        ({"num_inference_steps": "few"}, "num_inference_steps must be a whole number, or ddimN .* got 'few'"),
        ({"num_inference_steps": 2.5}, "got 2.5"),
        ({"shift": 0.0}, "shift must be a positive number, got 0.0; 1 is no shift."),
        ({"guidance_scale": float("nan")}, "guidance_scale must be >= 0, got nan; 1 is no guidance."),
        ({"guidance_interval": (500, 999)}, r"two levels with 0 <= low <= high <= 1, got \(500, 999\)"),
        ({"guidance_interval": (0.2, 0.1)}, r"0 <= low <= high <= 1, got \(0.2, 0.1\)"),
        ({"guidance_interval": (0.2,)}, "must be two levels"),
        ({"guidance_channels": 0}, "guidance_channels must be >= 1"),
        ({"solver": "eulr"}, "Unknown solver 'eulr'. Did you mean 'euler'"),
        ({"arrangement": "pyramyd"}, "Did you mean 'pyramid'"),
        ({"precision": "fp16"}, "Unknown precision 'fp16'"),
        ({"chunk_size": 2}, "chunk_size=2 has no meaning with arrangement='together'; leave it out, or use"),
        ({"stagger": 2, "arrangement": "autoregressive"}, "or use arrangement='pyramid'"),
        ({"overlap": 0}, "overlap must be >= 1"),
        ({"tile": 2}, "tile must be >= 3, got 2, since neighbouring tiles overlap; use 16 or more."),
        ({"fps": 0.0}, "fps must be a positive number, got 0.0."),
        ({"batch_size": 0}, "batch_size must be >= 1"),
    ],
)
def test_values_that_no_model_could_use_are_refused_in_one_line(choices, message):
    with pytest.raises(ValueError, match=message) as error:
        SamplingOptions(**choices)
    assert "\n" not in str(error.value)


def test_a_refusal_on_the_command_line_names_the_flag():
    with pytest.raises(ValueError, match="^--guidance must be >= 0, got -1.0; 1 is no guidance.$"):
        parse("--guidance", "-1")
    with pytest.raises(ValueError, match="^--steps must be >= 1, got 0.$"):
        parse("--steps", "0")


def test_keywords_change_given_options_and_an_unknown_one_names_the_nearest():
    changed = make_options(SamplingOptions(seed=3, tile=8), {"seed": 4})
    assert (changed.seed, changed.tile) == (4, 8)
    with pytest.raises(TypeError, match="Unknown sampling option 'sovler'. Did you mean 'solver'"):
        make_options(None, {"sovler": "euler"})


@pytest.mark.parametrize(("arrangement", "name"), [("autoregressive", "chunk_size"), ("pyramid", "stagger")])
def test_the_old_option_every_sets_the_option_of_the_arrangement_with_one_warning(arrangement, name, monkeypatch):
    monkeypatch.setattr(legacy, "_warned", set())
    with pytest.warns(UserWarning, match=f"'every' is now called '{name}'"):
        given = make_options(None, {"every": 2, "arrangement": arrangement})
    assert given == SamplingOptions(arrangement=arrangement, **{name: 2})
    with pytest.warns(UserWarning, match="'--every' is now called"):
        assert parse("--every", "2", "--arrangement", arrangement) == given
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_options(None, {"every": 2, "arrangement": arrangement})


def test_labels_sizes_and_rates_are_read_from_the_json_of_a_folder(tmp_path):
    with pytest.raises(ValueError, match="no model_index.json"):
        read_labels(tmp_path)
    (tmp_path / "transformer").mkdir()
    index = {"num_frames": 9, "height": 32, "width": 48, "fps": 8.0, "schemes": ["teacher"]}  # as 0.1.0 wrote it
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    model = {"num_classes": 2, "class_names": ["a", "b"], "caption_channels": None, "causal": True}
    (tmp_path / "transformer/config.json").write_text(json.dumps(model))
    found = read_labels(tmp_path)
    assert (found.class_names, found.num_classes, found.captions, found.causal) == (("a", "b"), 2, False, True)
    assert (found.num_frames, found.height, found.width, found.fps) == (9, 32, 48, 8.0)
    assert found.mask_strategies == ("teacher_forcing",)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_labels(tmp_path)


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        (
            "transformer/config.json",
            {"class_names": [0, 1]},
            "class_names has 0, which is not a name; write it as text",
        ),
        ("transformer/config.json", {"class_names": [["a"], ["b"]]}, "class_names has .*, which is not a name"),
        (
            "transformer/config.json",
            {"class_names": 5},
            "class_names=5 is not a list; write a list of one name per class",
        ),
        ("transformer/config.json", {"class_names": "ab"}, "class_names='ab' is not a list"),
        ("transformer/config.json", {"class_names": {"a": 0}}, "class_names={'a': 0} is not a list"),
        ("transformer/config.json", {"num_classes": "2"}, "num_classes='2' .* is not a whole number >= 0; correct it"),
        ("model_index.json", {"mask_strategies": 5}, "mask_strategies=5 .* is not a list of names; correct it"),
        ("model_index.json", {"fps": None}, "fps=None .* is not a number above 0; correct it"),
        ("model_index.json", None, "model_index.json has no num_frames; copy or export the model again"),
    ],
)
def test_settings_of_another_kind_in_a_model_folder_are_refused_in_one_line(tmp_path, file, changes, words):
    (tmp_path / "transformer").mkdir()
    files = {
        "model_index.json": {"num_frames": 9, "height": 32, "width": 48, "fps": 8.0},
        "transformer/config.json": {"num_classes": 2, "class_names": ["a", "b"]},
    }
    for name, settings in files.items():
        (tmp_path / name).write_text(json.dumps(settings))
    read_labels(tmp_path)
    (tmp_path / file).write_text("{}" if changes is None else json.dumps({**files[file], **changes}))
    with pytest.raises(ValueError, match=words) as refused:
        read_labels(tmp_path)
    assert "\n" not in str(refused.value)

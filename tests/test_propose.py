import json
import random

import numpy as np
import pytest
from omegaconf import OmegaConf

from stdit.data.facts import Facts, too_short
from stdit.data.video_write import write_video
from stdit.recipes import budget, propose, train
from stdit.recipes.budget import Budget
from stdit.recipes.propose import fit
from stdit.vae import VideoVAE

TINY = [
    "model.depth=1",
    "model.hidden_size=32",
    "model.num_heads=2",
    "train.samples=0",
    "train.steps=2",
    "train.batch_size=2",
]
TINY += ["train.preview_every=100", "data.workers=0"]


@pytest.fixture
def clips(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("left", "right"):
        for i in range(2):
            folder = tmp_path / "my clips" / name
            folder.mkdir(parents=True, exist_ok=True)
            write_video(folder / f"{i}.mp4", rng.integers(0, 255, (30, 48, 80, 3), np.uint8), fps=15)
    return tmp_path / "my clips"


def test_a_folder_alone_is_trained_and_the_same_command_goes_on(clips, tmp_path, capsys):
    command = ["--data", "my clips", *TINY]
    assert train.main(command) == 0
    first = capsys.readouterr().out
    assert "4 clips, 2 classes" in first and "the same by hand" in first and "by heart" in first
    assert (tmp_path / "models/my_clips/model_index.json").is_file()
    assert (tmp_path / "data/my_clips_latents/cache.json").is_file()  # so few clips are encoded beforehand
    assert train.main(["--data", "my clips", *TINY, "train.steps=3"]) == 0
    again = capsys.readouterr().out
    assert "proposed before" in again and "resumed from" in again


def test_a_printed_proposal_is_a_config_and_writes_nothing(clips, tmp_path, capsys):
    before = set(tmp_path.rglob("*"))
    assert train.main(["--data", "my clips", "--print-config"]) == 0
    found = OmegaConf.create(capsys.readouterr().out)
    assert (found.data.height, found.data.width) == (48, 80) and found.name == "my_clips"
    assert set(tmp_path.rglob("*")) == before


def test_what_the_user_gives_is_kept(clips, capsys):
    given = ["data.height=32", "data.width=32", "model.hidden_size=48", "train.steps=7", "name=mine"]
    assert train.main(["--data", "my clips", *given, "--print-config"]) == 0
    found = OmegaConf.create(capsys.readouterr().out)
    assert (found.data.height, found.model.hidden_size, found.train.steps, found.name) == (32, 48, 7, "mine")


def test_a_name_of_other_data_is_refused(clips, tmp_path):
    (tmp_path / "output/my_clips").mkdir(parents=True)
    kept = {"data": "/elsewhere", "overrides": [], "cache": None}
    (tmp_path / "output/my_clips/proposal.json").write_text(json.dumps(kept))
    with pytest.raises(ValueError, match="belongs to a run on /elsewhere; choose another name"):
        train.main(["--data", "my clips"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "nothing"], "does not exist"),
        ([], "name a config"),
        (["quickstart", "--minutes", "3"], "--minutes belongs to --data"),
        (["--data", "my clips", "--minutes", "-1"], "above 0"),
        (["--data", "my clips", "data.root=x"], "both name the data"),
    ],
)
def test_what_makes_no_sense_is_refused(clips, arguments, said):
    with pytest.raises(ValueError, match=said):
        train.main(arguments)


def test_several_processes_do_not_each_propose_their_own(clips, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--print-config > own.yaml"):
        train.main(["--data", "my clips"])


def test_files_that_cannot_be_read_are_counted_and_a_folder_of_them_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/x.mp4").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="none of the 1 files can be read"):
        train.main(["--data", "bad"])


def test_a_size_has_the_aspect_and_nearly_the_area():
    for aspect in (9 / 16, 0.75, 1.0, 4 / 3, 16 / 9, 2.35):
        height, width = fit(aspect, 64 * 64)
        assert height % 16 == width % 16 == 0
        assert 0.7 < width / height / aspect < 1.43 and 0.74 < height * width / 64**2 < 1.26
        assert fit(1 / aspect, 64 * 64) == (width, height)


def test_most_clips_are_long_enough_for_the_proposed_length():
    rng = random.Random(0)
    for _ in range(50):
        rate = rng.choice([6, 12, 24, 30, 60])
        longest = rng.uniform(0.5, 20)
        lasts = [rng.uniform(0.5, longest + 0.5) for _ in range(40)]
        facts = [Facts(1 + round(last * rate), last, rate, 100, 100) for last in lasts]
        overrides = dict(one.split("=") for one in propose._shape(facts, 64 * 64)[0])
        frames, fps = int(overrides["data.num_frames"]), float(overrides["data.fps"])
        assert frames % 4 == 1 and fps <= rate
        enough = [too_short(one.frames, one.last, frames, fps=fps) is None for one in facts]
        assert sum(enough) >= 0.85 * len(enough)


def test_more_minutes_never_train_a_smaller_model_and_fit(clips, monkeypatch):
    monkeypatch.setattr(budget, "measure_rate", lambda device, precision: 2e11)
    monkeypatch.setattr(budget, "seconds_to_read", lambda config, vae: 0.05)
    sizes = []
    for minutes in (1, 10, 40, 300):
        overrides = [f"data.root={clips}", "data.height=48", "data.width=80"]
        found = Budget("own_videos", overrides, [], device="cpu", seconds=60 * minutes).choose(100)
        sizes.append((found.parameters, found.steps))
        assert found.steps == budget.FEWEST_STEPS or found.seconds <= 60 * minutes
    assert sizes == sorted(sizes) and len({parameters for parameters, _ in sizes}) > 1


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        ("model.hidden_size=256", [(256, 6, 4), (256, 8, 4)]),
        ("model.hidden_size=250", [(250, 6, 2), (250, 8, 2), (250, 12, 2), (250, 12, 2)]),
        ("model.num_heads=7", [(168, 6, 7), (280, 8, 7), (392, 12, 7), (784, 12, 7)]),
    ],
)
def test_sizes_that_are_given_meet_sizes_that_go_with_them(given, rows):
    found = Budget("own_videos", [], [given], device="cpu", seconds=60)._models()
    sizes = [dict(one.split("=") for one in [*own, given]) for own in found]
    assert [tuple(int(one[f"model.{key}"]) for key in ("hidden_size", "depth", "num_heads")) for one in sizes] == rows


def test_a_model_that_no_run_of_the_name_wrote_is_not_replaced(clips, tmp_path):
    (tmp_path / "models/my_clips").mkdir(parents=True)
    (tmp_path / "models/my_clips/model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="models/my_clips holds a model that no run of this name wrote"):
        train.main(["--data", "my clips", *TINY])
    assert (tmp_path / "models/my_clips/model_index.json").read_text() == "{}"


@pytest.mark.parametrize(
    "given",
    [["train.holdout=0.99"], ["train.holdout_column=label", "train.holdout_values=[left,right]"]],
)
def test_a_hold_out_that_leaves_no_clip_is_refused_before_any_is_encoded(clips, tmp_path, monkeypatch, given):
    def encoded(*args, **options):
        raise AssertionError("clips were encoded")

    monkeypatch.setattr(VideoVAE, "encode", encoded)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="leaves no clip to train on"):
        train.main(["--data", "my clips", *TINY, *given])
    assert set(tmp_path.rglob("*")) == before  # nor is the proposal written, with which the next call would go on


def test_what_was_encoded_is_not_changed_by_overrides_of_a_second_call(clips, tmp_path):
    (tmp_path / "output/my_clips").mkdir(parents=True)
    kept = {"data": str(clips), "overrides": ["data.height=32"], "cache": ["own_videos"]}
    (tmp_path / "output/my_clips/proposal.json").write_text(json.dumps(kept))
    with pytest.raises(ValueError, match="data.fps=6 differs from the training proposed before"):
        train.main(["--data", "my clips", "data.fps=6"])


def test_files_that_cannot_be_used_were_counted_before_training_counts_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mixed").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        write_video(tmp_path / f"mixed/{i}.mp4", rng.integers(0, 255, (30, 48, 80, 3), np.uint8), fps=15)
    (tmp_path / "mixed/broken.mp4").write_bytes(b"nothing")
    write_video(tmp_path / "mixed/picture.png", rng.integers(0, 255, (1, 48, 80, 3), np.uint8))
    assert train.main(["--data", "mixed", *TINY]) == 0
    said = capsys.readouterr().out
    assert "1 of 5 files looked at cannot be read" in said and "1 pictures in the folder" in said


def test_models_of_others_are_not_proposed_anew(clips):
    with pytest.raises(ValueError, match="stdit train lora --data"):
        train.main(["--data", "my clips", "train.lora.rank=4", "init_from.path=models/x"])

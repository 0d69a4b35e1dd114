"""Previews of one's own, trackers, lines in logs, and schedules of the learning rate."""

import io
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stdit import progress
from stdit.config import Config, load_typed
from stdit.data.video_io import VideoReader
from stdit.data.video_write import write_video
from stdit.recipes import train
from stdit.training import trackers
from stdit.training.metrics import MetricsLogger
from stdit.training.optim import learning_rate

TINY = """
name: t
data: {source: shapes, num_frames: 5, height: 32, width: 32, num_shapes: 24, workers: 0}
model: {size: S/2, depth: 1, hidden_size: 32, num_heads: 2}
objective: {mask_strategy: mixed}
train: {steps: 4, batch_size: 4, checkpoint_every: 4, preview_every: 2, samples: 2, sample_steps: 2, precision: fp32}
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MetricsLogger, "curves", lambda *args, **options: None)  # a drawing takes longer than the run
    (tmp_path / "t.yaml").write_text(TINY)
    write_video("clip.mp4", np.full((5, 32, 32, 3), 90, np.uint8))
    return tmp_path


def go(*overrides: str) -> int:
    return train.run(["t.yaml", *overrides])


def test_previews_of_ones_own_are_clips_and_a_sheet_and_are_shown_in_tensorboard(home, capsys):
    own = """train.previews=["--class-label 'square up' 3", "--task extend --input clip.mp4 --after 4 --class-label 1", "--frames 1 --class-label 2"]"""
    assert go(own) == 0
    for step in ("step-0000002", "step-0000004"):
        folder = Path("output/t/samples") / step
        names = [
            "00-generate-square-up.mp4",
            "01-generate-circle-down.mp4",
            "02-extend-circle-right.mp4",
            "03-generate-circle-up.png",
        ]
        assert sorted(path.name for path in folder.iterdir()) == names
        assert folder.with_suffix(".png").is_file()
        with VideoReader(folder / names[2]) as reader:
            assert (len(reader), reader.size, reader.fps) == (9, (32, 32), 8)
            known = np.stack(list(reader.get_frames(range(5))))
        assert abs(known.astype(int) - 90).max() < 12  # the frames that were given
    events = b"".join(path.read_bytes() for path in Path("output/t/tensorboard").iterdir())
    assert events.count(b"GIF89a") == 2 * 5 and b"previews/02-extend-circle-right" in events
    assert "warning" not in capsys.readouterr().err


def test_previews_of_the_data_are_written_as_clips_too_and_do_not_change_the_run(home):
    from safetensors.torch import load_file

    assert go("train.trackers=[]") == 0
    assert not Path("output/t/tensorboard").exists()
    assert sorted(path.name for path in Path("output/t/samples/step-0000002").iterdir()) == [
        "00-circle-left.mp4",
        "01-circle-right.mp4",
    ]
    assert go("name=own", "train.preview_every=3", "train.previews=['--class-label 1']") == 0
    files = [Path(f"checkpoints/{name}/step-4/model.safetensors") for name in ("t", "own")]
    one, two = map(load_file, files)
    assert all((one[key] == two[key]).all() for key in one)
    assert go("train.previews=['--class-label 2']", "train.steps=5") == 0  # free to change when a run resumes


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("--frams 3", "unrecognized arguments: --frams 3"),
        ("--class-label hexagon", "class label 'hexagon' is unknown"),
        ("--caption ball", "--caption is for a model with captions"),
        ("--task extend --input none.mp4 --after 4", "none.mp4"),
        ("--task animate --input clip.mp4", "animate takes one image, got 5 frames"),
        ("--model models/x", "--model has no place in a preview"),
        ("--frames 6", "Use 5 or 9"),
    ],
)  # fmt: skip
def test_a_preview_that_cannot_be_is_said_in_one_line_before_training(home, entry, message, capsys):
    assert go(f'train.previews=["{entry}"]') == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"train.previews: '{entry}': ") and message in error and "\n" not in error
    assert not list(Path("checkpoints").rglob("step-*"))


def test_trackers_that_are_unknown_or_not_installed_are_refused_before_training(home, monkeypatch, capsys):
    assert go("train.trackers=[tensorbord]") == 1
    assert "Did you mean 'tensorboard'?" in capsys.readouterr().err
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: [])
    assert go("train.trackers=[wandb]") == 1
    assert "'wandb', which is not installed; pip install wandb" in capsys.readouterr().err
    assert not Path("checkpoints").exists() and trackers.check_trackers(None) == []


def test_a_tracker_that_fails_to_show_previews_does_not_end_the_run(home, monkeypatch, capsys):
    def broken(*_):
        raise ConnectionError("no route")

    monkeypatch.setitem(trackers._SHOW, "tensorboard", broken)
    assert go("train.steps=3") == 0
    assert "tensorboard shows no previews of step 2: no route" in capsys.readouterr().err


def test_a_tracker_without_clips_is_shown_the_sheet(tmp_path):
    Image.new("RGB", (4, 2), "red").save(tmp_path / "sheet.png")
    shown = {}

    class Tracker:
        def log_images(self, values, step):
            shown.update(values, step=step)

    trackers._show_pictures(Tracker(), {"sheet": tmp_path / "sheet.png", "a": tmp_path / "a.mp4"}, 7)
    assert shown["step"] == 7 and shown["previews/sheet"][0].shape == (2, 4, 3) and len(shown) == 2


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_lines_and_a_terminal_a_bar(monkeypatch):
    log, screen = io.StringIO(), Terminal()
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    for stream in (log, screen):
        with progress.Progress(total=4, initial=1, desc="reading", unit="clip", file=stream) as bar:
            for _ in range(3):
                bar.set_postfix_str("loss 1")
                bar.update()
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue() and lines[-1].startswith("reading 4/4 [") and "loss 1" in lines[-1]
    assert lines == list(dict.fromkeys(lines)) and "\r" in screen.getvalue()


def test_a_short_loop_writes_one_line_or_none_if_it_leaves_no_trace():
    log = io.StringIO()
    assert list(progress.Progress(range(3), file=log, leave=False)) == [0, 1, 2] and log.getvalue() == ""
    list(progress.Progress(iter(range(3)), file=log, unit="part"))
    assert log.getvalue().startswith("3 [") and log.getvalue().count("\n") == 1


@pytest.mark.slow
def test_the_output_of_a_run_in_a_file_has_no_bars(home):
    done = subprocess.run(
        [sys.executable, "-m", "stdit", "train", "t.yaml"], capture_output=True, text=True, check=True
    )
    assert "\r" not in done.stdout + done.stderr and "4/4 [" in done.stderr


def test_schedules_begin_at_the_rate_and_end_where_they_say():
    at = {
        name: [learning_rate(s, 2.0, 0, 100, schedule=name) for s in (0, 50, 100, 150)]
        for name in ("linear", "cosine", "constant")
    }
    assert at["linear"] == [2.0, 1.0, 0.0, 0.0] and at["constant"] == [2.0] * 4
    assert at["cosine"] == pytest.approx([2.0, 1.0, 0.0, 0.0])
    assert learning_rate(25, 1.0, 0, 100, schedule="cosine") == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate(4, 2.0, 10, None, schedule="cosine") == 1.0  # a warm-up, and no end


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.schedule=cosine"], "train.schedule=cosine falls until train.decay_steps, which is not set"),
        (["objective.distilled_guider=auto"], "objective.distilled_guider=auto has no effect without objective.flow_map=true"),
        (["objective.distilled_guidance=3", "objective.flow_map=true"], "train.guidance=2 would guide samples of a model that has learnt objective.distilled_guidance=3; set train.guidance=1"),
        (["objective.distilled_guider=auto", "objective.distilled_guidance=2", "train.guidance=1", "objective.flow_map=true", "objective.mask_strategy=shared"], "needs a teacher with a guide; set init_from.path"),
    ],
)  # fmt: skip
def test_settings_without_effect_are_refused(home, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_typed(Config, "t.yaml", overrides)

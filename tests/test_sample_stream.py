"""Long clips from the command line: the frames of a causal model are written during sampling."""

import numpy as np
import pytest
import torch
from conftest import fill

from stdit.data import VideoReader
from stdit.data.video_write import VideoStream, write_video
from stdit.model.stdit import STDiT
from stdit.recipes import sample
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.vae import TinyVAE


@pytest.fixture
def causal(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model(
        in_channels=16,
        num_classes=2,
        learn_sigma=False,
        causal=True,
        window=3,
        position_encoding="rope",
        sample_size=(3, 4, 4),
    )
    vae = fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8)))
    pipe = STDiTPipeline(
        model, vae, STDiTScheduler("flow"), 9, 32, 32, 8.0, "flow", mask_strategies=["teacher_forcing"]
    )
    pipe.save_pretrained("models/causal")
    write_video("clip.mp4", np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8), fps=8)
    return pipe


ARGUMENTS = ["--task", "extend", "--input", "clip.mp4", "--after", "24", "--steps", "1"]


def frames(path):
    with VideoReader(path) as reader:
        return np.stack(list(reader))


def test_a_streamed_clip_is_written_during_sampling_and_equals_the_clip_sampled_at_once(causal, tmp_path, monkeypatch):
    given = torch.from_numpy(frames("clip.mp4")).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    whole = causal.extend(given.expand(2, -1, -1, -1, -1), after=24, class_labels=[0, 1], num_inference_steps=1)
    monkeypatch.setattr(STDiTPipeline, "fill", None)  # the command never has the whole clip in memory
    assert sample.main([*ARGUMENTS, "--class-label", "0", "1", "--seed", "0", "--output", "made"]) == 0
    written = sorted((tmp_path / "made").glob("*.mp4"))
    assert len(written) == len(list((tmp_path / "made").glob("*.json"))) == 2
    for path, clip in zip(written, whole, strict=True):
        write_video("whole.mp4", clip)
        found, wanted = frames(path).astype(int), frames("whole.mp4").astype(int)
        assert found.shape == wanted.shape == (29, 32, 32, 3)
        assert np.abs(found - wanted).mean() < 0.5  # models in memory and from disk may round differently


def test_what_a_stream_does_not_support_is_refused_and_leaves_no_file(causal, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="leave out history_guidance=2.0"):
        sample.main([*ARGUMENTS, "--history-guidance", "2", "--output", "made"])
    assert not list((tmp_path / "made").glob("*"))
    stream = STDiTPipeline.stream

    def broken(self, *args, **options):
        yield next(stream(self, *args, **options))
        raise ValueError("power cut")

    monkeypatch.setattr(STDiTPipeline, "stream", broken)
    with pytest.raises(ValueError, match="power cut"):
        sample.main([*ARGUMENTS, "--output", "made"])
    assert not list((tmp_path / "made").glob("*"))


def test_the_frame_rate_conditions_the_model_and_is_written(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model(
        in_channels=16, num_classes=0, learn_sigma=False, sample_size=(3, 4, 4), micro_conditions=["fps"]
    )
    vae = fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8)))
    STDiTPipeline(
        model, vae, STDiTScheduler("flow"), 9, 32, 32, 8.0, "flow", mask_strategies=["every_kth"]
    ).save_pretrained("m")
    write_video("clip.mp4", np.zeros((3, 32, 32, 3), np.uint8), fps=4)
    rates = []
    forward = STDiT.forward

    def spy(*args, micro_conditions, **rest):
        rates.append(float(micro_conditions))
        return forward(*args, micro_conditions=micro_conditions, **rest)

    monkeypatch.setattr(STDiT, "forward", spy)
    arguments = [
        "--model",
        "m",
        "--task",
        "interpolate",
        "--input",
        "clip.mp4",
        "--factor",
        "4",
        "--fps",
        "4",
        "--steps",
        "1",
    ]
    assert sample.main([*arguments, "--output", "made.mp4"]) == 0
    assert set(rates) == {16.0}
    with VideoReader("made.mp4") as reader:
        assert (len(reader), round(reader.fps)) == (9, 16)


def test_a_streamed_file_equals_the_file_written_at_once_and_an_error_leaves_none(tmp_path):
    clip = torch.rand(3, 9, 15, 16) * 2 - 1
    write_video(tmp_path / "once.mp4", clip)
    with VideoStream(tmp_path / "parts.mp4") as video:
        for part in clip.split(4, dim=1):
            video.add(part)
    assert np.array_equal(frames(tmp_path / "once.mp4"), frames(tmp_path / "parts.mp4"))

    def broken():
        with VideoStream(tmp_path / "broken.mp4") as video:
            video.add(clip)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["once.mp4", "parts.mp4"]

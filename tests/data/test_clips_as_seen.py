"""Clips are read and written as a person sees them: square pixels, no hidden colours, even motion, true speed."""

import warnings
from fractions import Fraction

import av
import numpy as np
import pytest
from media import barcode, read_barcode, write_barcodes

from stdit import warn
from stdit.data import VideoError, VideoReader, video_io, write_video
from stdit.data.config import DataConfig
from stdit.data.datasets import VideoClips, build_dataset, window
from stdit.data.inputs import read_input, read_mask
from stdit.data.manifest import Row, Table
from stdit.data.rates import clip_rate
from stdit.data.video_write import VideoStream
from stdit.rng import keyed_rng

av.logging.set_level(None)


def encode(path, frames, codec="libx264", pix_fmt="yuv420p", rate=30, aspect=None):
    """Write frames (N, H, W, 3|4) uint8 with a codec, and a sample aspect ratio."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgba" if frame.shape[-1] == 4 else "rgb24")
            container.mux(stream.encode(picture.reformat(format=pix_fmt)))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(1, 2), Fraction(4, 3)])
def test_pixels_that_are_not_square_are_made_square(tmp_path, aspect, suffix):
    y, x = np.mgrid[:64, :64] - 31.5
    disc = (x * float(aspect) ** 0.5 / 12) ** 2 + (y / float(aspect) ** 0.5 / 12) ** 2 < 1  # as shown, it is round
    frames = np.repeat((disc[None, ..., None] * 255).astype(np.uint8).repeat(3, -1), 5, 0)
    path = encode(tmp_path / f"a.{suffix}", frames, aspect=aspect)
    with VideoReader(path) as reader:
        seen = reader[0][..., 1] > 127
        assert reader.size == (round(64 * max(1, 1 / aspect)), round(64 * max(1, aspect)))
    clips = VideoClips(Table([Row(path, None)], 0, None), DataConfig(num_frames=3, height=64, width=64))
    cropped = clips.load(0, keyed_rng("sample", 0))["pixels"][0, ..., 1].numpy() > 127
    for mask in (seen, cropped):
        assert mask.any(0).sum() / mask.any(1).sum() == pytest.approx(1, abs=0.1)


def test_pixels_that_are_nearly_square_are_left_alone(tmp_path):
    path = encode(tmp_path / "a.mp4", np.stack([barcode(i) for i in range(3)]), aspect=Fraction(640, 639))
    with VideoReader(path) as reader:
        assert reader.size == (48, 64)


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mov", "qtrle", "argb"), ("b.mov", "png", "rgba"), ("c.mov", "prores_ks", "yuva444p10le"),
        ("d.mkv", "ffv1", "bgra"), ("e.webm", "libvpx-vp9", "yuva420p"), ("f.apng", "apng", "rgba"),
    ],
)  # fmt: skip
def test_transparent_parts_of_clips_are_white(tmp_path, name, codec, pix_fmt):
    rgba = np.random.default_rng(0).integers(0, 256, (64, 64, 4), np.uint8)
    rgba[..., 3] = 0
    rgba[16:48, 16:48] = (200, 40, 40, 255)
    path = encode(tmp_path / name, np.stack([rgba] * 4), codec, pix_fmt, rate=10)
    with VideoReader(path) as reader:
        assert (reader[2][:14] >= 253).all()
        assert np.abs(reader[3][30, 30].astype(int) - (200, 40, 40)).max() < 6
        assert (reader.get_frames([1], size=(32, 32))[0, :6] >= 253).all()


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "flv"])
@pytest.mark.parametrize("rate", [Fraction(24), Fraction(30), Fraction(30000, 1001), Fraction(60)])
def test_time_stamps_rounded_by_a_container_do_not_make_motion_stutter(tmp_path, suffix, rate):
    path = encode(tmp_path / f"a.{suffix}", np.stack([barcode(i) for i in range(61)]), rate=rate)
    with VideoReader(path) as reader:
        for every in (2, 3, 4):
            count = 60 // every + 1
            assert reader.indices_at(np.arange(count) * every / float(rate)) == list(range(0, 60 + 1, every))[:count]
        picked = window(reader, 31, float(rate) / 2, keyed_rng("sample", 0))
        assert set(np.diff(picked)) == {2}


def test_a_gif_lasts_as_long_as_the_clip_at_any_rate(tmp_path):
    frames = np.stack([barcode(i) for i in range(60)])
    for fps in (7, 12, 24, 30, 48):
        write_video(tmp_path / "a.gif", frames, fps=fps)
        with VideoReader(tmp_path / "a.gif") as reader:
            assert np.abs(reader.timestamps - np.arange(60) / fps).max() <= 0.0051
    with pytest.warns(UserWarning, match="at most 50 frames a second"):
        write_video(tmp_path / "a.gif", frames[:3], fps=100)


def test_written_clips_say_their_colour_space_and_keep_their_colours(tmp_path):
    y, x = np.mgrid[:64, :64]
    frames = np.repeat(np.stack([x * 4, y * 4, 255 - x * 4], -1)[None].astype(np.uint8), 3, 0)
    write_video(tmp_path / "a.mp4", frames)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        bt709, limited = 1, 1
        assert (context.colorspace, context.color_primaries, context.color_trc) == (bt709, bt709, bt709)
        assert context.color_range == limited
    with VideoReader(tmp_path / "a.mp4") as reader:
        assert np.abs(reader[0].astype(int) - frames[0]).mean() < 3


@pytest.mark.parametrize("name", ["12:30", "file:a", "a%03d", "c" * 246, "猫" * 80, "-x", "a#b?c"])
def test_a_clip_of_any_name_is_written(tmp_path, name):
    for suffix in ("mp4", "gif", "png"):
        path = tmp_path / f"{name}.{suffix}"
        write_video(path, np.stack([barcode(i) for i in range(3)]))
        assert path.is_file()
    with VideoStream(tmp_path / f"{name}.mp4") as video:
        video.add(barcode(7)[None])
    with VideoReader(tmp_path / f"{name}.mp4") as reader:
        assert [read_barcode(frame) for frame in reader] == [7]
    assert len(list(tmp_path.iterdir())) == 3


def test_frames_and_their_number_bound_what_is_decoded(tmp_path, monkeypatch):
    path = write_barcodes(tmp_path / "a.mp4", 12)
    monkeypatch.setattr(video_io, "MAX_BYTES", 10 * 48 * 64 * 3)
    with VideoReader(path) as reader:
        with pytest.raises(VideoError, match="12 of which take .* GiB; read fewer"):
            reader.get_frames(range(12))
        assert len(reader.get_frames(range(12), size=(24, 32))) == 12
        assert [read_barcode(frame) for frame in reader.iter_frames([0, 0, 5, 11, 3])] == [0, 0, 5, 11, 3]
    assert read_input(path, (48, 64), 24.0).pixels.shape[2] == 12  # one frame at a time
    monkeypatch.setattr("stdit.data.inputs.MAX_PIXELS", 10 * 48 * 64)
    for read in (read_input, lambda p, size, fps: read_mask(p, size, (12, *size), fps)):
        with pytest.raises(ValueError, match="12 frames of 48 x 64 of .* cut the clip"):
            read(path, (48, 64), 24.0)


def test_a_clip_slower_than_data_fps_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr(warn, "_warned", set())
    for name in "ab":
        write_barcodes(tmp_path / f"{name}.mp4", 30, fps=12)
    data = build_dataset(DataConfig(root=str(tmp_path), num_frames=9, height=48, width=64, fps=16))
    with pytest.warns(UserWarning, match=r"has 12 frames a second, fewer than data.fps=16"):
        data.load(0, keyed_rng("sample", 0))
    assert "some of them twice" in read_input(tmp_path / "a.mp4", (48, 64), 16.0).note
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.load(1, keyed_rng("sample", 1))
        build_dataset(DataConfig(root=str(tmp_path), num_frames=9, height=48, width=64, fps=12)).load(
            0, keyed_rng("sample", 0)
        )


def test_neighbouring_frames_have_the_rate_of_the_files_and_different_rates_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(warn, "_warned", set())
    write_barcodes(tmp_path / "a.mp4", 12, fps=30)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    config = DataConfig(root=str(tmp_path), num_frames=5, height=48, width=64)
    assert clip_rate(config, build_dataset(config)) == pytest.approx(30)
    assert clip_rate(DataConfig(fps=6.0), build_dataset(config)) == 6
    write_barcodes(tmp_path / "c.mp4", 12, fps=12)
    with pytest.warns(UserWarning, match=r"clips of 12 to 30 frames a second.*set data.fps"):
        clip_rate(config, build_dataset(config))
    shapes = DataConfig(source="shapes")
    assert clip_rate(shapes, build_dataset(shapes)) == 8

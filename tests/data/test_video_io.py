import copy
import csv
import gc
import os
import tarfile

import av
import numpy as np
import pytest
import torch
from media import SHARED, barcode, read_barcode, write_barcodes

from stdit.data import VideoError, VideoReader, write_video
from stdit.data.shapes import draw, random_clip
from stdit.data.video_write import VideoStream, to_uint8

av.logging.set_level(None)

CODINGS = {
    "h264_b_frames.mp4": {"options": {"g": "12", "bf": "3"}},
    "h264_open_gop.mp4": {"options": {"g": "8", "bf": "3", "x264-params": "open-gop=1:scenecut=0:keyint=8"}},
    "hevc_open_gop.mp4": {
        "codec": "libx265",
        "options": {"x265-params": "keyint=8:bframes=3:open-gop=1:log-level=none"},
    },
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "10", "auto-alt-ref": "1", "lag-in-frames": "12"}},
    "vp8.webm": {"codec": "libvpx", "options": {"g": "10", "auto-alt-ref": "1", "lag-in-frames": "12"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"g": "10", "svtav1-params": "lp=1"}},
    "ten_bit.mp4": {"pix_fmt": "yuv420p10le", "options": {"g": "10"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "10", "bf": "2"}},
    "h264.mkv": {"options": {"g": "10"}},
    "h264.ts": {"options": {"g": "10"}},
    "variable_rate.mp4": {"times": [i + 3 * (i // 5) for i in range(30)], "options": {"g": "10"}},
    "starts_late.mp4": {"times": [48 + i for i in range(30)], "options": {"g": "10"}},
}


@pytest.fixture(scope="module", params=CODINGS)
def numbered(request, tmp_path_factory):
    """A clip of 30 numbered frames in each coding."""
    path = tmp_path_factory.mktemp("media") / request.param
    try:
        return write_barcodes(path, **CODINGS[request.param])
    except av.error.FFmpegError as error:
        pytest.skip(f"this FFmpeg cannot encode {request.param}: {error}")
    finally:  # libsvtav1 gives the process real-time priority where it may, and browsers of later tests wait in vain
        if hasattr(os, "sched_setscheduler"):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="this system has no scheduling policies")
def test_encoding_leaves_no_real_time_priority_behind(numbered):
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_frames_are_those_requested_in_any_order(numbered):
    with VideoReader(numbered) as reader:
        assert len(reader) == 30
        assert [read_barcode(frame) for frame in reader.get_frames(range(30))] == list(range(30))
        order = np.random.default_rng(0).integers(0, 30, 40).tolist()
        assert [read_barcode(reader[i]) for i in order] == order
        assert [read_barcode(frame) for frame in reader.get_frames(order)] == order


def test_size_and_rate_are_those_of_the_frames(numbered):
    with VideoReader(numbered) as reader:
        assert reader.size == (48, 64)
        assert np.all(np.diff(reader.timestamps) > 0)
        if "variable" not in numbered.name:
            assert reader.fps == pytest.approx(24, rel=0.02)


def test_frame_rate_conversion_goes_by_time_stamps(tmp_path):
    times = [0, 1, 2, 10, 11, 20]
    with VideoReader(write_barcodes(tmp_path / "vfr.mp4", 6, fps=10, times=times)) as reader:
        assert reader.indices_at([0.0, 0.15, 0.9, 1.0, 1.09, 1.5, 5.0]) == [0, 1, 2, 3, 3, 4, 5]


def test_every_frame_of_a_gif_is_complete(tmp_path):
    write_video(tmp_path / "a.gif", np.stack([barcode(i) for i in range(12)]), fps=10)
    with VideoReader(tmp_path / "a.gif") as reader:
        assert [read_barcode(reader[i]) for i in (11, 3, 7, 0)] == [11, 3, 7, 0]
        assert reader.fps == pytest.approx(10, rel=0.02)


def test_resizing_while_reading_gives_the_requested_size(tmp_path):
    with VideoReader(write_barcodes(tmp_path / "a.mp4", 5)) as reader:
        frames = reader.get_frames([0, 4], size=(24, 32))
        assert frames.shape == (2, 24, 32, 3)
        assert [read_barcode(frame) for frame in frames] == [0, 4]


def test_indices_outside_the_clip_are_refused_and_negative_ones_count_from_the_end(tmp_path):
    with VideoReader(write_barcodes(tmp_path / "a.mp4", 5)) as reader:
        assert read_barcode(reader[-1]) == 4
        for index in (5, -6):
            with pytest.raises(IndexError, match="which has 5 frames"):
                reader[index]
        with pytest.raises(ValueError, match="no indices"):
            reader.get_frames([])


def test_a_closed_reader_leaves_no_file_open(tmp_path):
    path, before = write_barcodes(tmp_path / "a.mp4", 5), len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with VideoReader(path) as reader:
            reader[2]
        VideoReader(path).close()
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    for _ in range(20):
        with pytest.raises(VideoError):
            VideoReader(bad)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_reader_goes_to_another_process_by_pickle_and_by_fork(tmp_path):
    reader = VideoReader(write_barcodes(tmp_path / "a.mp4", 9, options={"g": "3"}))
    assert read_barcode(reader[5]) == 5
    assert read_barcode(copy.copy(reader)[7]) == 7  # by the protocol that pickle uses
    child = os.fork()
    if child == 0:
        os._exit(0 if read_barcode(reader[3]) == 3 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert read_barcode(reader[6]) == 6


def test_a_cut_file_is_refused_and_salvage_gives_what_is_left(tmp_path):
    whole = write_barcodes(tmp_path / "a.mkv", 30, options={"g": "5"}).read_bytes()
    cut = tmp_path / "cut.mp4"
    write_video(tmp_path / "b.mp4", np.random.default_rng(0).integers(0, 255, (30, 48, 64, 3), dtype=np.uint8))
    data = (tmp_path / "b.mp4").read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoError, match="salvage=True"), VideoReader(cut) as reader:
        reader.get_frames(range(len(reader)))
    with VideoReader(cut, salvage=True) as reader:
        assert 5 < len(reader) < 30
        assert len(reader.get_frames(range(len(reader)))) == len(reader)
    assert whole


def test_damaged_data_is_refused_instead_of_returned(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, np.random.default_rng(0).integers(0, 255, (30, 48, 64, 3), dtype=np.uint8))
    data = bytearray(path.read_bytes())
    middle = len(data) * 3 // 4
    data[middle : middle + 2000] = os.urandom(2000)
    path.write_bytes(data)
    with pytest.raises(VideoError, match="salvage=True"), VideoReader(path) as reader:
        reader.get_frames(range(len(reader)))


def test_a_file_that_is_not_a_video_is_refused_in_one_line(tmp_path):
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\n/etc/hostname\n#EXT-X-ENDLIST\n")
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    for path in [*tmp_path.iterdir(), tmp_path / "missing.mp4"]:
        with pytest.raises(VideoError) as caught:
            VideoReader(path)
        assert "\n" not in str(caught.value)
        assert path.name in str(caught.value)


def test_addresses_and_protocols_are_taken_as_file_names():
    for name in ("http://127.0.0.1:9/a.mp4", "concat:a.mp4|b.mp4", "pipe:0"):
        with pytest.raises(VideoError, match="cannot be opened"):
            VideoReader(name)


def test_odd_names_are_read_like_any_other(tmp_path):
    source = write_barcodes(tmp_path / "a.mp4", 3).read_bytes()
    for name in (b"-dash.mp4", b"new\nline.mp4", "клип 🎬.mp4".encode(), b"latin1_\xe9\xff.mp4", b"a%20b#c?.mp4"):
        path = os.fsdecode(os.fsencode(tmp_path) + b"/" + name)
        with open(path, "wb") as stream:
            stream.write(source)
        with VideoReader(path) as reader:
            assert read_barcode(reader[2]) == 2


def test_a_frame_larger_than_allowed_is_refused_before_it_is_decoded(tmp_path):
    path = write_barcodes(tmp_path / "a.mp4", 3)
    with pytest.raises(VideoError, match="pass a larger max_pixels"):
        VideoReader(path, max_pixels=100)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared media are not next to this checkout")
class TestRealMedia:
    def test_display_matrices_rotate_and_mirror(self):
        plain = VideoReader(SHARED / "originals/media__sample.mp4")[0]
        # The same coded frames under a matrix that transposes, which is a rotation and a mirroring.
        assert np.array_equal(
            VideoReader(SHARED / "originals/media__sample_rotate_and_reflect.mp4")[0], plain.swapaxes(0, 1)
        )
        rotated = SHARED / "originals/media__sample_with_color_info.mp4"
        with av.open(str(rotated)) as container:
            frame = next(container.decode(video=0))
            expected = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
        assert frame.rotation == -90
        assert np.array_equal(VideoReader(rotated)[0], expected)

    @pytest.mark.slow
    def test_every_original_is_read_in_full_or_refused(self):
        with open(SHARED / "originals.csv", newline="") as stream:
            rows = list(csv.DictReader(stream))
        read = 0
        for row in rows:
            try:
                with VideoReader(SHARED / row["path"]) as reader:
                    count = sum(
                        len(reader.get_frames(range(i, min(i + 8, len(reader))))) for i in range(0, len(reader), 8)
                    )
            except VideoError as error:
                assert "\n" not in str(error)
                continue
            assert count == int(row["frames"]), row["path"]
            read += 1
        assert len(rows) == 54
        assert read >= 51

    @pytest.mark.slow
    def test_broken_files_give_right_frames_or_a_refusal(self, tmp_path):
        with tarfile.open(SHARED / "broken.tar.gz") as archive:
            archive.extractall(tmp_path, filter="tar")
        with open(SHARED / "broken.csv", newline="") as stream:
            truth = {row["name"]: row["frames_really_there"] for row in csv.DictReader(stream)}
        for path in (tmp_path / "broken").iterdir():
            try:
                with VideoReader(path) as reader:
                    count = sum(
                        len(reader.get_frames(range(i, min(i + 8, len(reader))))) for i in range(0, len(reader), 8)
                    )
            except VideoError as error:
                assert "\n" not in str(error)
                continue
            if path.name in truth:
                assert str(count) == truth[path.name], ascii(path.name)


def test_written_clips_come_back_and_odd_sizes_are_padded(tmp_path):
    frames = np.stack([barcode(i)[:47, :63] for i in range(4)])
    write_video(tmp_path / "odd.mp4", frames)
    with VideoReader(tmp_path / "odd.mp4") as reader:
        assert reader.size == (48, 64)
        assert reader.fps == pytest.approx(8)
    clip = torch.linspace(-1, 1, 3 * 5 * 16 * 16).reshape(3, 5, 16, 16)
    write_video(tmp_path / "float.mp4", clip, fps=29.97)
    with VideoReader(tmp_path / "float.mp4") as reader:
        assert reader.fps == pytest.approx(29.97, rel=1e-3)
        assert np.abs(reader[0].astype(int) - np.round((clip[:, 0].permute(1, 2, 0).numpy() + 1) * 127.5)).mean() < 8


@pytest.mark.parametrize(
    ("frames", "name", "message"),
    [
        (np.zeros((2, 4, 4), np.uint8), "a.mp4", "neither"),
        (np.zeros((0, 4, 4, 3), np.uint8), "a.mp4", "no frames"),
        (np.zeros((2, 4, 4, 3), np.uint8), "a.xyz", "cannot write .xyz"),
    ],
)
def test_frames_that_cannot_be_written_are_refused_and_leave_no_file(tmp_path, frames, name, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / name, frames)
    assert not list(tmp_path.iterdir())


def test_floats_and_bytes_of_any_type_and_library_become_the_same_pixels():
    clip = torch.cat([torch.linspace(-1.5, 1.5, 3 * 2 * 8 * 8), (torch.arange(192) + 0.5) / 127.5 - 1]).reshape(
        3, 3, 8, 8
    )
    expected = np.round((clip.numpy().clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 3, 0)
    for frames in (clip, clip.numpy(), clip.clone().requires_grad_(), expected, torch.from_numpy(expected.copy())):
        assert np.array_equal(to_uint8(frames), expected)
    for frames in (clip.half(), clip.bfloat16(), clip.double(), clip.numpy().astype(np.float64)):
        assert np.abs(to_uint8(frames).astype(int) - expected).max() <= 1
    for frames in (clip.int(), clip[:2], clip[0], expected.astype(np.int64), torch.zeros(2, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="neither"):
            to_uint8(frames)


def test_the_same_frames_give_the_same_file(tmp_path):
    frames = [draw(random_clip(np.random.default_rng(i))) for i in range(4)]
    files = set()
    for i in range(24):
        write_video(tmp_path / f"{i}.mp4", frames[i % 4])
        files.add((i % 4, (tmp_path / f"{i}.mp4").read_bytes()))
    assert len(files) == 4


def test_a_video_stream_without_frames_writes_no_file(tmp_path):
    with VideoStream(tmp_path / "a.mp4"):
        pass
    assert not list(tmp_path.iterdir())


def test_frames_that_were_read_do_not_wait_for_the_garbage_collector(tmp_path):
    path = write_barcodes(tmp_path / "a.mp4")
    gc.collect()
    gc.disable()
    try:
        with VideoReader(path) as reader:
            assert len(reader.get_frames(range(30), size=(24, 32))) == 30
            alive = sum(isinstance(found, av.VideoFrame) for found in gc.get_objects())
    finally:
        gc.enable()
    assert alive <= 3  # of a clip in 4K, each takes 12 MB

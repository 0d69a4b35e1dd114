import warnings

import numpy as np
import pytest
from media import read_barcode, write_barcodes

from stdit.data import VideoError, VideoReader
from stdit.data.backends import BACKENDS, LibraryReader, open_video


def open_or_skip(path, name):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return open_video(path, name)
    except ValueError as error:
        if isinstance(error, VideoError):
            raise
        pytest.skip(f"{name} is not installed: {error}")


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_returns_the_same_frames_of_plain_video(tmp_path, name):
    path = write_barcodes(tmp_path / "a.mp4", 20, options={"g": "10", "bf": "0"})
    with open_or_skip(path, name) as reader:
        assert (len(reader), reader.size) == (20, (48, 64))
        assert reader.fps == pytest.approx(24, rel=0.01)
        assert [read_barcode(frame) for frame in reader.get_frames([19, 0, 7])] == [19, 0, 7]
        assert reader.get_frames([3], size=(24, 32)).shape == (1, 24, 32, 3)
        assert reader.indices_at([0.5]) == [12]
        with pytest.raises(IndexError, match="which has 20 frames"):
            reader[20]


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_refuses_a_file_that_is_not_a_video_in_one_line(tmp_path, name):
    path = write_barcodes(tmp_path / "a.mp4", 3)
    open_or_skip(path, name).close()
    path.write_bytes(b"no video")
    with pytest.raises(VideoError) as caught:
        open_or_skip(path, name)
    assert str(path) in str(caught.value)


def test_decord_warns_once_of_its_errors(tmp_path, monkeypatch):
    pytest.importorskip("decord")
    monkeypatch.setattr("stdit.warn._warned", set())
    path = write_barcodes(tmp_path / "a.mp4", 3)
    with pytest.warns(UserWarning, match="wrong frames on open-GOP"):
        open_video(path, "decord")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_video(path, "decord")


def test_the_default_is_pyav_and_the_error_for_a_missing_backend_gives_its_extra(tmp_path, monkeypatch):
    path = write_barcodes(tmp_path / "a.mp4", 3)
    assert isinstance(open_video(path), VideoReader)
    monkeypatch.setitem(__import__("sys").modules, "decord", None)
    with pytest.raises(ValueError, match=r"pip install 'stdit\[decord\]'"):
        open_video(path, "decord")


def test_another_backend_resizes_a_few_frames_at_a_time_to_the_same_pixels(tmp_path):
    file = tmp_path / "a.bin"
    file.write_bytes(b"")
    frames, asked = np.random.default_rng(0).integers(0, 256, (20, 12, 16, 3), dtype=np.uint8), []

    class Counting(LibraryReader):
        timestamps = np.arange(20) / 24

        def _decode(self, indices):
            asked.append(len(indices))
            return frames[indices]

    reader = Counting(file)
    small = reader.get_frames(range(20), size=(6, 8))
    assert max(asked) == 8 and small.shape == (20, 6, 8, 3)
    assert all((reader.get_frames([i], size=(6, 8))[0] == small[i]).all() for i in range(20))
    assert (reader.get_frames(range(20)) == frames).all() and (
        reader.get_frames([3], size=(12, 16))[0] == frames[3]
    ).all()

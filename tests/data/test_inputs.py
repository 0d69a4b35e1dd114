"""A user's own files, at the size and rate of a model: what was changed is said, what cannot be is refused."""

import numpy as np
import pytest

from stdit.data import inputs
from stdit.data.inputs import read_input
from stdit.data.video_write import write_video


def test_what_is_done_to_an_input_is_said(tmp_path):
    wide = np.zeros((4, 32, 64, 3), np.uint8)
    write_video(tmp_path / "wide.mp4", wide, fps=8)
    write_video(tmp_path / "slow.mp4", wide[:, :, :32], fps=6.5)
    assert read_input(tmp_path / "wide.mp4", (32, 32), 8.0).note == "32 x 64 -> 32 x 32 (cropped from 32 x 64)"
    assert "4 frames at 6.5 fps -> 4 at 8" in read_input(tmp_path / "slow.mp4", (32, 32), 8.0).note
    assert read_input(tmp_path / "slow.mp4", (32, 32), 6.5).note == ""


def test_more_frames_than_memory_holds_are_refused_unless_fewer_are_asked_for(tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mp4", np.zeros((9, 32, 32, 3), np.uint8), fps=8)
    with pytest.raises(ValueError, match=r"has 1\d{6} frames at 1e\+06 fps, more than the 20000 taken at a time"):
        read_input(tmp_path / "clip.mp4", (32, 32), 1e6)
    monkeypatch.setattr(inputs, "_MOST", 8)
    with pytest.raises(ValueError, match="has 9 frames at 8 fps, more than the 8"):
        read_input(tmp_path / "clip.mp4", (32, 32), 8.0)
    assert read_input(tmp_path / "clip.mp4", (32, 32), 8.0, frames=8).pixels.shape[2] == 8
    assert read_input(tmp_path / "clip.mp4", (32, 32), 1e6, frames=5).pixels.shape[2] == 5

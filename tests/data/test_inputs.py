"""Input files at the size and frame rate of a model: changes are noted, and unsuitable files are refused."""

import numpy as np
import pytest
from PIL import Image

from stdit.data import inputs
from stdit.data.inputs import read_input, read_mask
from stdit.data.video_write import write_video


def test_changes_to_an_input_are_noted(tmp_path):
    wide = np.zeros((4, 32, 64, 3), np.uint8)
    write_video(tmp_path / "wide.mp4", wide, fps=8)
    write_video(tmp_path / "slow.mp4", wide[:, :, :32], fps=6.5)
    assert read_input(tmp_path / "wide.mp4", (32, 32), 8.0).note == "32 x 64 -> 32 x 32 (cropped from 32 x 64)"
    assert "4 frames at 6.5 fps -> 4 at 8" in read_input(tmp_path / "slow.mp4", (32, 32), 8.0).note
    assert read_input(tmp_path / "slow.mp4", (32, 32), 6.5).note == ""


def test_more_frames_than_memory_holds_are_refused_unless_fewer_are_asked_for(tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mp4", np.zeros((9, 32, 32, 3), np.uint8), fps=8)
    with pytest.raises(
        ValueError, match=r"has 1\d{6} frames at 1e\+06 fps, more than the 20000 that are read at a time"
    ):
        read_input(tmp_path / "clip.mp4", (32, 32), 1e6)
    monkeypatch.setattr(inputs, "MAX_FRAMES", 8)
    with pytest.raises(ValueError, match="has 9 frames at 8 fps, more than the 8"):
        read_input(tmp_path / "clip.mp4", (32, 32), 8.0)
    assert read_input(tmp_path / "clip.mp4", (32, 32), 8.0, frames=8).pixels.shape[2] == 8
    assert read_input(tmp_path / "clip.mp4", (32, 32), 1e6, frames=5).pixels.shape[2] == 5


def test_a_mask_is_true_where_its_image_is_white_at_the_size_of_the_file_or_of_the_clip(tmp_path):
    image = np.zeros((64, 32), np.uint8)
    image[:32] = 255
    Image.fromarray(image).save(tmp_path / "mask.png")
    for source, size in (((64, 32), (64, 32)), ((64, 32), (32, 16)), ((128, 64), (64, 32))):
        mask = read_mask(tmp_path / "mask.png", source, (5, *size), 8.0)
        assert mask.shape == size
        assert mask[: size[0] // 2].all() and not mask[size[0] // 2 :].any()
    with pytest.raises(ValueError, match="is 64 x 32, but the clip is 48 x 48; draw the mask"):
        read_mask(tmp_path / "mask.png", (48, 48), (5, 48, 48), 8.0)


def test_a_mask_clip_has_one_mask_per_frame(tmp_path):
    frames = np.zeros((3, 32, 32, 3), np.uint8)
    frames[1] = 255
    write_video(tmp_path / "mask.mp4", frames, fps=8)
    mask = read_mask(tmp_path / "mask.mp4", (32, 32), (3, 32, 32), 8.0)
    assert mask.flatten(1).float().mean(1).tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="has 3 frames at 8 fps, but the clip has 5; give one mask per frame"):
        read_mask(tmp_path / "mask.mp4", (32, 32), (5, 32, 32), 8.0)

"""Long videos into clips: cuts, lengths, what is left out, and calls that were stopped."""

import json
import os
import sys

import numpy as np
import pytest

pytest.importorskip("scenedetect", reason="scenedetect is not installed (it is in stdit[split])")

from stdit.data import VideoReader
from stdit.data.manifest import read_manifest
from stdit.data.scenes import ClipRules, Survey, brightness, clips_of, sift
from stdit.data.split import Splitter
from stdit.data.video_io import frames_at
from stdit.data.video_write import write_video
from stdit.recipes import split


def scene(count, seed, *, moves=True, scale=1.0):
    """Frames (count, 48, 64, 3) of random squares, which move to the right or stand still."""
    squares = np.random.default_rng(seed).integers(0, 255, (6, 8, 3)) * scale
    frame = np.kron(squares, np.ones((8, 8, 1))).astype(np.uint8)
    return np.stack([np.roll(frame, i if moves else 0, 1) for i in range(count)])


def signature(frames):
    """The mean colour of every frame, which a scene keeps while it moves."""
    return frames.astype(float).mean((1, 2))


FILM = [(40, 1, {}), (30, 2, {}), (30, 3, {"scale": 0.02}), (30, 4, {"moves": False}), (10, 5, {}), (34, 6, {})]


@pytest.fixture
def films(tmp_path):
    (tmp_path / "in").mkdir()
    film = np.concatenate([scene(count, seed, **how) for count, seed, how in FILM])
    write_video(tmp_path / "in" / "film.mp4", film, fps=24)
    write_video(tmp_path / "in" / "one.mp4", scene(30, 9), fps=24)
    return tmp_path / "in"


def run(films, output, *more):
    return split.main([str(films), "--output", str(output), "--frames", "8", "--fps", "12", "--workers", "0", *more])


def rows_of(output):
    return [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()]


def test_clips_have_one_length_and_rate_and_hold_no_cut(films, tmp_path, capsys):
    assert run(films, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "2 videos, 7 scenes: 6 clips of 8 frames at 12 a second (0.67 s)" in said
    assert "left out: 1 scene, shorter than a clip" in said
    assert "left out: 1 clip, black" in said and "left out: 1 clip, still" in said
    assert "no cut was found in 1 video" in said
    firsts = np.cumsum([0, *(count for count, *_ in FILM)])
    table = read_manifest(tmp_path / "out" / "manifest.jsonl")
    assert [row.path.name for row in table.rows] == [
        f"film-{firsts[0]:07d}.mp4", f"film-{firsts[0] + 16:07d}.mp4", f"film-{firsts[1]:07d}.mp4",
        f"film-{firsts[5]:07d}.mp4", f"film-{firsts[5] + 16:07d}.mp4", "one-0000000.mp4",
    ]  # fmt: skip
    for row in table.rows:
        with VideoReader(row.path) as reader:
            assert len(reader) == 8 and reader.fps == pytest.approx(12) and reader.size == (48, 64)
            colours = signature(reader.get_frames(range(8)))
            moved = np.abs(reader[7].astype(int) - reader[0]).mean()
        assert np.abs(colours - colours[0]).max() < 3 and moved > 10
        assert row.caption == "" and row.label is None
        assert row.columns["start"] == pytest.approx(int(row.path.stem[-7:]) / 24, abs=1e-3)
    assert [row.columns["scene"] for row in table.rows][:3] == ["film.mp4#0", "film.mp4#0", "film.mp4#1"]


def test_a_video_that_gives_no_clip_says_why_in_one_line_and_another_length_may_follow(films, tmp_path, capsys):
    arguments = [str(films / "one.mp4"), "--output", str(tmp_path / "out"), "--fps", "12"]
    assert split.main([*arguments, "--frames", "81"]) == 1
    said = capsys.readouterr().out
    assert "1 video, 1 scene: 0 clips" in said and "no cut was found in 1 video" in said
    assert "1 scene, shorter than a clip; the longest lasts 1.25 s (use fewer --frames" in said
    assert split.main([*arguments, "--frames", "8"]) == 0
    with pytest.raises(ValueError, match=r"clips of other settings \(frames=8\)"):
        split.main([*arguments, "--frames", "9"])


def test_a_call_that_was_stopped_goes_on_and_overwrites_nothing(films, tmp_path, monkeypatch):
    assert run(films, tmp_path / "whole") == 0
    load = Splitter.load

    def stopped(self, key, *rest):
        if key == 1:
            raise KeyboardInterrupt
        return load(self, key, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Splitter, "load", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(films, tmp_path / "out")
    manifest = tmp_path / "out" / "manifest.jsonl"
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 5
    # A caption that was written, a clip without its entry, and a line that was cut.
    manifest.write_text("".join(json.dumps({**row, "caption": "mine"}) + "\n" for row in rows) + '{"path": "one-0')
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.mp4")}
    (tmp_path / "out" / "videos.jsonl").write_text("")
    assert run(films, tmp_path / "out") == 0
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.mp4")}
    assert before.items() <= after.items()
    assert [row["caption"] for row in rows_of(tmp_path / "out")] == ["mine"] * 5 + [""]
    whole = rows_of(tmp_path / "whole")
    assert [row["path"] for row in rows_of(tmp_path / "out")] == [row["path"] for row in whole]
    for row in whole:
        assert (tmp_path / "out" / row["path"]).read_bytes() == (tmp_path / "whole" / row["path"]).read_bytes()


def test_a_clip_that_is_gone_is_cut_again_while_the_manifest_names_it(films, tmp_path):
    assert run(films, tmp_path / "out") == 0
    rows, manifest = rows_of(tmp_path / "out"), tmp_path / "out" / "manifest.jsonl"
    first, last = (tmp_path / "out" / rows[i]["path"] for i in (0, -1))
    before = first.read_bytes()
    first.unlink()
    last.unlink()
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))  # which the user has dropped
    assert rows[0]["source"] != rows[-1]["source"]
    assert run(films, tmp_path / "out") == 0
    assert first.read_bytes() == before and not last.exists() and rows_of(tmp_path / "out") == rows[:-1]


def test_a_row_without_the_end_of_its_line_is_kept_and_a_manifest_that_was_removed_is_written_again(films, tmp_path):
    assert run(films, tmp_path / "out") == 0
    rows, manifest = rows_of(tmp_path / "out"), tmp_path / "out" / "manifest.jsonl"
    manifest.write_text(manifest.read_text().rstrip("\n"))  # as an editor leaves it
    assert run(films, tmp_path / "out") == 0
    assert rows_of(tmp_path / "out") == rows and manifest.read_text().endswith("\n")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.mp4")}
    manifest.unlink()
    assert run(films, tmp_path / "out") == 0
    assert rows_of(tmp_path / "out") == rows
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.mp4")} == before


def test_a_clip_that_was_taken_out_stays_out_when_one_of_its_video_is_cut_again(films, tmp_path):
    assert run(films, tmp_path / "out") == 0
    rows, manifest = rows_of(tmp_path / "out"), tmp_path / "out" / "manifest.jsonl"
    first, second = rows[:2]
    assert first["source"] == second["source"]
    for row in (first, second):
        (tmp_path / "out" / row["path"]).unlink()
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    assert run(films, tmp_path / "out") == 0
    assert rows_of(tmp_path / "out") == rows[1:]
    assert not (tmp_path / "out" / first["path"]).exists() and (tmp_path / "out" / second["path"]).is_file()


def test_clips_of_a_call_that_was_stopped_in_its_first_video_are_not_taken_for_those_of_other_settings(
    films, tmp_path, monkeypatch
):
    write, written = Splitter._write, []

    def stopped(self, *arguments):
        if written:
            raise KeyboardInterrupt
        written.append(write(self, *arguments))

    with monkeypatch.context() as patch:
        patch.setattr(Splitter, "_write", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(films, tmp_path / "out")
    with pytest.raises(ValueError, match=r"clips of other settings \(frames=8, size=None\)"):
        run(films, tmp_path / "out", "--frames", "12", "--size", "32")
    assert run(films, tmp_path / "out") == 0
    for row in rows_of(tmp_path / "out"):
        with VideoReader(tmp_path / "out" / row["path"]) as reader:
            assert len(reader) == 8


def test_processes_cut_the_same_clips_and_videos_that_cannot_be_read_are_named(films, tmp_path, capsys):
    run(films, tmp_path / "here")
    (films / "broken.mp4").write_bytes(b"nothing")
    write_video(films / "slow.mp4", scene(10, 1), fps=8)
    capsys.readouterr()
    assert run(films, tmp_path / "there", "--workers", "1") == 0
    said = capsys.readouterr().out
    assert "not cut: 'broken.mp4' is not a video" in said
    assert "not cut: 'slow.mp4' has 8 frames a second, fewer than 12; lower --fps" in said
    assert rows_of(tmp_path / "here") == rows_of(tmp_path / "there")


def test_class_folders_become_labels_and_large_videos_smaller(films, tmp_path):
    for name, label in (("film", "run"), ("one", "walk")):
        (films / label).mkdir()
        (films / f"{name}.mp4").rename(films / label / f"{name}.mp4")
    run(films, tmp_path / "out", "--size", "24")
    table = read_manifest(tmp_path / "out" / "manifest.jsonl")
    assert table.class_names == ["run", "walk"]
    assert table.rows[-1].path.parent.name == "walk"
    with VideoReader(table.rows[-1].path) as reader:
        assert reader.size == (24, 32)


def test_what_would_mix_or_overwrite_is_refused_before_anything_is_written(films, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files already"):
        run(films, other)
    with pytest.raises(ValueError, match="lies in"):
        run(films, films / "clips")
    with pytest.raises(ValueError, match="does not exist"):
        run(films / "none.mp4", tmp_path / "out")
    with pytest.raises(ValueError, match="holds 0 videos"):
        run(other, tmp_path / "out")
    write_video(films / "one.mov.mp4", scene(30, 9), fps=24)
    (films / "one.mov.mp4").rename(films / "one.mov")
    with pytest.raises(ValueError, match="would have the same names"):
        run(films, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (films / "one.mov").unlink()
    run(films, tmp_path / "out")
    os.utime(films / "one.mp4", (1, 1))
    with pytest.raises(ValueError, match="is not the video that 'one.mp4' was when it was cut"):
        run(films, tmp_path / "out")


def test_without_scenedetect_the_command_names_the_extra(films, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scenedetect.detectors", None)
    with pytest.raises(ValueError, match=r"pip install 'stdit\[split\]'"):
        run(films, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_blocks_have_the_mean_brightness_of_their_part():
    frame = np.zeros((20, 17, 3), np.uint8)
    frame[:2] = 200
    found = brightness(frame)
    assert found.shape == (8, 8) and found[0].tolist() == [200] * 8 and not found[1:].any()


def test_clips_of_a_variable_rate_are_picked_by_time():
    times = np.cumsum([0, *[0.05] * 20, *[0.1] * 20])
    found = Survey([0, 25, 40], np.zeros((40, 8, 8), np.uint8), times)
    rules = ClipRules(4, 10)
    clips = clips_of(found, lambda at: frames_at(times[:-1], at, 1e-3), rules)
    assert [clip.indices for clip in clips if clip.scene == 0] == [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18, 20, 21]]
    assert all(25 <= i < 40 for clip in clips if clip.scene == 1 for i in clip.indices)
    used, left_out = sift(found, clips, rules)
    assert used == [] and left_out == {"black": len(clips)}

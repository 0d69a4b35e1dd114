"""`inspect` and `check_media` predict what training does with a file."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from media import write_barcodes
from PIL import Image

from stdit.data import inspections, measures
from stdit.data.config import DataConfig
from stdit.data.datasets import build_dataset
from stdit.data.inspect import inspect
from stdit.data.loader import KeyedSamples
from stdit.data.manifest import read_manifest
from stdit.data.samplers import UniformSampler
from stdit.data.video_io import VideoError
from stdit.data.workers import SET_ASIDE
from stdit.recipes import check_media


@pytest.fixture
def clips(tmp_path):
    """A folder of files that fit, are short, slow, small, broken, and a picture."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for name, count, fps in (("fine", 20, 24), ("short", 3, 24), ("slow", 20, 6)):
        write_barcodes(folder / f"{name}.mp4", count, fps=fps)
    (folder / "broken.mp4").write_bytes((folder / "fine.mp4").read_bytes()[:400])
    return folder


@pytest.mark.parametrize("settings", [{}, {"fps": 12.0}, {"fps": 24.0}, {"num_frames": 1}, {"num_frames": 21}])
def test_inspect_refuses_a_file_if_and_only_if_loading_does(clips, settings):
    config = DataConfig(
        **{"root": str(clips), "num_frames": 5, "height": 32, "width": 32, "source": "videos", **settings}
    )
    dataset = build_dataset(config)
    for index, row in enumerate(dataset.rows):
        found = inspect(row.path, config)
        try:
            dataset.load(index, np.random.default_rng(0))
        except VideoError as error:
            assert found.refused and found.refused in str(error)
        else:
            assert found.refused is None


def test_inspect_says_what_training_would_do_to_a_clip(clips):
    config = DataConfig(num_frames=5, height=96, width=64, fps=12)
    assert inspect(clips / "slow.mp4", config).notes == (
        "has 6 frames a second, fewer than data.fps=12: frames are repeated",
        "is smaller than the size of the config: enlarged 2 times",
    )
    assert inspect(clips / "fine.mp4", DataConfig(num_frames=5, height=48, width=64)).notes == ()


def test_a_picture_is_used_only_where_one_frame_is_enough(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    assert "is an image" in inspect(tmp_path / "a.png", DataConfig(num_frames=5)).refused
    assert inspect(tmp_path / "a.png", DataConfig(num_frames=1)).refused is None
    assert inspect(tmp_path / "a.png", DataConfig(sizes=[[5, 16, 16], [1, 16, 16]])).refused is None


def test_threads_read_clips_of_one_file_at_the_same_time(clips):
    lines = "".join(f"fine.mp4,caption {i}\n" for i in range(40))
    (clips / "m.csv").write_text("path,caption\n" + lines)
    dataset = build_dataset(DataConfig(root=str(clips), manifest="m.csv", num_frames=5, height=48, width=64))
    load = lambda i: dataset.load(i, np.random.default_rng(i))["pixels"].numpy()  # noqa: E731
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(load, range(40)))
    assert all(np.array_equal(load(i), pixels) for i, pixels in enumerate(together))


def test_a_file_is_measured_once_until_it_changes(clips, monkeypatch):
    config = DataConfig(root=str(clips), sizes=[[5, 32, 32]])

    def shapes():
        dataset = build_dataset(config)
        return {row.path.name: dataset.shape(i) for i, row in enumerate(dataset.rows) if row.path.name != "broken.mp4"}

    first = shapes()
    monkeypatch.setattr("stdit.data.clips.VideoReader", None)  # a file that is opened would fail
    assert shapes() == first
    monkeypatch.undo()
    write_barcodes(clips / "short.mp4", 9)
    assert shapes() == {**first, "short.mp4": (9, 48, 64)}


def test_a_cache_of_measures_that_cannot_be_used_is_no_error(clips, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STDIT_CACHE", str(tmp_path / "file"))
    dataset = build_dataset(DataConfig(root=str(clips), sizes=[[5, 32, 32]]))
    assert dataset.shape(1) == (20, 48, 64)
    monkeypatch.setenv("STDIT_CACHE", str(tmp_path / "cache"))
    known = measures.Measures(clips, "pyav")
    known.put(clips / "fine.mp4", inspect(clips / "fine.mp4").facts)
    (file,) = (tmp_path / "cache/measures").iterdir()
    file.write_text('garbage\n{"path": 3}\n' + file.read_text() + '{"path": "cut')
    assert measures.Measures(clips, "pyav").get(clips / "fine.mp4").frames == 20


def test_annotations_are_found_under_the_names_of_version_0_1_0(clips):
    (clips / "fine.txt").write_text("a bar code")
    dataset = build_dataset(DataConfig(root=str(clips)))
    index = [row.path.name for row in dataset.rows].index("fine.mp4")
    assert (dataset.caption(index), dataset.label(index)) == ("a bar code", None)
    assert (
        build_dataset(DataConfig(source="shapes")).label(3)
        == build_dataset(DataConfig(source="shapes")).record(3)["label"]
    )


def test_check_media_counts_by_reason_and_writes_a_manifest_that_training_reads_in_full(clips, tmp_path, capsys):
    (tmp_path / "t.yaml").write_text("data: {num_frames: 5, height: 32, width: 32}\n")
    arguments = [str(clips), "--config", str(tmp_path / "t.yaml"), "data.fps=12", "--workers", "0"]
    outputs = [
        "--manifest",
        str(tmp_path / "ok.jsonl"),
        "--sheet",
        str(tmp_path / "s.png"),
        "--report",
        str(tmp_path / "r.jsonl"),
    ]
    assert check_media.main(arguments + outputs) == 1
    said = capsys.readouterr().out
    for words in ("3 of 4 files read in full", "lasts N s of the N s needed", "used, but:      1  has N frames a second", "training uses 2 of 4", "24 (1 file), 6 (1 file)", "48 x 64"):  # fmt: skip
        assert words in said, words
    assert "salvage" not in said  # a remedy that a command does not have
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.width > 300
    table = read_manifest(tmp_path / "ok.jsonl", tmp_path)
    assert [row.path.name for row in table.rows] == ["fine.mp4", "slow.mp4"]
    config = DataConfig(root=str(clips), manifest=str(tmp_path / "ok.jsonl"), num_frames=5, height=32, width=32, fps=12)
    dataset = build_dataset(config)
    samples = KeyedSamples(dataset, 0, UniformSampler(0, len(dataset), 8))
    assert not any(samples[0, slot]["bad"] for slot in range(8))
    with pytest.raises(ValueError, match="exists; choose another name"):
        check_media.main(arguments + outputs)


def test_a_check_goes_on_from_its_report_and_reads_changed_files_again(clips, tmp_path, monkeypatch, capsys):
    report = tmp_path / "r.jsonl"
    assert check_media.main([str(clips), "--report", str(report), "--workers", "0"]) == 1
    whole = report.read_text()
    report.write_text("".join(whole.splitlines(keepends=True)[:2]) + '{"path": "cut')  # as after a kill
    read = []
    original = inspections.inspect
    monkeypatch.setattr(inspections, "inspect", lambda path, *a, **k: read.append(path.name) or original(path, *a, **k))
    assert check_media.main([str(clips), "--report", str(report), "--workers", "0"]) == 1
    assert read == ["short.mp4", "slow.mp4"]
    strip = lambda text: [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text.splitlines()]  # noqa: E731
    assert strip(report.read_text()) == strip(whole)
    write_barcodes(clips / "broken.mp4", 8)
    assert check_media.main([str(clips), "--report", str(report), "--workers", "0"]) == 0
    assert read[2:] == ["broken.mp4"]
    (tmp_path / "notes.txt").write_text("something else")
    with pytest.raises(ValueError, match="is no report"):
        check_media.main([str(clips), "--report", str(tmp_path / "notes.txt")])
    assert (tmp_path / "notes.txt").read_text() == "something else"


def test_files_are_checked_in_processes_with_the_same_result(clips, tmp_path):
    paths = sorted(clips.glob("*.mp4"))
    here, there = (list(inspections.inspect_each(paths, "pyav", workers, 60)) for workers in (0, 1))
    assert [{**entry, "seconds": 0} for entry in here if "seconds" in entry] == [{**e, "seconds": 0} for e in there]


def test_an_overview_escapes_what_a_stranger_wrote(clips, capsys):
    os.rename(clips / "broken.mp4", clips / "b\x1b[31m\n.mp4")
    check_media.main([str(clips)])
    assert "\x1b" not in capsys.readouterr().out


def test_reading_a_report_of_many_rows_is_fast(tmp_path):
    entry = {"path": "x", "frames": 1, "last": 0.0, "fps": 1.0, "height": 1, "width": 1}
    (tmp_path / "r.jsonl").write_text("".join(json.dumps({**entry, "path": str(i)}) + "\n" for i in range(20_000)))
    began = time.perf_counter()
    assert len(inspections.read_report(tmp_path / "r.jsonl")) == 20_000
    assert time.perf_counter() - began < 5


def test_an_output_that_cannot_be_written_is_refused_before_files_are_read(clips, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(inspections, "inspect", None)  # reading would fail
    for option in ("--manifest", "--sheet", "--report"):
        with pytest.raises((NotADirectoryError, FileExistsError)):
            check_media.main([str(clips), option, str(tmp_path / "file" / "out.jsonl")])


def test_a_file_that_takes_more_memory_than_a_process_may_is_refused_and_others_are_read(tmp_path):
    resource = pytest.importorskip("resource")
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("this system limits no memory of a process")
    paths = [tmp_path / name for name in ("a.png", "large.png", "z.png")]
    for path, side in zip(paths, (32, 8000, 32), strict=True):  # 192 MB
        Image.new("RGB", (side, side)).save(path, compress_level=1)
    report, limit = tmp_path / "report.jsonl", resource.getrlimit(resource.RLIMIT_AS)
    settings = {"backend": "pyav", "workers": 1, "timeout": 60.0}
    first, large, last = inspections.inspect_all(paths, report, memory=0.1, **settings)
    assert large["refused"] == "takes more memory to be read in full than --memory=0.1 GB"
    assert (first["height"], last["height"]) == (32, 32) and resource.getrlimit(resource.RLIMIT_AS) == limit
    assert inspections.inspect_all(paths, report, memory=0.1, **{**settings, "backend": None})[1] == large  # remembered
    assert inspections.inspect_all(paths, report, memory=0.0, **{**settings, "workers": 0})[1]["height"] == 8000


def test_a_file_that_stalled_its_process_is_tried_again_by_the_next_command(tmp_path):
    path, report = write_barcodes(tmp_path / "a.mp4", 5), tmp_path / "report.jsonl"
    files = inspections._Files([path], "pyav", 0.0)
    aside = f"{str(path)!r} {SET_ASIDE} 2 loader processes in a row took more than data.timeout=3 seconds"
    entry = files.load(0, {str(path): aside}, print)
    assert "refused" in entry and "took more than --timeout=3 seconds" in entry["refused"]
    report.write_text(json.dumps(entry) + "\n")
    settings = {"backend": "pyav", "workers": 0, "timeout": 3.0, "memory": 0.0}
    assert inspections.inspect_all([path], report, **settings)[0]["frames"] == 5
    assert inspections.inspect_all([path], report, **{**settings, "backend": None})[0]["frames"] == 5  # remembered


def test_a_few_files_are_read_in_a_process_with_limits_and_none_starts_no_process(tmp_path, monkeypatch):
    pools = []
    real = inspections.WorkerPool

    def pool(samples, workers, *arguments, **limits):
        pools.append((workers, limits["memory"]))
        return real(samples, workers, *arguments, **limits)

    monkeypatch.setattr(inspections, "WorkerPool", pool)
    write_barcodes(tmp_path / "a.mp4", 5)
    settings = {"backend": "pyav", "workers": None, "timeout": 60.0, "memory": 2.0}
    [entry] = inspections.inspect_all([tmp_path / "a.mp4"], tmp_path / "report.jsonl", **settings)
    assert entry["frames"] == 5 and pools == [(1, 2e9)]
    assert inspections.inspect_all([tmp_path / "a.mp4"], tmp_path / "report.jsonl", **settings) == [entry]
    assert len(pools) == 1

"""A run takes its rows from an index that it makes, brings up to date, or finds, and has the losses of its files."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from index_files import config_of, write_clips
from media import write_barcodes
from PIL import Image

from stdit.data import indexed, inspections, make_index
from stdit.data.datasets import build_dataset
from stdit.data.identity import fingerprint
from stdit.data.index import MediaIndex
from stdit.data.indexed import build_indexed
from stdit.data.inspections import inspect_all
from stdit.files import claimed
from stdit.recipes import train


@pytest.fixture
def clips(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_clips(tmp_path / "clips")


def test_a_training_makes_the_index_that_it_is_given_and_brings_it_up_to_date(clips, monkeypatch, capsys):
    config = "data: {root: clips, num_frames: 5, height: 32, width: 32, workers: 0, max_bad_fraction: 0.5}\nmodel: {size: S/2, depth: 1, hidden_size: 16, num_heads: 2}\ntrain: {steps: 1, batch_size: 2, samples: 0, precision: fp32}\n"
    Path("t.yaml").write_text("name: t\n" + config)
    given = ["t.yaml", "data.manifest=manifest.jsonl", "data.index=clips.index"]
    read = []
    monkeypatch.setattr(
        make_index,
        "inspect_all",
        lambda paths, *a, **k: read.append(len(paths)) or inspect_all(paths, *a, **{**k, "workers": 0}),
    )

    def loss(name, *arguments):
        assert train.run([*arguments, f"name={name}"]) == 0
        return Path(f"output/{name}/training_metrics.csv").read_text().splitlines()[1].split(",")[1]

    assert loss("plain", *given[:2]) == loss("first", *given) == loss("again", *given)
    assert read == [6] and len(MediaIndex(Path("clips.index"))) == 6
    with open("clips/manifest.jsonl", "a") as stream:
        stream.write(json.dumps({"path": "clip é 0.mp4", "label": "a", "caption": "", "score": 9}) + "\n")
    assert loss("longer", *given) == loss("plain longer", *given[:2])
    assert len(MediaIndex(Path("clips.index"))) == 7
    other = [*given, "data.columns={label: score}"]
    assert loss("columns", *other) == loss("plain columns", *given[:2], other[-1])
    assert MediaIndex(Path("clips.index")).info["class_names"] != ["a", "b"] and read[-1] == 6
    Path("notes.index").write_text("my notes, which are no table")
    assert train.run([*given[:2], "name=notes", "data.index=notes.index"]) == 1
    assert "data.index=notes.index is there and is no index" in capsys.readouterr().err
    assert Path("notes.index").read_text().startswith("my notes")
    assert train.run(["t.yaml", "name=other", "data.index=clips.index"]) == 1
    assert "is the index of" in capsys.readouterr().err
    assert train.run(["t.yaml", "name=inside", "data.index=clips/own.index"]) == 1
    assert "put it next to it" in capsys.readouterr().err


def test_an_index_that_a_run_is_given_follows_its_sizes_its_root_and_files_changed_in_place(clips, monkeypatch):
    (clips / "manifest.jsonl").unlink()
    for i in range(3):
        Image.fromarray(np.full((48, 64, 3), 60 * i, np.uint8)).save(clips / f"picture {i}.png")
    read, real = [], inspections.inspect
    monkeypatch.setattr(inspections, "inspect", lambda path, *a, **k: read.append(path.name) or real(path, *a, **k))
    monkeypatch.setattr(make_index, "inspect_all", lambda *a, **k: inspect_all(*a, **{**k, "workers": 0}))

    def rows(**settings):
        given = replace(config_of("", **settings), manifest=None, index="clips.index", source="auto")
        found, plain = build_indexed(given), build_dataset(replace(given, index=None))
        assert fingerprint(found) == fingerprint(plain) and len(found) == len(plain)
        return len(found)

    videos = [[5, 32, 32]]
    assert (rows(sizes=videos), rows(), rows(), rows(sizes=videos)) == (6, 9, 9, 6)
    assert len(read) == 9  # each file once
    read.clear()
    write_barcodes(clips / "clip é 3.mp4", 25)  # in place: the folder is as it was
    monkeypatch.setattr("stdit.data.index._COMPARED", 1)  # in place of a thousand
    monkeypatch.setattr(MediaIndex.check, "__defaults__", (1,))
    assert rows(sizes=videos) == 6 and read == ["clip é 3.mp4"]

    Path("m.csv").write_text("path\nclips/clip é 0.mp4\n")
    for root in (".", "clips"):
        found = build_indexed(config_of("m.csv", root=root, index="m.index"))
        assert MediaIndex(Path("m.index")).root == Path(root).absolute() and found.shape(0)[0] == 20


def test_an_index_that_another_run_makes_again_at_once_is_made_for_this_one_again(clips, monkeypatch):
    (clips / "manifest.jsonl").unlink()
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(clips / "picture.png")
    monkeypatch.setattr(make_index, "inspect_all", lambda *a, **k: inspect_all(*a, **{**k, "workers": 0}))
    given = replace(config_of(""), manifest=None, index="clips.index", source="auto")
    real, others = indexed.make_index, [replace(given, index=None, sizes=[[5, 32, 32]])]

    def made_again(data, output, **options):
        found = real(data, output, **options)
        if others:
            real(others.pop(), output, **options)
        return found

    monkeypatch.setattr(indexed, "make_index", made_again)
    assert len(build_indexed(given)) == 7 and not others
    listed = replace(given, manifest="m.csv", index="m.index", columns={"caption": "text"})
    Path("m.csv").write_text("path,text\nclips/clip é 0.mp4,zero\n")
    listed.root = "."
    others += [replace(listed, index=None, columns={})]
    assert build_indexed(listed).record(0)["caption"] == "zero" and not others
    others += [replace(given, index=None, sizes=[[5, 32, 32]])] * 9
    Path("clips.index").unlink()
    with pytest.raises(ValueError, match="is made again and again by a run of another data.root"):
        build_indexed(given)


def test_an_index_of_a_manifest_needs_the_folder_of_its_files(clips, monkeypatch):
    monkeypatch.setattr(make_index, "inspect_all", None)
    given = config_of("clips/manifest.jsonl", root="data/no such folder", index="clips.index")
    with pytest.raises(ValueError, match="data.root='data/no such folder' is no folder, and an index .*set data.root"):
        build_indexed(given)
    assert not Path("clips.index").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="other systems write names in one way")
def test_an_index_whose_name_is_no_text_is_made_and_one_that_another_process_makes_is_waited_for(clips, monkeypatch):
    monkeypatch.setattr(make_index, "inspect_all", lambda *a, **k: inspect_all(*a, **{**k, "workers": 0}))
    output = Path(os.fsdecode(b"n\xff.index"))
    waited = []

    def end_of_the_claim(seconds):
        waited.append(seconds)
        claim.close()

    monkeypatch.setattr(indexed.time, "sleep", end_of_the_claim)
    with ExitStack() as claim:
        claim.enter_context(claimed([output]))
        assert len(build_indexed(config_of("clips/manifest.jsonl", index=str(output)))) == 6
    assert len(waited) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_script_that_runs_at_its_import_makes_an_index_alone_and_ends_in_an_error_with_processes(clips, workers):
    Path("script.py").write_text(
        "from stdit.data.config import DataConfig\nfrom stdit.data.indexed import build_indexed\n"
        f"data = DataConfig(root='clips', num_frames=5, height=32, width=32, workers={workers}, index='clips.index')\n"
        "print(len(build_indexed(data)))\n"
    )
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, timeout=120)
    if workers:
        assert done.returncode == 1 and "put what a script does below `if __name__ == '__main__':`" in done.stderr
    else:
        assert done.stdout == "6\n", done.stderr


def test_a_process_that_another_has_started_waits_for_the_index_that_a_third_makes(clips, monkeypatch):
    monkeypatch.setattr(make_index, "inspect_all", lambda *a, **k: inspect_all(*a, **{**k, "workers": 0}))
    monkeypatch.setattr("multiprocessing.parent_process", lambda: object())
    output = Path("clips.index")
    with ExitStack() as claim:
        claim.enter_context(claimed([output]))
        monkeypatch.setattr(indexed.time, "sleep", lambda seconds: claim.close())
        assert len(build_indexed(config_of("clips/manifest.jsonl", index=str(output)))) == 6

"""A run takes its rows from an index that it makes, brings up to date, or finds, and has the losses of its files."""

import json
import os
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
from stdit.data.video_io import VideoError
from stdit.data.video_write import write_video
from stdit.recipes import index, train


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


@pytest.fixture
def many(clips, monkeypatch):
    """The folder of clips, six of which are many."""
    monkeypatch.setattr(indexed, "MANY", 6)
    monkeypatch.setattr(make_index, "inspect_all", lambda *a, **k: inspect_all(*a, **{**k, "workers": 0}))
    return clips


def own(**settings):
    """A config of the folder, without its manifest, that leaves the index to the run."""
    return replace(config_of(""), **{"manifest": None, "index": "auto", "source": "auto", **settings})


def made():
    return sorted(path.name for path in Path("data").glob("*"))


def test_a_run_on_many_files_makes_an_index_by_itself_with_the_same_losses_and_one_on_few_files_none(
    clips, many, monkeypatch, capsys
):
    Path("t.yaml").write_text(
        "name: t\n"
        "data: {root: clips, num_frames: 5, height: 32, width: 32, workers: 0, max_bad_fraction: 0.5}\n"
        "model: {size: S/2, depth: 1, hidden_size: 16, num_heads: 2}\n"
        "train: {steps: 1, batch_size: 2, samples: 0, precision: fp32}\n"
    )

    def losses(name, *arguments):
        assert train.run(["t.yaml", f"name={name}", *arguments]) == 0
        return [row.split(",")[1] for row in Path(f"output/{name}/training_metrics.csv").read_text().splitlines()[1:]]

    plain = losses("plain", "data.index=null")
    assert made() == []
    monkeypatch.setattr(indexed, "MANY", 7)
    assert losses("few") == plain and made() == []
    monkeypatch.setattr(indexed, "MANY", 6)
    assert losses("many") == plain
    [name] = made()
    said = capsys.readouterr().err
    assert (
        f"data/{name}: headers of files that are new or have changed are read, once (data.index=null: no index)" in said
    )
    assert losses("again") == plain and "are read, once" not in capsys.readouterr().err
    further = ["plain", "data.index=null", "train.steps=2"], ["many", "train.steps=2"]
    assert losses(*further[0]) == losses(*further[1])  # both resume
    write_barcodes(clips / "new.mp4", 12)
    assert losses("more") == losses("more plain", "data.index=null") and len(MediaIndex(Path("data") / name)) == 7


def test_indexes_that_runs_make_by_themselves_are_apart_by_all_that_their_rows_depend_on(many):
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(many / "picture.png")
    (many / "manifest.jsonl").rename(many / "m.jsonl")
    for settings in (
        {}, {"sizes": []}, {"manifest": "m.jsonl", "columns": {"label": "score"}}, {"manifest": "m.jsonl"},
    ):  # fmt: skip
        before = made()
        given = own(**settings)
        found, plain = build_indexed(given), build_dataset(replace(given, index=None))
        assert isinstance(found.rows, MediaIndex) and fingerprint(found) == fingerprint(plain)
        assert len(made()) == len(before) + 1
        assert list(build_indexed(given).rows) == list(found.rows) and len(made()) == len(before) + 1


def test_an_index_that_a_run_makes_by_itself_changes_no_sample_of_damaged_files_and_of_those_that_change(many):
    (many / "manifest.jsonl").unlink()
    write_video(many / "damaged.mp4", np.random.default_rng(0).integers(0, 255, (90, 48, 64, 3), dtype=np.uint8))
    whole = bytearray((many / "damaged.mp4").read_bytes())
    middle = len(whole) * 3 // 4
    whole[middle : middle + 2000] = bytes(2000)
    (many / "damaged.mp4").write_bytes(whole)
    (many / "clip é 0.txt").write_text("a cat")
    found, plain = build_indexed(own(sizes=[])), build_dataset(replace(own(sizes=[]), index=None))
    assert isinstance(found.rows, MediaIndex)

    def sample(dataset, i, key):
        try:
            return dataset.load(i, np.random.default_rng(key))["pixels"].sum().item()
        except VideoError as error:
            return str(error)

    def same():
        return [
            (sample(found, i, key), found.name(i), found.record(i)) for i in range(len(found)) for key in range(8)
        ] == [(sample(plain, i, key), plain.name(i), plain.record(i)) for i in range(len(plain)) for key in range(8)]

    assert same() and any(isinstance(sample(found, 6, key), str) for key in range(8))
    assert any(isinstance(sample(found, 6, key), int) for key in range(8))
    write_barcodes(many / "clip é 1.mp4", 25)  # after the run has begun
    (many / "clip é 2.txt").write_text("a dog")
    assert same()
    (many / "clip é 0.txt").write_text("two cats")  # in place, which the folder's time does not show
    assert build_indexed(own(sizes=[])).record(0)["caption"] == "two cats"


def test_a_run_takes_no_index_that_it_has_not_made_unless_it_is_named(many, monkeypatch):
    (many / "manifest.jsonl").unlink()
    assert index.main(["clips", "--output", "data/clips.index", "--workers", "0"]) == 0
    found = build_indexed(own(sizes=[]))
    assert found.rows.path != Path("data/clips.index") and not found.rows.decoded
    assert build_indexed(replace(own(sizes=[]), index="data/clips.index")).rows.decoded
    with (
        monkeypatch.context() as patch
    ):  # headers that another index has are not read again, and files are read in full for one that is named
        patch.setattr(inspections, "inspect", None)
        assert len(build_indexed(own()).rows) == 6
    read = []
    real = inspections.inspect
    monkeypatch.setattr(inspections, "inspect", lambda path, *a, **k: read.append(k["decode"]) or real(path, *a, **k))
    os.replace(found.rows.path, "data/own.index")
    assert build_indexed(replace(own(sizes=[]), index="data/own.index")).rows.decoded and read == [True] * 6


def test_an_index_of_a_manifest_that_lies_elsewhere_is_made_where_no_root_is_and_goes_through_a_linked_folder(many):
    Path("deep/er").mkdir(parents=True)
    Path("deep/er/data").symlink_to(Path("store").absolute())
    Path("store").mkdir()
    given = own(root="data/no such folder", manifest=str(many / "manifest.jsonl"), sizes=[])
    plain = build_dataset(replace(given, index=None))
    assert list(build_indexed(given).rows) == list(plain.rows) and len(made()) == 1
    os.chdir("deep/er")
    for place in (".", ".."):
        os.chdir(place)
        if place == "..":
            Path("data").symlink_to(Path("../store").absolute())
        found = build_indexed(given)
        assert isinstance(found.rows, MediaIndex) and list(found.rows) == list(plain.rows)
    assert len(list(Path("data/").glob("*.index"))) == 1


def test_processes_of_several_machines_make_no_index_of_their_own_and_read_one_that_is_there(many, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert isinstance(build_indexed(own()).rows, list) and made() == []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert isinstance(build_indexed(own()).rows, MediaIndex)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert isinstance(build_indexed(own()).rows, MediaIndex)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="other systems write names in one way")
def test_an_index_of_a_folder_whose_name_is_no_text_or_very_long_is_made(many):
    for name in (b"cl\xff", b"n" * 250):
        os.rename(many, name)
        found = build_indexed(own(root=os.fsdecode(name), sizes=[]))
        assert isinstance(found.rows, MediaIndex)
        os.rename(name, many)


@pytest.mark.parametrize("place", ["within", "not writable", "not made", "stores", "archives"])
def test_a_run_does_without_an_index_of_its_own_where_none_can_be_or_none_is_asked_for(many, monkeypatch, place):
    given, make = own(), place != "not made"
    if place == "within":
        given = replace(given, root=".")  # data/ lies in it
    elif place == "not writable":
        Path("data").write_text("a file")
    elif place in ("stores", "archives"):
        name = "place_of" if place == "archives" else "is_url"
        monkeypatch.setattr(indexed, name, lambda path: Path(path).suffix == ".mp4" or None)
    if place == "not writable":
        with pytest.warns(UserWarning, match=r"data/clips-.*cannot be written .*; the run goes on without an index"):
            found = build_indexed(given, make=make)
    else:
        found = build_indexed(given, make=make)
    assert isinstance(found.rows, list) and len(found) == len(build_dataset(replace(given, index=None)))
    assert not list(Path(".").rglob("*.index"))


def test_what_a_run_would_refuse_by_its_config_is_refused_before_files_are_read_for_an_index(many, monkeypatch, capsys):
    monkeypatch.setattr(make_index, "inspect_all", None)
    arguments = ["video", "vae.name=tiny", "data.root=clips", "data.num_frames=5", "data.index=clips.index"]
    for refused in ("train.parallel.context=3", "vae.name=no/where", "train.batch_size=0"):
        assert train.run([*arguments, refused]) == 1
        assert refused.split("=")[1] in capsys.readouterr().err
    with pytest.raises(TypeError, match="NoneType"):  # what is not refused is read
        train.main(arguments)

"""An index stands for the folder or manifest that it was made from, at any number of rows."""

import copy
import json
import os
import pickle
import shlex
import warnings
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from index_files import SIZES, config_of, make, write_clips
from media import write_barcodes

from stdit import warn
from stdit.data import clips as clips_module
from stdit.data import inspections
from stdit.data.base import captions_of
from stdit.data.columns import Columns, write_columns
from stdit.data.config import DataConfig
from stdit.data.datasets import build_dataset
from stdit.data.holdout import split
from stdit.data.identity import fingerprint, identity_of
from stdit.data.index import MediaIndex, write_index
from stdit.data.joint import JointDataset
from stdit.data.loader import batches
from stdit.data.manifest import Row, Table
from stdit.data.video_io import VideoError
from stdit.recipes import bench_scale, check_media, index
from stdit.recipes.order import measure


@pytest.fixture
def clips(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_clips(tmp_path / "clips")


@pytest.mark.parametrize("fps", [None, 6.0])
def test_a_dataset_of_an_index_is_that_of_its_manifest(clips, fps):
    assert make() == 0
    plain, indexed = (build_dataset(config_of(m, fps=fps)) for m in ("clips/manifest.jsonl", "clips.index"))
    assert (len(plain), plain.num_classes, plain.class_names) == (6, 2, indexed.class_names)
    assert list(indexed.rows) == list(plain.rows) and indexed.rows[1:3] == plain.rows[1:3]
    assert fingerprint(indexed) == fingerprint(plain)
    for i in range(6):
        assert identity_of(indexed, i) == identity_of(plain, i) and indexed.record(i) == plain.record(i)
        assert identity_of(indexed, i, read=True) == identity_of(plain, i, read=True)
    (shapes, buckets), (known, found) = measure(plain, SIZES, 3), measure(indexed, SIZES, 3)
    assert shapes.tolist() == known.tolist() and buckets.tolist() == found.tolist()
    assert indexed.rates == plain.rates
    captions = [plain.record(i)["caption"] for i in range(6)]
    joint = JointDataset([plain, indexed], ["plain", "indexed"])
    assert list(captions_of(indexed)) == list(captions_of(plain)) == captions == list(captions_of(joint))[6:]
    for i in (0, 3):
        one, other = (d.load(i, np.random.default_rng(i), SIZES[0])["pixels"] for d in (plain, indexed))
        assert (one == other).all()


@pytest.mark.parametrize("column", ["label", "caption", "score", "place", None])
def test_an_index_holds_out_the_clips_that_its_manifest_does(clips, column):
    rows = [json.loads(line) for line in (clips / "manifest.jsonl").read_text().splitlines()]
    rows = [{**row, "place": None if i == 2 else f"«{i % 4}»"} for i, row in enumerate(rows)]
    (clips / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert make() == 0
    plain, indexed = (split(build_dataset(config_of(m)), 0.4, column) for m in ("clips/manifest.jsonl", "clips.index"))
    assert [part.indices.tolist() for part in indexed] == [part.indices.tolist() for part in plain]
    assert all(len(part) for part in indexed)
    with pytest.raises(ValueError, match="'weather' is no column that"):
        split(build_dataset(config_of("clips.index")), 0.4, "weather")


def test_an_index_of_a_folder_is_made_again_when_files_are_added_and_reads_only_those(clips, monkeypatch, capsys):
    (clips / "manifest.jsonl").unlink()
    arguments = ["clips", "--output", "clips.index", "--workers", "0"]
    assert index.main(arguments) == 0
    config = DataConfig(root="clips", manifest="clips.index", num_frames=5, height=32, width=32)
    assert len(build_dataset(config)) == 6
    write_barcodes(clips / "new.mp4", 12)
    with pytest.raises(ValueError, match="older than its files.*clips.*stdit index clips --output clips.index"):
        build_dataset(config)
    read, original = [], inspections.inspect
    monkeypatch.setattr(inspections, "inspect", lambda path, *a, **k: read.append(path.name) or original(path, *a, **k))
    assert index.main(arguments) == 0
    assert read == ["new.mp4"] and len(build_dataset(config)) == 7


def test_loader_processes_read_the_index_of_their_run_after_another_took_its_name(clips):
    make()
    dataset = build_dataset(config_of("clips.index"))
    same = copy.deepcopy(dataset.rows)
    make("--hash")  # written again, with the same rows
    assert list(copy.deepcopy(dataset.rows)) == list(same)
    expected = next(batches(dataset, 2, 6)).pixels
    lines = (clips / "manifest.jsonl").read_text().splitlines(keepends=True)
    (clips / "manifest.jsonl").write_text("".join(reversed(lines)))
    make()
    for step in range(2):
        loaded = batches(dataset, 2, 6, workers=2)
        assert torch.equal(next(loaded).pixels, expected)
        loaded.close()
        if not step:
            Path("clips.index").unlink()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="an index that is mapped cannot be replaced on this system")
def test_a_copy_of_an_index_that_is_opened_by_its_name_has_the_same_rows_or_is_refused(clips):
    make()
    rows = build_dataset(config_of("clips.index")).rows
    lines = (clips / "manifest.jsonl").read_text().splitlines(keepends=True)
    (clips / "manifest.jsonl").write_text("".join(lines[:-1]))
    make()
    with pytest.raises(ValueError, match="clips.index was made again with other rows.*start the run again") as found:
        copy.deepcopy(rows)
    assert "\n" not in str(found.value)
    Path("clips.index").unlink()
    with pytest.raises(ValueError, match="clips.index is missing, while a run reads it; start the run again"):
        copy.deepcopy(rows.columns)


def test_what_more_comparisons_find_current_fewer_find_current_too(clips, monkeypatch):
    make()
    index_of_clips, compared = MediaIndex(Path("clips.index")), set()
    monkeypatch.setattr(MediaIndex, "changed", lambda self, i: compared.add(i) or False)
    monkeypatch.setattr("stdit.data.index.ask_for", lambda paths: None)
    monkeypatch.setattr(MediaIndex, "check_columns", lambda self: None)
    for count in (1, 999, 1001, 2500, 10_001, 25_000):
        monkeypatch.setattr(MediaIndex, "__len__", lambda self, count=count: count)
        compared.clear()
        index_of_clips.check()
        few = set(compared)
        index_of_clips.check(10_000)
        assert few <= compared and len(few) <= 1000 and len(compared) <= 11_000


def test_folders_with_an_at_sign_are_no_archives_of_which_a_row_is_compared(tmp_path):
    names = [f"user{i}@site/clip.mp4" for i in range(50)] + [
        "a@b.tar@512+9/0.mp4",
        "c.tar@512+9/0.mp4",
        "c.tar@999+9/1.mp4",
    ]
    rows = [Row(tmp_path / name, None, "") for name in names]
    entry = {"frames": 3, "height": 8, "width": 8}
    write_index(
        tmp_path / "at.index", Table(rows, 0, None), {str(row.path): entry for row in rows}, source=tmp_path / "m.csv",
        root=tmp_path, fingerprint={}, action_space=None,
    )  # fmt: skip
    assert [*MediaIndex(tmp_path / "at.index")._one_of_each_archive()] == [50, 51]


def test_a_file_that_changes_after_a_run_has_begun_is_refused_by_name(clips):
    make()
    dataset = build_dataset(config_of("clips.index"))
    write_barcodes(clips / "clip é 3.mp4", 25)
    with pytest.raises(VideoError, match="clip é 3.mp4.*run stdit index again"):
        dataset.load(3, np.random.default_rng(0), SIZES[0])
    with pytest.raises(ValueError, match="older than its files .*clip é 3.mp4 has changed"):
        build_dataset(config_of("clips.index"))


def test_with_hashes_a_file_that_was_touched_is_the_same_and_one_of_other_content_is_not(clips, monkeypatch):
    def touch():
        for file in clips.glob("*.*4"):
            os.utime(file, ns=(1, 10**18))
        return MediaIndex(clips.parent / "clips.index")

    make()
    assert touch().changed(3)  # without a hash
    make("--hash")
    for file in clips.glob("*.mp4"):
        os.utime(file, ns=(1, 2 * 10**18))
    assert build_dataset(config_of("clips.index")).load(3, np.random.default_rng(0), SIZES[0])["pixels"].any()
    with monkeypatch.context() as patch:
        patch.setattr(inspections, "inspect", None)
        assert make() == 0  # nothing is decoded, and the hashes stay
    found = MediaIndex(clips.parent / "clips.index")
    assert found.columns["modified"].tolist() == [2 * 10**18] * 6 and len(found.columns.text("content", 3)) == 32
    whole = bytearray((clips / "clip é 3.mp4").read_bytes())
    whole[-1] ^= 1
    (clips / "clip é 3.mp4").write_bytes(whole)
    assert found.changed(3) and not touch().changed(2) and found.changed(3)
    with pytest.raises(ValueError, match="clip é 3.mp4 has changed"):
        build_dataset(config_of("clips.index"))


def test_with_hashes_a_text_that_was_touched_is_the_same_and_another_of_its_length_is_not(clips):
    (clips / "manifest.jsonl").unlink()
    note = clips / "clip é 0.txt"
    note.write_text("a red cat\n")
    assert index.main(["clips", "--output", "clips.index", "--hash", "--workers", "0"]) == 0
    found = MediaIndex(clips.parent / "clips.index")
    os.utime(note, ns=(1, 10**18))
    assert not found.changed(0)
    note.write_text("a fat cat\n")
    assert found.changed(0)


def test_a_file_that_cannot_be_read_has_its_reason_in_the_index_and_is_not_opened(clips, monkeypatch):
    make()
    dataset = build_dataset(config_of("clips.index"))
    with pytest.raises(VideoError) as plain:
        build_dataset(config_of("clips/manifest.jsonl")).load(4, np.random.default_rng(0), SIZES[0])
    monkeypatch.setattr(dataset, "_open", None)
    with pytest.raises(VideoError) as found:
        dataset.load(4, np.random.default_rng(0), SIZES[0])
    assert str(found.value) == str(plain.value)


def test_an_index_that_was_stopped_goes_on_from_its_journal(clips, monkeypatch):
    original = inspections.inspect

    def stop(path, *arguments, **options):
        if path.name == "clip é 3.mp4":
            raise KeyboardInterrupt
        return original(path, *arguments, **options)

    monkeypatch.setattr(inspections, "inspect", stop)
    with pytest.raises(KeyboardInterrupt):
        make()
    read = []
    monkeypatch.setattr(inspections, "inspect", lambda path, *a, **k: read.append(path.name) or original(path, *a, **k))
    assert make() == 0 and read == [f"clip é {number}.mp4" for number in (3, 4, 5)]
    assert not list(clips.parent.glob("*.partial*"))


def test_check_media_reads_no_file_that_an_index_has(clips, monkeypatch, capsys):
    make()
    before = capsys.readouterr().out
    monkeypatch.setattr(inspections, "inspect", None)
    assert check_media.main(["clips.index"]) == 1
    assert "5 of 6 files read in full" in before and "5 of 6 files read in full" in capsys.readouterr().out


def test_an_index_moves_with_its_files(clips, tmp_path):
    make("--hash")
    (tmp_path / "moved").mkdir()
    for name in ("clips", "clips.index"):
        os.rename(tmp_path / name, tmp_path / "moved" / name)
    found = MediaIndex(tmp_path / "moved" / "clips.index")
    found.check()
    assert found[0].path == tmp_path / "moved/clips/clip é 0.mp4" and len(found.columns.text("content", 0)) == 32


def test_an_index_becomes_parquet_and_a_manifest_again(clips):
    pytest.importorskip("pyarrow")
    make("--parquet", "clips/all.parquet")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # training reads or knows all columns
        parquet = build_dataset(config_of("clips/all.parquet"))
    plain = build_dataset(config_of("clips/manifest.jsonl"))
    assert [row[:3] for row in parquet.rows] == [row[:3] for row in plain.rows]
    assert parquet.class_names == plain.class_names and parquet.record(0)["score"] == 0
    assert parquet.record(3)["frames"] == 30 and parquet.record(3)["codec"] == "h264"
    assert parquet.record(3)["time_of_last_frame"] == pytest.approx(29 / 24)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["clips", "--output", "clips/own.index"], "lies in clips itself; put it next to it"),
        (["clips", "--output", "table.jsonl"], "no name of an index; call it table.index"),
        (["clips.index", "--output", "other.index"], "an index already"),
    ],
)
def test_an_output_that_would_not_serve_is_refused(clips, arguments, reason):
    make()
    with pytest.raises(ValueError, match=reason):
        index.main(arguments)


@pytest.mark.parametrize("damage", ["cut", "header", "text", "other", "version"])
def test_a_damaged_index_is_refused_in_one_line(clips, damage):
    make()
    file = clips.parent / "clips.index"
    whole = file.read_bytes()
    if damage == "version":
        info = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
        columns = Columns(file)
        names = [n for n in columns._arrays if "." not in n]
        write_columns(file, {n: np.array(columns[n]) for n in names}, {**columns.info, "version": 99})
        assert info
    else:
        damaged = {
            "cut": whole[: len(whole) // 2], "header": b"\xff" * 8 + whole[8:], "text": b"path,label\n", "other": b"",
        }  # fmt: skip
        file.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match="clips.index") as found:
        build_dataset(config_of("clips.index"))
    assert "\n" not in str(found.value) and "again" in str(found.value)


def test_a_copy_in_another_process_has_the_name_of_the_file_and_no_rows(tmp_path):
    count = 20_000
    rows = [Row(tmp_path / f"{i:06d}.mp4", i % 10, f"caption {i}") for i in range(count)]
    entry = {"bytes": 1, "modified": 1, "frames": 33, "last": 2.0, "fps": 16.0, "height": 64, "width": 64}
    write_index(
        tmp_path / "many.index", Table(rows, 10, None), {str(row.path): entry for row in rows}, source=tmp_path / "m.csv",
        root=tmp_path, fingerprint={}, action_space=None,
    )  # fmt: skip
    found = MediaIndex(tmp_path / "many.index")
    assert len(ForkingPickler.dumps(found)) < 1000  # all that a loader process is sent
    assert copy.copy(found)[count - 1] == rows[-1] == found[-1]
    with pytest.raises(IndexError):
        found[count]


def test_a_changed_caption_a_new_folder_and_an_own_manifest_make_an_index_old(clips):
    (clips / "manifest.jsonl").unlink()
    (clips / "a").mkdir()
    for name in ("b/one", "b/two"):
        (clips / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        write_barcodes(clips / "a" / f"{name}.mp4", 12)
        (clips / "a" / f"{name}.txt").write_text("before")
    arguments = ["clips/a", "--output", "a.index", "--workers", "0"]
    config = DataConfig(root="clips/a", manifest="a.index", num_frames=5, height=32, width=32)
    assert index.main(arguments) == 0 and build_dataset(config).record(0)["caption"] == "before"

    def refused_then_mended():
        with pytest.raises(ValueError, match="older than its files"):
            build_dataset(config)
        assert index.main(arguments) == 0
        return build_dataset(config)

    (clips / "a/b/one.txt").write_text("after that")
    assert refused_then_mended().record(0)["caption"] == "after that"
    (clips / "a/c").mkdir()
    write_barcodes(clips / "a/c/three.mp4", 12)
    assert len(refused_then_mended()) == 3
    (clips / "a/metadata.csv").write_text("file_name,text\nb/one.mp4,of the table\n")
    with pytest.warns(UserWarning, match="does not list 2"):
        assert refused_then_mended().record(0)["caption"] == "of the table"


@pytest.mark.parametrize("what", ["manifest", "folder", "text", "content"])
def test_a_source_that_changes_while_its_files_are_read_makes_the_new_index_old(clips, monkeypatch, what):
    if what != "manifest":
        (clips / "manifest.jsonl").unlink()
    (clips / "clip é 0.txt").write_text("a red cat")
    original, changes = inspections.inspect, []
    other = bytearray((clips / "clip é 0.mp4").read_bytes())
    other[-1] ^= 1

    def change(path, *arguments, **options):
        if path.name == "clip é 3.mp4" and not changes:
            changes.append(what)
            if what == "manifest":
                text = (clips / "manifest.jsonl").read_text()
                (clips / "manifest.jsonl").write_text(text.replace('"caption": "', '"caption": "a '))
            elif what == "folder":
                write_barcodes(clips / "new.mp4", 12)
            elif what == "text":
                (clips / "clip é 0.txt").write_text("a fat cat")
            else:
                (clips / "clip é 0.mp4").write_bytes(other)
        return original(path, *arguments, **options)

    monkeypatch.setattr(inspections, "inspect", change)
    source = "clips/manifest.jsonl" if what == "manifest" else "clips"
    arguments = [source, "--output", "clips.index", "--hash", "--workers", "0"]
    assert index.main(arguments) == 0 and changes == [what]
    config = DataConfig(root="clips", manifest="clips.index", num_frames=5, height=32, width=32)
    with pytest.raises(ValueError, match="older than its files"):
        build_dataset(config)
    assert index.main(arguments) == 0
    assert build_dataset(config).record(0)["caption"] == {"manifest": "a clip «0»", "text": "a fat cat"}.get(
        what, "a red cat"
    )


@pytest.mark.parametrize("column", ["label", "caption.heap", "path.starts", "info"])
def test_a_byte_that_changed_in_an_index_is_noticed_before_training_and_mended_by_the_command_that_is_named(
    clips, monkeypatch, column
):
    make()
    file = clips.parent / "clips.index"
    whole = file.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:begin])
    place = whole.index(b"num_classes") if column == "info" else begin + header[column]["data_offsets"][0]
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    name = column.split(".")[0]
    if column != "info":
        with pytest.raises(
            ValueError, match=f"'{name}' does not match.*stdit index .*jsonl --output clips.index"
        ) as found:
            build_dataset(config_of("clips.index"))
        assert str(found.value).count("clips.index") == 2 and "\n" not in str(found.value)
        with pytest.warns(UserWarning, match="All files are read again"):
            make()
        assert file.read_bytes() == whole
    else:
        with pytest.raises(ValueError, match="'info' does not match"):
            Columns(file).check()
    info = json.loads(header["__metadata__"]["info"])
    info.pop("checksums")  # as files of before
    header["__metadata__"]["info"] = json.dumps(info)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + whole[begin:])
    assert len(build_dataset(config_of("clips.index"))) == 6


@pytest.mark.parametrize("key", ["root", "source", "state", "folders", "num_classes", "class_names"])
def test_an_index_with_a_changed_key_is_damaged_and_made_anew(clips, key):
    make()
    file = clips.parent / "clips.index"
    file.write_bytes(file.read_bytes().replace(f'"{key}'.encode(), f'"{key[:-1]}_'.encode()))
    file.write_bytes(file.read_bytes().replace(f'\\"{key}\\"'.encode(), f'\\"{key[:-1]}_\\"'.encode()))
    with pytest.raises(ValueError, match=f"clips.index is damaged .*'{key}'.*stdit index") as found:
        build_dataset(config_of("clips.index"))
    assert "\n" not in str(found.value)
    with pytest.warns(UserWarning, match="All files are read again"):
        assert make() == 0
    assert len(build_dataset(config_of("clips.index"))) == 6


def test_the_command_that_brings_an_index_up_to_date_has_its_root_and_can_be_pasted(clips):
    place = clips.parent / "some lists"
    place.mkdir()
    (place / "m.csv").write_text("path,caption\n../clips/clip é 0.mp4,zero\n")
    assert index.main(["some lists/m.csv", "--output", "m n.index", "--workers", "0", "data.root=clips"]) == 0
    (place / "m.csv").write_text("path,caption\n../clips/clip é 0.mp4,zero\n../clips/clip é 1.mp4,one\n")
    with pytest.raises(ValueError, match="older than its files") as found:
        build_dataset(config_of("m n.index"))
    remedy = shlex.split(str(found.value).split("stdit index ")[1].split(" (only")[0])
    assert index.main([*remedy, "--workers", "0"]) == 0
    rows = build_dataset(config_of("m n.index"))
    assert len(rows) == 2 and all(row.path.is_file() for row in rows.rows)


def test_a_damaged_index_is_made_anew_by_the_command_that_its_message_names(clips):
    make()
    file = clips.parent / "clips.index"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.warns(UserWarning, match="All files are read again"):
        assert make() == 0
    assert len(build_dataset(config_of("clips.index"))) == 6


def test_a_manifest_whose_files_lie_elsewhere_is_indexed_with_their_root(clips):
    (clips.parent / "lists").mkdir()
    (clips.parent / "lists/m.csv").write_text("clip,text\n../clips/clip é 0.mp4,zero\n")
    arguments = ["lists/m.csv", "--output", "m.index", "--workers", "0", "data.root=clips", "data.columns={path: clip}"]
    assert index.main(arguments) == 0
    assert build_dataset(config_of("m.index")).record(0)["caption"] == "zero"


def test_names_of_columns_other_than_those_that_an_index_was_made_with_are_refused(clips):
    (clips / "m.csv").write_text("clip,one,two\nclip é 0.mp4,first,second\n")
    arguments = ["clips/m.csv", "--output", "m.index", "--workers", "0"]
    names = {"path": "clip", "caption": "one"}
    assert index.main([*arguments, "data.columns={path: clip, caption: one}"]) == 0
    for columns in ({}, names):
        assert build_dataset(config_of("m.index", columns=columns)).record(0)["caption"] == "first"
    with pytest.raises(ValueError, match="cannot change m.index, which was made with .*one") as found:
        build_dataset(config_of("m.index", columns={**names, "caption": "two"}))
    remedy = shlex.split(str(found.value).split("stdit index ")[1].removesuffix("."))
    assert "\n" not in str(found.value) and index.main([*remedy, "--workers", "0"]) == 0
    assert build_dataset(config_of("m.index", columns={**names, "caption": "two"})).record(0)["caption"] == "second"
    make()
    with pytest.raises(ValueError, match="cannot change clips.index, which was made without; leave it out"):
        build_dataset(config_of("clips.index", columns={"caption": "nope"}))


def test_parquet_of_a_folder_has_paths_from_where_it_lies(clips):
    pytest.importorskip("pyarrow")
    (clips / "manifest.jsonl").unlink()
    assert index.main(["clips", "--output", "clips.index", "--parquet", "all.parquet", "--workers", "0"]) == 0
    assert build_dataset(config_of("all.parquet")).rows[0].path == clips / "clip é 0.mp4"
    with pytest.raises(ValueError, match="lies in clips itself"):
        index.main(["clips", "--output", "other.index", "--parquet", "clips/all.parquet"])


def test_names_that_are_not_utf_8_are_kept(tmp_path):
    name = os.fsdecode(b"clip \xff.mp4")
    rows = [Row(tmp_path / name, None, "")]
    entry = {str(tmp_path / name): {"frames": 3, "height": 8, "width": 8}}
    write_index(tmp_path / "odd.index", Table(rows, 0, None), entry, source=tmp_path / "m.csv", root=tmp_path, fingerprint={}, action_space=None)  # fmt: skip
    assert MediaIndex(tmp_path / "odd.index")[0].path == tmp_path / name


def test_many_rows_that_are_copied_into_processes_are_named_and_an_index_is_not(clips, monkeypatch):
    monkeypatch.setattr(clips_module, "_MANY", 5)
    monkeypatch.setattr(warn, "_warned", set())
    assert make() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pickle.dumps(build_dataset(config_of("clips.index")))
    with pytest.warns(UserWarning, match="6 rows are copied.*stdit index"):
        pickle.dumps(build_dataset(config_of("clips/manifest.jsonl")))


def test_all_rows_by_which_growth_is_measured_have_captions_of_their_own(tmp_path):
    rows, _ = bench_scale._clips(tmp_path, 3000)
    assert len({row.caption for row in rows}) == 3000

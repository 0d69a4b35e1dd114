import json
import random
import time
from pathlib import Path

import pytest
from media import SHARED

from stdit.data.manifest import VIDEO_SUFFIXES, read_manifest, scan_folder
from stdit.data.records import read_records, write_records


def lines(path: Path, rows: list) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_json_lines_and_csv_give_the_same_table(tmp_path):
    rows = [{"path": "a.mp4", "label": "dog", "caption": "a dog"}, {"path": "sub/b.mp4", "label": "cat", "caption": ""}]
    table = read_manifest(lines(tmp_path / "m.jsonl", rows))
    (tmp_path / "m.csv").write_text("path,label,caption\na.mp4,dog,a dog\nsub/b.mp4,cat,\n")
    assert table == read_manifest(tmp_path / "m.csv")
    assert table.class_names == ["cat", "dog"]
    assert [row.label for row in table.rows] == [1, 0]
    assert table.rows[0].path == tmp_path / "a.mp4"


def test_numbers_stay_numbers_and_no_labels_mean_unconditional(tmp_path):
    table = read_manifest(lines(tmp_path / "m.jsonl", [{"path": "a", "label": 4}, {"path": "b", "label": 0}]))
    assert (table.num_classes, table.class_names) == (5, None)
    assert read_manifest(lines(tmp_path / "n.jsonl", [{"path": "a"}])).num_classes == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file": "a"}], "line 1: the column 'path' is missing"),
        ([{"path": "a", "label": 1}, {"path": "b"}], r"line 2 \(b\) has no label, but other rows have one"),
        ([{"path": "a", "label": -1}], "label -1 is negative"),
        ([{"path": "a", "label": 1.5}], "label 1.5 is neither a whole number nor a name"),
        ([{"path": "../a"}], "leads outside data.root"),
        ([{"path": "/etc/passwd"}], "leads outside data.root"),
        (["not json"], "line 1 is not JSON"),
        (["[1, 2]"], "it is not an object"),
        ([], "has no rows"),
    ],
)
def test_an_error_in_a_manifest_is_reported_in_one_line(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_manifest(lines(tmp_path / "m.jsonl", rows))
    assert "\n" not in str(caught.value)


def test_a_link_out_of_the_root_is_refused(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "secret.mp4").touch()
    (tmp_path / "root" / "a.mp4").symlink_to(tmp_path / "secret.mp4")
    with pytest.raises(ValueError, match="leads outside"):
        read_manifest(lines(tmp_path / "root" / "m.jsonl", [{"path": "a.mp4"}]))
    with pytest.raises(ValueError, match="holds no videos"):
        scan_folder(tmp_path / "root", VIDEO_SUFFIXES, "videos")


def test_folders_by_class_give_labels_and_a_flat_folder_none(tmp_path):
    for name in ("dog/1.mp4", "cat/2.MP4", "cat/deep/3.webm", "cat/note.txt", "cat/.hidden.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "cat" / "back").symlink_to(tmp_path)  # an endless walk, if links were followed
    table = scan_folder(tmp_path, VIDEO_SUFFIXES, "videos")
    assert table.class_names == ["cat", "dog"]
    assert [(row.path.name, row.label) for row in table.rows] == [("2.MP4", 0), ("3.webm", 0), ("1.mp4", 1)]
    flat = scan_folder(tmp_path / "dog", VIDEO_SUFFIXES, "videos")
    assert (flat.num_classes, flat.class_names, flat.rows[0].label) == (0, None, None)
    (tmp_path / "loose.mp4").touch()
    with pytest.raises(ValueError, match="both in class folders and loose"):
        scan_folder(tmp_path, VIDEO_SUFFIXES, "videos")


def test_the_error_for_a_missing_folder_offers_generated_clips(tmp_path):
    with pytest.raises(ValueError, match=r"does not exist; .*data.source=shapes"):
        scan_folder(tmp_path / "none", VIDEO_SUFFIXES, "videos")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared clips are not next to this checkout")
def test_the_shared_manifest_is_read_unchanged():
    table = read_manifest(SHARED / "clips.csv")
    assert len(table.rows) == 84
    assert table.num_classes == len(table.class_names) == 38
    assert all(row.path.is_file() and row.caption for row in table.rows)


@pytest.mark.parametrize(
    "header",
    ["path,caption,label", "file_name,text,class", "Video Path, Caption ,Label", "path;caption;label", "video\tprompt\tcategory"],
)  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_reads_the_same_whoever_wrote_it(tmp_path, header, encoding, end):
    separator = next(mark for mark in ";\t," if mark in header)
    rows = [
        header,
        f"sub\\a.mp4{separator} a cat{separator} dog ",
        f'b.mp4{separator}"two, ""big""\nlines"{separator}cat',
    ]
    (tmp_path / "m.csv").write_bytes((end.join(rows) + end).encode(encoding))
    table = read_manifest(tmp_path / "m.csv")
    assert table.class_names == ["cat", "dog"]
    assert [(row.path.relative_to(tmp_path).as_posix(), row.label, row.caption) for row in table.rows] == [
        ("sub/a.mp4", 1, "a cat"),
        ("b.mp4", 0, 'two, "big"\nlines'),
    ]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_only_line_ends_end_a_line_of_json(tmp_path, mark, end):
    rows = [json.dumps({"video_path": f"{i}.mp4", "text": f"a{mark}b"}, ensure_ascii=False) for i in range(2)]
    if mark < " ":  # JSON writes these as escapes
        rows = [row.replace("\\u00" + f"{ord(mark):02x}", mark) for row in rows]
        (tmp_path / "m.jsonl").write_bytes(("\ufeff" + end.join(rows)).encode())
        with pytest.raises(ValueError, match="line 1 is not JSON"):
            read_manifest(tmp_path / "m.jsonl")
        return
    (tmp_path / "m.jsonl").write_bytes(("\ufeff" + end.join(rows)).encode())
    assert [row.caption for row in read_manifest(tmp_path / "m.jsonl").rows] == [f"a{mark}b"] * 2


def test_a_column_of_the_usual_name_goes_before_others_and_two_others_are_refused(tmp_path):
    row = {"path": "a.mp4", "image": "b.png", "caption": "one", "text": "two"}
    (read,) = read_manifest(lines(tmp_path / "m.jsonl", [row])).rows
    assert (read.path.name, read.caption) == ("a.mp4", "one")
    assert read.columns == {"image": "b.png", "text": "two"}
    with pytest.raises(ValueError, match="'text', 'prompt' could each be the caption; rename the right one 'caption'"):
        read_manifest(lines(tmp_path / "n.jsonl", [{"path": "a", "text": "x", "prompt": "y"}]))


def test_a_column_that_nothing_reads_is_named_with_the_nearest_known_one(tmp_path):
    (tmp_path / "m.csv").write_text("path,captoin,fps,Beschreibung\na.mp4,a cat,8,eine Katze\n")
    with pytest.warns(UserWarning, match=r"'captoin', 'Beschreibung' \('captoin' looks like 'caption'\)"):
        assert read_manifest(tmp_path / "m.csv").rows[0].caption == ""
    (tmp_path / "n.csv").write_text("pth,caption\na.mp4,a cat\n")
    with pytest.raises(ValueError, match="'path' is missing .*'pth' looks like it"):
        read_manifest(tmp_path / "n.csv")


def test_known_facts_of_a_file_are_no_unknown_columns(tmp_path, recwarn):
    (tmp_path / "m.csv").write_text(
        "path,caption,height,num_frames,aspect_ratio,source_url,sha256\na.mp4,x,8,9,1,u,f\n"
    )
    read_manifest(tmp_path / "m.csv")
    assert not [w for w in recwarn if "nothing reads" in str(w.message)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,caption\na.mp4,a cat, sitting\n", "line 2 has 3 cells for 2 columns; put quotation marks"),
        ('path,caption\na.mp4,"a cat\nb.mp4,a dog\n', "is not CSV .*close every quotation mark"),
        ("path,caption,caption\na.mp4,x,y\n", "'caption' is there twice"),
        ("path,caption\n ,x\n", "line 2: the path is empty"),
        ("a.mp4,a cat\nb.mp4,a dog\n", "'path' is missing .*name the columns in the first line"),
    ],
)
def test_a_table_that_would_lose_text_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_manifest(tmp_path / "m.csv")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[" * 100_000, "line 1 is not JSON"),
        ('{"path": "a", "label": ' + "9" * 5000 + "}", "line 1 is not JSON"),
        ('{"path": "a", "label": 1000000000}', "label 1000000000 is too large .* 'c1000000000'"),
        ('{"path": "a", "label": NaN}', "label nan is neither"),
        ('{"path": "a", "label": [1]}', "is neither a whole number nor a name"),
        ('{"path": "a", "label": "\\ud800"}', "is neither a whole number nor a name"),
        ('{"path": "a", "caption": 7}', "caption 7 is not text"),
        ('{"path": "a", "caption": ["x", "y"]}', "is not text; write one text per row"),
        ('{"path": "a", "caption": "\\ud800"}', "is not text"),
        ('{"path": "\\ud800"}', "is not a path"),
        ('{"path": "..\\\\\\\\a.mp4"}', "leads outside data.root"),
    ],
)
def test_values_beyond_reason_are_refused_in_one_line(tmp_path, row, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_manifest(lines(tmp_path / "m.jsonl", [row]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x" * 300 + ".mp4", "x" * 300 + "/a.mp4", "y/" * 3000 + "a.mp4"])
def test_a_path_that_is_too_long_for_a_file_is_that_of_a_missing_file(tmp_path, name):
    table = read_manifest(lines(tmp_path / "m.jsonl", [{"path": name}, {"path": "a"}]))
    assert [row.path.relative_to(tmp_path).as_posix() for row in table.rows] == [name, "a"]


@pytest.mark.parametrize("labels", [[3, 10, 0], ["3", "10", "0"], ["3.0", "10.0", "0"], [3.0, " 10", "00"]])
def test_labels_that_are_whole_numbers_are_those_numbers(tmp_path, labels):
    table = read_manifest(lines(tmp_path / "m.jsonl", [{"path": "a", "label": label} for label in labels]))
    assert [row.label for row in table.rows] == [3, 10, 0]
    assert (table.num_classes, table.class_names) == (11, None)


def test_a_clip_may_have_several_captions(tmp_path):
    table = read_manifest(lines(tmp_path / "m.jsonl", [{"path": "a", "caption": text} for text in ("one", "two")]))
    assert [(row.path.name, row.caption) for row in table.rows] == [("a", "one"), ("a", "two")]


def test_what_write_records_writes_is_read_back(tmp_path):
    rows = [{"path": "a,b.mp4", "label": 'x "y"', "caption": " two\nlines\u2028", "camera": [1, 2]}, {"path": "c.mp4"}]
    for name in ("m.jsonl", "m.csv"):
        write_records(tmp_path / name, rows)
        first, second = (record.values for record in read_records(tmp_path / name))
        assert (first["path"], first["label"], second["path"]) == ("a,b.mp4", 'x "y"', "c.mp4")
        assert first["caption"].strip() == "two\nlines"


def test_a_list_of_objects_is_read_as_their_lines_are(tmp_path):
    rows = [{"path": "a", "caption": "one"}, {"path": "b", "caption": "two"}]
    (tmp_path / "m.json").write_text(json.dumps(rows, indent=1))
    assert read_manifest(tmp_path / "m.json") == read_manifest(lines(tmp_path / "m.jsonl", rows))


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
def test_damaged_manifests_give_one_line_in_time(tmp_path, name):
    rows = [{"path": f"a/{i}.mp4", "label": i % 3, "caption": f'a "cat", {i}'} for i in range(5)]
    write_records(tmp_path / name, rows)
    whole, rng = (tmp_path / name).read_bytes(), random.Random(0)
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(3)] = rng.choice([b'"', b"\n", b"\x00", b"[", b"{", b",", rng.randbytes(2)])
        (tmp_path / name).write_bytes(data)
        try:
            read_manifest(tmp_path / name)
        except ValueError as error:
            assert "\n" not in str(error)


def test_a_table_of_very_many_columns_is_answered_in_time(tmp_path):
    (tmp_path / "m.csv").write_text(",".join(f"capt{i}" for i in range(50_000)) + "\n")
    began = time.perf_counter()
    with pytest.raises(ValueError, match="and 49992 more"):
        read_manifest(tmp_path / "m.csv")
    assert time.perf_counter() - began < 5


def test_the_whole_file_system_is_not_searched():
    with pytest.raises(ValueError, match="is the whole file system; give the folder of the clips"):
        scan_folder(Path("/"), VIDEO_SUFFIXES, "videos")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_columns_of_other_names_are_those_that_are_named(tmp_path, suffix):
    rows = [{"clip": f"{i}.mp4", "text": f"t{i}", "long": f"caption {i}", "kind": "ab"[i % 2]} for i in range(4)]
    file = tmp_path / f"m.{suffix}"
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
        from stdit.data.parquet import write_parquet

        write_parquet(file, rows)
    else:
        write_records(file, rows)
    table = read_manifest(file, columns={"path": "clip", "caption": "long", "label": "kind"})
    assert [(row.path.name, row.caption, row.label) for row in table.rows] == [
        (f"{i}.mp4", f"caption {i}", i % 2) for i in range(4)
    ]
    with pytest.raises(ValueError, match=r"no column 'absent' \(data.columns.caption\); it has"):
        read_manifest(file, columns={"path": "clip", "caption": "absent"})
    with pytest.raises(ValueError, match="data.columns has 'captions'; name the columns of path, caption, label"):
        read_manifest(file, columns={"captions": "long"})

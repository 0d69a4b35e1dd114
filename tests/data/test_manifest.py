import json
from pathlib import Path

import pytest
from media import SHARED

from stdit.data.manifest import VIDEO_SUFFIXES, read_manifest, scan_folder


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
        ([{"path": "a", "label": 1}, {"path": "b"}], "line 2 has no label, but other rows have one"),
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

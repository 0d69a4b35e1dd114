"""Folders of media files as people have them."""

import os

import pytest

from stdit.data.manifest import VIDEO_SUFFIXES, find_media, scan_folder


def scan(root, columns=None):
    return scan_folder(root, VIDEO_SUFFIXES, "videos", columns)


def put(root, *names, text=None):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"" if text is None else text.encode())


@pytest.mark.parametrize("folder", [".ipynb_checkpoints", ".git", "@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN"])
@pytest.mark.parametrize("below", ["", "cat/"])
def test_hidden_folders_are_no_classes_and_hold_no_clips(tmp_path, folder, below):
    put(tmp_path, "cat/a.mp4", "dog/b.mp4", f"{below}{folder}/c.mp4", f"{below}{folder}/deep/d.mp4")
    table = scan(tmp_path)
    assert table.class_names == ["cat", "dog"]
    assert [row.path.name for row in table.rows] == ["a.mp4", "b.mp4"]


def test_the_folder_given_may_be_hidden_itself(tmp_path):
    put(tmp_path, ".data/a.mp4")
    assert len(scan(tmp_path / ".data").rows) == 1


def test_folders_that_are_whole_numbers_are_those_labels(tmp_path):
    put(tmp_path, "10/a.mp4", "2/b.mp4", "0/c.mp4")
    table = scan(tmp_path)
    assert {row.path.parent.name: row.label for row in table.rows} == {"10": 10, "2": 2, "0": 0}
    assert (table.num_classes, table.class_names) == (11, None)
    put(tmp_path, "cat/d.mp4")
    assert scan(tmp_path).class_names == ["0", "10", "2", "cat"]


def test_folders_of_numbers_beyond_reason_are_refused(tmp_path):
    put(tmp_path, "20240131/a.mp4", "7/b.mp4")
    with pytest.raises(ValueError, match="20240131.*too large .*'c20240131'"):
        scan(tmp_path)


def test_a_text_file_next_to_a_clip_is_its_caption(tmp_path):
    put(tmp_path, "a.mp4", "b.mp4", "c.d.mp4")
    put(tmp_path, "a.txt", text="\ufeffa cat\r\n")
    put(tmp_path, "b.TXT", "c.d.txt", text=" of one\n")
    assert [row.caption for row in scan(tmp_path).rows] == ["a cat", "of one", "of one"]
    (tmp_path / "m.csv").write_text("path\nb.mp4\na.mp4\n")
    from stdit.data.manifest import read_manifest

    assert [row.caption for row in read_manifest(tmp_path / "m.csv").rows] == ["of one", "a cat"]


def test_a_clip_without_a_caption_among_others_is_said(tmp_path):
    put(tmp_path, "a.mp4", "b.mp4")
    put(tmp_path, "a.txt", text="a cat")
    with pytest.warns(UserWarning, match=r"1 of 2 videos have no caption .* 'b.txt'"):
        scan(tmp_path)


def test_a_text_file_that_is_no_caption_is_refused(tmp_path):
    put(tmp_path, "a.mp4")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a.txt' is not text in UTF-8"):
        scan(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"x" * 10**6)
    with pytest.raises(ValueError, match="too long for a caption"):
        scan(tmp_path)
    (tmp_path / "a.txt").unlink()
    os.mkfifo(tmp_path / "a.txt")
    assert scan(tmp_path).rows[0].caption == ""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", "file_name,text\nb.mp4,of b\na.mp4,of a\na.mp4,also of a\n"),
        ("metadata.jsonl", '{"video_path": "b.mp4", "caption": "of b"}\n{"video_path": "a.mp4", "caption": "of a"}\n'),
    ],
)
def test_the_metadata_of_a_folder_is_its_manifest(tmp_path, name, text):
    put(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / name).write_text(text)
    rows = scan(tmp_path).rows
    assert [(row.path.name, row.caption) for row in rows[:2]] == [("b.mp4", "of b"), ("a.mp4", "of a")]
    put(tmp_path, "c.mp4")
    with pytest.warns(UserWarning, match=r"does not list 1 of the 3 videos .*'c.mp4'"):
        scan(tmp_path)


def test_links_that_lead_outside_are_counted_and_said(tmp_path):
    put(tmp_path, "store/a.mp4", "store/b.mp4", "store/secret.txt", "root/cat/own.mp4", "root/dog/c.mp4", text="x")
    for link, target in (("cat/l.mp4", "store/a.mp4"), ("dog/l.mp4", "root/cat/own.mp4"), ("bird", "store")):
        (tmp_path / "root" / link).symlink_to(tmp_path / target)
    (tmp_path / "root/cat/own.txt").symlink_to(tmp_path / "store/secret.txt")
    with pytest.warns(UserWarning, match=r"2 link\(s\) lead outside it and are left out .* or list them in a manifest"):
        table = scan(tmp_path / "root")
    assert [row.path.name for row in table.rows] == ["own.mp4", "c.mp4", "l.mp4"]
    assert not any(row.caption for row in table.rows)
    put(tmp_path, "links/.keep")
    (tmp_path / "links/a.mp4").symlink_to(tmp_path / "store/a.mp4")
    with pytest.raises(ValueError, match=r"holds no videos .*; 1 link\(s\) lead outside"):
        scan(tmp_path / "links")


def test_links_to_themselves_end_no_scan(tmp_path):
    (tmp_path / "a.mp4").symlink_to("a.mp4")
    (tmp_path / "loop").symlink_to(".")
    assert [file.name for file in find_media(tmp_path, VIDEO_SUFFIXES).files] == ["a.mp4"]


def test_columns_of_other_names_are_those_of_the_metadata_of_a_folder_and_refused_without(tmp_path):
    put(tmp_path, "a.mp4", "b.mp4")
    columns = {"caption": "long"}
    with pytest.raises(
        ValueError, match=r"no columns \(data.columns.caption\), .* without a manifest; give data.manifest"
    ):
        scan(tmp_path, columns)
    (tmp_path / "metadata.csv").write_text("file_name,text,long\na.mp4,a,of a\nb.mp4,b,of b\n")
    assert [row.caption for row in scan(tmp_path, columns).rows] == ["of a", "of b"]
    with pytest.raises(
        ValueError, match=r"no column 'words' \(data.columns.caption\); it has 'file_name', 'text', 'long'"
    ):
        scan(tmp_path, {"caption": "words"})

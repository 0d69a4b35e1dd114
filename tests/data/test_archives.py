"""Clips in tar archives are the clips themselves."""

import io
import json
import tarfile

import numpy as np
import pytest
from media import write_barcodes

from stdit.data.config import DataConfig
from stdit.data.datasets import build_dataset
from stdit.data.identity import content_of, size_of
from stdit.data.loader import batches
from stdit.data.media import member_of, open_regular
from stdit.recipes import index


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Six clips in two shards, and the same clips in a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    (tmp_path / "shards").mkdir()
    rows = []
    for shard in range(2):
        with tarfile.open(tmp_path / f"shards/part-{shard:03d}.tar", "w") as tar:
            for i in range(3 * shard, 3 * shard + 3):
                file = write_barcodes(tmp_path / f"clips/{i:03d}.mp4", 8 + i)
                tar.add(file, f"./{i:03d}.mp4")
                add(tar, f"./{i:03d}.txt", f"clip {i}")
                add(tar, f"./{i:03d}.cls", str(i % 2))
                add(tar, f"./{i:03d}.json", json.dumps({"score": i, "text": "another"}))
                rows.append({"path": file.name, "caption": f"clip {i}", "label": i % 2, "score": i})
    (tmp_path / "clips/manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "shards"


def add(tar, name, text):
    member = tarfile.TarInfo(name)
    member.size = len(text.encode())
    tar.addfile(member, io.BytesIO(text.encode()))


def dataset(root="shards", **settings):
    return build_dataset(DataConfig(**{"root": root, "num_frames": 5, "height": 32, "width": 32, **settings}))


def test_a_dataset_of_shards_is_that_of_the_clips(shards):
    packed, plain = dataset(), dataset("clips", manifest="clips/manifest.jsonl")
    assert (len(packed), packed.num_classes) == (6, 2)
    for i in range(6):
        assert packed.record(i) == plain.record(i) and packed.shape(i) == plain.shape(i)
        a, b = (d.load(i, np.random.default_rng(i))["pixels"] for d in (packed, plain))
        assert (a == b).all()
        assert content_of(packed.rows[i].path) == content_of(plain.rows[i].path)
        assert size_of(packed.rows[i].path) == size_of(plain.rows[i].path)


def test_a_column_that_is_named_goes_before_text_files_and_guesses_and_must_be_there(shards):
    records = [dataset(columns={"caption": "text"}).record(i) for i in range(6)]
    assert [record["caption"] for record in records] == ["another"] * 6
    labelled = dataset(columns={"label": "text"})  # also of a name that is usual for captions
    assert labelled.num_classes == 1 and labelled.record(1)["caption"] == "clip 1"
    with pytest.raises(ValueError, match=r"data.columns has 'captoin'; name the columns of"):
        dataset(columns={"captoin": "text"})
    with pytest.raises(
        ValueError, match=r"no JSON of a clip has 'txt' \(data.columns.caption\); they have 'score', 'text'"
    ):
        dataset(columns={"caption": "txt"})


def test_shards_with_a_suffix_in_capitals_are_found(shards):
    expected = dataset().load(0, np.random.default_rng(0))["pixels"]
    for file in shards.iterdir():
        file.rename(file.with_suffix(".TAR"))
    found = dataset()
    assert len(found) == 6 and (found.load(0, np.random.default_rng(0))["pixels"] == expected).all()


def test_batches_are_keyed_and_a_run_goes_on_at_any_step(shards):
    packed, plain = dataset(), dataset("clips", manifest="clips/manifest.jsonl")
    for data in (packed, plain):
        loader = batches(data, 3, 4)
        steps = [next(loader) for _ in range(4)]
        later = batches(data, 3, 4, start_step=2)
        assert all((next(later).pixels == batch.pixels).all() for batch in steps[2:])
    one, other = (batches(data, 3, 4) for data in (packed, plain))
    assert all((next(one).pixels == next(other).pixels).all() for _ in range(3))


def test_an_index_of_shards_needs_no_scan(shards, monkeypatch):
    assert index.main(["shards", "--output", "shards.index", "--workers", "0"]) == 0
    plain = dataset()
    monkeypatch.setattr(tarfile, "open", None)
    indexed = dataset(manifest="shards.index", source="videos")
    assert indexed.shards == plain.shards == [3, 3]
    assert indexed.record(4) == {"label": 0, "caption": "clip 4", "score": 4} and indexed.shape(4)[0] == 12
    assert indexed.load(4, np.random.default_rng(0))["pixels"].shape == (5, 32, 32, 3)


def test_a_part_of_an_archive_is_read_like_a_file(shards):
    path = dataset().rows[4].path
    assert member_of(path).archive.endswith("part-001.tar") and path.suffix == ".mp4"
    whole = (shards.parent / "clips/004.mp4").read_bytes()
    with open_regular(path) as file:
        assert file.read() == whole and file.seek(-10, 2) == len(whole) - 10 and file.read() == whole[-10:]
        file.seek(5)
        assert file.read(7) == whole[5:12]


@pytest.mark.parametrize("left", [0.5, 0.95])
def test_a_shard_that_is_cut_short_is_refused_before_anything_is_read(shards, left):
    shard = shards / "part-001.tar"
    whole = shard.read_bytes().rstrip(b"\0")
    shard.write_bytes(whole[: int(left * len(whole))])
    with pytest.raises(ValueError, match=r"part-001.tar .*(cut short|can be read).*fetch it again"):
        dataset()


def test_clips_of_which_only_some_have_labels_are_refused(shards):
    with tarfile.open(shards / "part-002.tar", "w") as tar:
        tar.add(shards.parent / "clips/000.mp4", "zero.mp4")
    with pytest.raises(ValueError, match="part-002.tar.*has no label, but other rows have one"):
        dataset()


def test_archives_without_clips_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.txt", "no clip")
    with pytest.raises(ValueError, match="hold no clips"):
        dataset(str(tmp_path))

"""Clips in tar archives are the clips themselves."""

import gzip
import io
import json
import tarfile

import numpy as np
import pytest
from media import write_barcodes

from stdit.data.config import DataConfig
from stdit.data.datasets import build_dataset
from stdit.data.identity import content_of, size_of
from stdit.data.index import MediaIndex
from stdit.data.loader import batches
from stdit.data.media import member_of, open_regular
from stdit.recipes import index


def by_tarfile(samples):
    """Write samples (name -> content by suffix) as a shard with names as `tar` gives them -> the shard."""
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for key, values in samples.items():
                for kind, value in values.items():
                    add(tar, f"./{key}.{kind}", json.dumps(value) if isinstance(value, dict) else value)
        return file.getvalue()


def by_webdataset(samples, **options):
    """The same by the library webdataset."""
    webdataset = pytest.importorskip("webdataset", reason="needs pip install webdataset")
    with io.BytesIO() as file:
        with webdataset.TarWriter(file, **options) as writer:
            for key, values in samples.items():
                writer.write({"__key__": key, **values})
        return file.getvalue()


@pytest.fixture(params=[by_tarfile, by_webdataset])
def shards(tmp_path, monkeypatch, request):
    """Six clips in two shards, and the same clips in a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    (tmp_path / "shards").mkdir()
    rows = []
    for shard in range(2):
        samples = {}
        for i in range(3 * shard, 3 * shard + 3):
            file = write_barcodes(tmp_path / f"clips/{i:03d}.mp4", 8 + i)
            notes = {"txt": f"clip {i}", "cls": str(i % 2), "json": {"score": i, "text": "another"}}
            samples[f"{i:03d}"] = {"mp4": file.read_bytes(), **notes}
            rows.append({"path": file.name, "caption": f"clip {i}", "label": i % 2, "score": i})
        (tmp_path / f"shards/part-{shard:03d}.tar").write_bytes(request.param(samples))
    (tmp_path / "clips/manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "shards"


def add(tar, name, content):
    content = content if isinstance(content, bytes) else content.encode()
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


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
        ValueError,
        match=r"no sample has 'words', as a file or in its JSON \(data.columns.caption\); they have 'cls', 'json', 'score', 'text', 'txt'",
    ):
        dataset(columns={"caption": "words"})


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


@pytest.mark.parametrize("left", ["in a clip", "in a text", "behind a header", "between two files"])
def test_a_shard_that_is_cut_short_is_refused_before_anything_is_read(shards, left):
    shard = shards / "part-001.tar"
    with tarfile.open(shard) as tar:
        clip, text = (
            next(one for one in tar.getmembers()[4:] if one.name.endswith(suffix)) for suffix in ("mp4", "txt")
        )
    end = {
        "in a clip": clip.offset_data + clip.size // 2,
        "in a text": text.offset_data + 2,
        "behind a header": clip.offset_data,
        "between two files": text.offset,
    }[left]
    shard.write_bytes(shard.read_bytes()[:end])
    with pytest.raises(ValueError, match=r"part-001.tar .*(cut short|can be read).*fetch it again") as caught:
        dataset()
    assert "\n" not in str(caught.value)


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


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """A shard of the library with names of several parts, in folders, long, and with what it says of itself."""
    monkeypatch.chdir(tmp_path)
    clips = [write_barcodes(tmp_path / f"{i}.mp4", 8 + i).read_bytes() for i in range(6)]
    samples = {
        "000": {"video.mp4": clips[0], "caption.txt": "müde", "meta.json": {"score": 1}},
        "v1.5/001": {"left.mp4": clips[1], "right.mp4": clips[2], "txt": "both", "right.txt": "the right one"},
        "n" * 90 + "/" + "m" * 80: {"mp4": clips[3], "long.txt": "long", "short.txt": "short"},
        "003": {"MP4": clips[4], "txt": "three", "npy": np.zeros(3)},
    }
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/0.tar").write_bytes(by_webdataset(samples, keep_meta=True))
    return tmp_path / "shards"


def test_the_clips_of_a_shard_are_those_that_its_library_reads(odd):
    webdataset = pytest.importorskip("webdataset")
    library = [s for s in webdataset.WebDataset(str(odd / "0.tar"), shardshuffle=False, empty_check=False)]
    theirs = [data for sample in library for kind, data in sample.items() if kind.endswith("mp4")]
    ours = []
    for row in dataset(columns={"caption": "long.txt"}).rows:
        with open_regular(row.path) as file:
            ours.append(file.read())
    assert ours == theirs and len(ours) == 5


def test_a_clip_has_the_annotations_of_its_sample(odd):
    with pytest.raises(
        ValueError, match=r"'long.txt', 'short.txt' could each be the caption; say which: .*caption: long.txt"
    ):
        dataset()
    (odd / "0.tar").write_bytes(
        by_webdataset(
            {"0": {"video.mp4": b"a", "caption.txt": "müde", "meta.json": {"score": 1}}}
            | {"1": {"left.mp4": b"a", "right.mp4": b"b", "txt": "both", "right.txt": "right", "mask.txt": "none"}}
            | {"2": {"a.mp4": b"a", "b.mp4": b"b", "b.txt": "of b alone", "json": {"caption": "of both", "score": 2}}}
        )
    )
    rows = dataset().rows
    assert [row.caption for row in rows] == ["müde", "both", "right", "of both", "of b alone"]
    assert [row.columns.get("score") for row in rows] == [1, None, None, 2, 2]


def test_a_column_may_name_a_file_of_the_samples(odd):
    named = dataset(columns={"path": "left.mp4", "caption": "txt"}).rows
    assert [(row.path.name, row.caption) for row in named] == [("001.left.mp4", "both")]
    texts = [row.caption for row in dataset(columns={"caption": "Short.txt"}).rows]
    assert texts == ["", "", "", "short", ""]
    with pytest.raises(
        ValueError, match=r"no clip is called NAME.top.mp4 \(data.columns.path\); there are 'left.mp4', 'mp4', "
    ):
        dataset(columns={"path": "top.mp4"})


def test_a_clip_beside_another_form_of_it_is_chosen_by_its_column(odd):
    sample = {"mp4": b"a", "mkv": b"b", "txt": "a clip"}
    (odd / "0.tar").write_bytes(by_webdataset({"0": sample}))
    with pytest.raises(ValueError, match=r"two clips of the name '0', 0.mkv and 0.mp4; .*data.columns={path: mkv}"):
        dataset()
    rows = dataset(columns={"path": "mp4"}).rows
    assert [(row.path.name, row.caption) for row in rows] == [("0.mp4", "a clip")]


def test_packed_shards_are_refused_with_the_way_to_unpack_them(odd):
    whole = (odd / "0.tar").read_bytes()
    (odd / "1.tar.gz").write_bytes(gzip.compress(whole))
    with pytest.warns(UserWarning, match=r"packed archives are left out \(the first: '1.tar.gz'\)"):
        dataset(columns={"caption": "long.txt"})
    (odd / "0.tar").unlink()
    with pytest.raises(ValueError, match=r"1.tar.gz is packed, .*unpack it to a .tar"):
        dataset()


def test_a_shard_that_changed_in_place_makes_an_index_old_however_few_of_its_rows_are_compared(shards, monkeypatch):
    (shards / "part-001.tar").rename(shards / "part@1.tar")
    assert index.main(["shards", "--output", "s.index", "--workers", "0"]) == 0
    config = DataConfig(root="shards", manifest="s.index", num_frames=5, height=32, width=32)
    monkeypatch.setattr("stdit.data.index._COMPARED", 1)
    monkeypatch.setattr(MediaIndex.check, "__defaults__", (1,))
    assert len(build_dataset(config)) == 6
    last = shards / "part@1.tar"
    content = last.read_bytes()
    last.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="older than its files.*part@1.tar.*has changed"):
        build_dataset(config)

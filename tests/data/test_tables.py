"""Clips in tables of other libraries, as these write them, are the clips themselves: rows with numbers, in a keyed order."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from media import write_barcodes

from stdit.data.arrow_tables import read_table
from stdit.data.config import DataConfig
from stdit.data.datasets import build_dataset
from stdit.data.identity import content_of
from stdit.data.loader import batches
from stdit.data.media import VideoError, container_of, open_regular, place_of
from stdit.recipes import index

CLIPS = 6


@pytest.fixture
def clips(tmp_path, monkeypatch):
    """Six clips in a folder with a manifest."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    for i in range(CLIPS):
        write_barcodes(tmp_path / f"clips/{i}.mp4", 8 + i)
    rows = [{"path": f"{i}.mp4", "caption": f"clip {i}", "label": "ba"[i % 2], "score": i} for i in range(CLIPS)]
    (tmp_path / "clips/manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "clips"


def dataset(**settings):
    return build_dataset(DataConfig(**{"num_frames": 5, "height": 32, "width": 32, **settings}))


def saved_as(how, *, inside):
    """Save the clips with the library `datasets` -> the data settings; inside: their bytes, not their paths."""
    datasets = pytest.importorskip("datasets", reason="needs pip install datasets")
    names = ["b", "a"]
    videos = [f"clips/{i}.mp4" for i in range(CLIPS)]
    if inside:
        videos = [{"bytes": Path(name).read_bytes(), "path": name.removeprefix("clips/")} for name in videos]
    # What the library knows to be videos it saves with their bytes.
    kind = datasets.Video(decode=False) if inside or how == "parquet" else datasets.Value("string")
    table = datasets.Dataset.from_dict(
        {"video": videos, "text": [f"clip {i}" for i in range(CLIPS)], "kind": [i % 2 for i in range(CLIPS)], "score": list(range(CLIPS))},
        features=datasets.Features(
            {"video": kind, "text": datasets.Value("string"), "kind": datasets.ClassLabel(names=names), "score": datasets.Value("int64")}
        ),
    )  # fmt: skip
    settings = {"root": "saved", "columns": {"label": "kind"}}
    if how == "disk":
        table.save_to_disk("saved", num_shards=2)
    elif how == "splits":
        datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk("saved")
    else:
        (path := Path("saved/data")).mkdir(parents=True)
        for number in range(2):
            part = table.shard(2, number, contiguous=True)
            part.to_parquet(str(path / f"train-0000{number}-of-00002.parquet"), batch_size=2)
        table.select([0]).to_parquet(str(path / "test-00000-of-00001.parquet"))
    return settings if inside else {**settings, "root": ".", "manifest": "saved"}


def lance_with(inside, version=None):
    """Write the clips as a table of Lance -> the data settings; version: of the format, in which the clips are blobs."""
    lance = pytest.importorskip("lance", reason="needs pip install 'stdit[lance]'")
    arrow = pytest.importorskip("pyarrow")
    names = [f"clips/{i}.mp4" for i in range(CLIPS)]
    blob = {"lance-encoding:blob": "true"} if version else None
    rows = {
        arrow.field("video", arrow.large_binary() if inside else arrow.string(), metadata=blob): (
            [Path(name).read_bytes() for name in names] if inside else names
        ),
        arrow.field("caption", arrow.string()): [f"clip {i}" for i in range(CLIPS)],
        arrow.field("kind", arrow.string()): ["ba"[i % 2] for i in range(CLIPS)],
        arrow.field("score", arrow.int64()): list(range(CLIPS)),
    }
    table = arrow.table(list(rows.values()), schema=arrow.schema(list(rows)))
    lance.write_dataset(table, "clips.lance", max_rows_per_file=4, data_storage_version=version)
    return {"root": ".", "manifest": "clips.lance", "columns": {"path": "video", "label": "kind"}}


WRITERS = {
    "save_to_disk": lambda: saved_as("disk", inside=True),
    "save_to_disk, paths": lambda: saved_as("disk", inside=False),
    "splits": lambda: saved_as("splits", inside=True),
    "parquet": lambda: saved_as("parquet", inside=True),
    "parquet, paths": lambda: saved_as("parquet", inside=False),
    "lance": lambda: lance_with(True),
    "lance, paths": lambda: lance_with(False),
    "lance, blobs": lambda: lance_with(True, "2.1"),
    "lance, blobs of version 2": lambda: lance_with(True, "2.2"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_table_has_the_samples_of_its_clips_in_a_keyed_order(clips, writer):
    table, plain = dataset(**WRITERS[writer]()), dataset(root="clips", manifest="clips/manifest.jsonl")
    assert (len(table), table.class_names) == (CLIPS, plain.class_names)
    for i in range(CLIPS):
        ours, theirs = table.record(i), plain.record(i)
        assert {name: ours[name] for name in theirs} == theirs and table.shape(i) == plain.shape(i)
        assert content_of(table.rows[i].path) == content_of(plain.rows[i].path)
    one, other = (batches(data, 3, 4) for data in (table, plain))
    steps = [next(one).pixels for _ in range(3)]
    assert all((next(other).pixels == pixels).all() for pixels in steps)
    assert (next(batches(table, 3, 4, start_step=2)).pixels == steps[2]).all()


@pytest.mark.parametrize("writer", ["save_to_disk", "parquet", "lance"])
def test_an_index_of_a_table_has_its_rows_and_notices_another_table(clips, writer):
    settings = WRITERS[writer]()
    source = settings.get("manifest") or settings["root"]
    columns = "data.columns={" + ", ".join(f"{role}: {name}" for role, name in settings["columns"].items()) + "}"
    given = ["data.root=."] if writer == "lance" else []
    assert index.main([source, columns, *given, "--output", "saved.index", "--workers", "0"]) == 0
    table, indexed = dataset(**settings), dataset(root=settings["root"], manifest="saved.index")
    assert [indexed.record(i) for i in range(CLIPS)] == [table.record(i) for i in range(CLIPS)]
    a, b = (data.load(4, np.random.default_rng(0))["pixels"] for data in (table, indexed))
    assert (a == b).all()
    shutil.rmtree(source)
    WRITERS[writer]()
    with pytest.raises(ValueError, match="older than its files"):
        dataset(root=settings["root"], manifest="saved.index")


def test_the_bytes_of_a_saved_data_set_are_a_part_of_its_file(clips):
    table = dataset(**saved_as("disk", inside=True))
    path = table.rows[5].path
    assert container_of(path).endswith(".arrow") and path.name == "5.mp4"
    with open_regular(path) as file:
        assert file.read() == (clips / "5.mp4").read_bytes()
    assert table.shards == [3, 3]  # for data.order=blocked


def test_a_column_that_is_not_there_is_refused(clips):
    saved = saved_as("parquet", inside=True)
    for columns, said in (
        ({"path": "clip"}, "no column 'clip' .data.columns.path"),
        ({"caption": "words"}, "no column 'words' .data.columns.caption"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            dataset(**{**saved, "columns": columns})
        assert "\n" not in str(caught.value) and "'score'" in str(caught.value)


@pytest.mark.parametrize("how", ["disk", "parquet"])
def test_a_table_that_is_cut_short_is_refused_before_anything_is_read(clips, how):
    settings = saved_as(how, inside=True)
    shard = sorted(clips.parent.glob("saved/**/*-00001-of-00002.*"))[0]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"{shard.name}.*(write it again|cut short)") as caught:
        dataset(**settings)
    assert "\n" not in str(caught.value)


def test_a_table_of_lance_with_a_file_cut_short_is_refused_before_anything_is_read(clips):
    settings = lance_with(True)
    file = sorted(Path("clips.lance/data").iterdir())[0]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="clips.lance cannot be read.*write the table again") as caught:
        dataset(**settings)
    assert "\n" not in str(caught.value)


def test_a_blob_of_lance_that_is_an_address_is_not_followed(clips):
    lance = pytest.importorskip("lance", reason="needs pip install 'stdit[lance]'")
    arrow, blob = pytest.importorskip("pyarrow"), pytest.importorskip("lance.blob")
    column = blob.blob_array([Path("clips/0.mp4").read_bytes(), Path("clips/1.mp4").resolve().as_uri(), None])
    table = arrow.table([column], schema=arrow.schema([blob.blob_field("video")]))
    lance.write_dataset(table, "clips.lance", data_storage_version="2.2", allow_external_blob_outside_bases=True)
    data = dataset(root=".", manifest="clips.lance")
    assert data.load(0, np.random.default_rng(0))["pixels"].shape == (5, 32, 32, 3)
    for row, said in ((1, "row 1 lies outside the table .*1.mp4.*write its bytes into it"), (2, "row 2 has no bytes")):
        with pytest.raises(VideoError, match=said):
            data.load(row, np.random.default_rng(0))


def test_a_list_of_files_leads_to_none_outside_the_folder(clips):
    settings = saved_as("disk", inside=True)
    shutil.copytree("saved", "other")
    state = clips.parent / "saved/state.json"
    state.write_text(state.read_text().replace("data-00000", "../other/data-00000"))
    with pytest.raises(ValueError, match="leads outside"):
        dataset(**settings)


@pytest.mark.parametrize("kind", ["binary", "large_binary", "binary_view"])
@pytest.mark.parametrize("suffix", ["arrow", "ARROW", "PARQUET"])
def test_every_type_of_bytes_is_read_whatever_the_case_of_the_suffix(clips, kind, suffix):
    arrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    values = [b"short", None, Path("clips/0.mp4").read_bytes(), Path("clips/1.mp4").read_bytes()]
    column = arrow.array(values, arrow.binary()).cast(getattr(arrow, kind)())
    batch = arrow.record_batch({"video": column, "text": arrow.array(list("abcd"), arrow.string_view())})
    table = Path(f"clips.{suffix}")
    if suffix == "PARQUET":
        arrow.parquet.write_table(arrow.table(batch), table)
    else:
        with arrow.ipc.new_file(str(table), batch.schema) as writer:
            writer.write_batch(batch)
    rows = list(read_table(table))
    assert [row["text"] for row in rows] == list("abcd")
    for row, value in zip(rows, values, strict=True):
        if value is not None:
            with open_regular(Path(row["path"])) as stream:
                assert stream.read() == value


def test_a_table_of_bytes_and_names_is_refused_before_anything_is_read(clips):
    arrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    data = Path("clips/0.mp4").read_bytes()
    cells = [None, *[{"bytes": data, "path": "0.mp4"}] * 3, *[{"bytes": None, "path": "clips/1.mp4"}] * 2]
    arrow.parquet.write_table(arrow.table({"video": cells}), "mixed.parquet", row_group_size=2)
    with pytest.raises(
        ValueError, match=r"'video' has a name alone \('clips/1.mp4'\) in row 4, but not in row 1; write bytes"
    ):
        list(read_table(Path("mixed.parquet")))


def test_a_row_without_bytes_is_unreadable_by_its_place(clips):
    arrow = pytest.importorskip("pyarrow")
    data = [Path("clips/0.mp4").read_bytes(), None]
    arrow.parquet.write_table(arrow.table({"video": arrow.array(data, arrow.binary())}), "rows.parquet")
    table = dataset(root=".", manifest="rows.parquet")
    assert table.load(0, np.random.default_rng(0))["pixels"].shape == (5, 32, 32, 3)
    with pytest.raises(VideoError, match="rows.parquet, column 'video', row 1 has no bytes"):
        table.load(1, np.random.default_rng(0))


def test_a_place_in_a_table_is_told_from_the_name_of_a_file():
    assert place_of("a/b.parquet@video[17]/c.mp4") == ("a/b.parquet", "video", 17)
    assert place_of("a/b.arrow@5+7/c.mp4") == ("a/b.arrow", 5, 7)
    assert not any(place_of(name) for name in ("a@b.mp4", "a.tar@1/b.mp4", "a.parquet@[1]/b.mp4", "a.lance@v[x]/b.mp4"))


@pytest.fixture
def curated(clips):
    """A folder as cosmos-curate leaves it: four clips, one without a caption, and one that was filtered out.

    Names and keys are those of its version 1.4.0: docs/curator/reference/VIDEO_PIPELINES.md, and ClipWriterStage in
    pipelines/video/read_write/metadata_writer_stage.py. The library itself needs GPUs.
    """
    root = clips.parent / "curated"
    for folder in ("clips", "filtered_clips", "metas/v0"):
        (root / folder).mkdir(parents=True)
    for i in range(5):
        name, kept, size = f"0000000{i}-b2c8-5f05-8d1f-6ed9b7e5c2aa", i != 4, (clips / f"{i}.mp4").stat().st_size
        folder = "clips" if kept else "filtered_clips"
        shutil.copy(clips / f"{i}.mp4", root / f"{folder}/{name}.mp4")
        windows = [
            {"start_frame": 0, "end_frame": 5, "qwen_prompt_tokens": 9, "qwen_output_tokens": 0},
            {
                "start_frame": 5,
                "end_frame": 8,
                "qwen_caption": f"plain {i}",
                "qwen_prompt_tokens": 9,
                "qwen_output_tokens": 2,
            },
        ]
        if i == 1:
            windows[1]["qwen_lm_enhanced_caption"] = "enhanced 1"
        meta = {
            "span_uuid": name, "source_video": "s3://in/long.mp4", "duration_span": [0.0, 1.5], "width_source": 64,
            "height_source": 64, "framerate_source": 24.0, "clip_location": f"s3://out/{folder}/{name}.mp4", "width": 32,
            "height": 32, "framerate": 8.0, "num_frames": 8 + i, "video_codec": "h264", "num_bytes": size,
            "motion_score": {"global_mean": 0.25, "per_patch_min_256": 0.0}, "aesthetic_score": 4.5 + i,
            "windows": [] if i == 2 else windows, "filtered_windows": [], "valid": i != 2, "has_caption": i != 2,
            "total_prompt_tokens": 18, "total_output_tokens": 2,
        }  # fmt: skip
        (root / f"metas/v0/{name}.json").write_text(json.dumps(meta, indent=4))
    for beside in (
        "processed_videos/long.mp4.json", "processed_clip_chunks/long.mp4_0.json", "v0/all_window_captions.json",
        "summary.json", f"iv2_embd/{name}.pickle", "iv2_embd_parquet/video_0.parquet", f"previews/{name}/0_5.webp",
        f"cosmos_predict2_video2world_dataset/videos/{name}_0_5.mp4",
    ):  # fmt: skip
        (root / beside).parent.mkdir(parents=True, exist_ok=True)
        (root / beside).write_text("{}")
    return root


def in_lines(metas, root):
    """As --upload-clip-info-in-chunks leaves them."""
    rows = [json.dumps({**meta, "embedding_model_name": "internvideo2"}) for meta in metas]
    (root / "metas_jsonl/v0").mkdir(parents=True)
    (root / "metas_jsonl/v0/6a1f_0.jsonl").write_text("\n".join(rows))


def in_lance(metas, root):
    """As --upload-clip-info-in-lance leaves them: fragments of each chunk of clips, then one table."""
    lance = pytest.importorskip("lance", reason="needs pip install 'stdit[lance]'")
    arrow = pytest.importorskip("pyarrow")
    table = arrow.Table.from_pylist([{**meta, "embedding": [0.5] * 8, "video_uuid": "6a1f"} for meta in metas])
    uri = str(root / "lance/v0")
    fragments = lance.fragment.write_fragments(table, uri, schema=table.schema)
    lance.LanceDataset.commit(uri, lance.LanceOperation.Overwrite(table.schema, fragments), read_version=0)


@pytest.mark.parametrize("grouped", [None, in_lines, in_lance])
def test_the_output_of_cosmos_curate_is_its_clips_with_captions_and_scores(curated, grouped):
    if grouped is not None:
        grouped([json.loads(file.read_text()) for file in sorted((curated / "metas/v0").iterdir())], curated)
        shutil.rmtree(curated / "metas")
    data = dataset(root="curated")
    assert [data.record(i)["caption"] for i in range(len(data))] == ["plain 0", "enhanced 1", "", "plain 3"]
    record = data.record(3)
    assert (record["aesthetic_score"], record["motion_score"], record["label"]) == (7.5, 0.25, None)
    assert (record["source_video"], record["num_frames"]) == ("s3://in/long.mp4", 11)
    assert record.keys().isdisjoint({"windows", "embedding", "clip_location"})
    assert data.load(3, np.random.default_rng(0))["pixels"].shape == (5, 32, 32, 3)
    chosen = dataset(root="curated", columns={"caption": "qwen_caption"})
    assert chosen.record(1)["caption"] == "plain 1"
    with pytest.raises(ValueError, match="no window has 'gpt_caption'"):
        dataset(root="curated", columns={"caption": "gpt_caption"})
    with pytest.raises(
        ValueError, match=r"no clip has 'aestetic' \(data.columns.label\); there are 'aesthetic_score', "
    ):
        dataset(root="curated", columns={"label": "aestetic"})


def test_clips_of_several_cameras_share_what_was_found_out_about_them(curated):
    for file in sorted((curated / "clips").iterdir()):
        for camera in ("front", "rear/left"):
            (place := file.with_suffix("") / f"{camera}.mp4").parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
        file.unlink()
    rows = dataset(root="curated").rows
    assert [row.path.name for row in rows] == ["front.mp4", "left.mp4"] * 4
    assert [row.caption for row in rows] == ["plain 0"] * 2 + ["enhanced 1"] * 2 + [""] * 2 + ["plain 3"] * 2


def test_metas_that_are_damaged_are_refused(curated):
    meta = sorted((curated / "metas/v0").iterdir())[1]
    meta.write_text("{")
    with pytest.raises(ValueError, match=f"{meta.name} cannot be read.*or remove it"):
        dataset(root="curated")


def test_a_column_of_bytes_beside_paths_is_not_taken_for_the_clips(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="the extra [parquet] is not installed")
    from pyarrow import parquet

    table = arrow.table({"path": ["a.mp4", "b.mp4"], "thumbnail": arrow.array([b"x", b"y"], arrow.binary())})
    parquet.write_table(table, tmp_path / "clips.parquet")
    assert [row["path"] for row in read_table(tmp_path / "clips.parquet", {})] == ["a.mp4", "b.mp4"]

"""Data in stores that are named by a URL: the same samples as from a folder, read by byte range through a cache of limited size."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from media import write_barcodes
from safetensors.torch import save_file
from store_server import environment, serving

from stdit.data import answers, blocks, stores
from stdit.data.blocks import BLOCK, RemoteFile
from stdit.data.config import DataConfig
from stdit.data.datasets import build_dataset
from stdit.data.identity import fingerprint
from stdit.data.loader import batches
from stdit.data.media import VideoError, open_regular, state_of
from stdit.data.parquet import write_parquet
from stdit.data.stores import is_remote, is_url, url_of
from stdit.data.tensor_rows import TensorRows
from stdit.recipes import cache_latents, cli, index

pytest.importorskip("obstore", reason="needs pip install 'stdit[stores]'")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A bucket with clips in two classes, captions, a manifest, a parquet table and shards; the same is in the folder `bucket`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(blocks._Limit, "written", None)
    rows = []
    (tmp_path / "bucket/shards").mkdir(parents=True)
    for i in range(4):
        folder = tmp_path / f"bucket/clips/{'ab'[i % 2]}"
        folder.mkdir(parents=True, exist_ok=True)
        write_barcodes(folder / f"{i}.mp4", 8 + i)
        (folder / f"{i}.txt").write_text(f"clip {i}")
        rows.append({"path": f"clips/{folder.name}/{i}.mp4", "text": f"clip {i}", "label": folder.name})
    (tmp_path / "bucket/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_parquet(tmp_path / "bucket/rows.parquet", rows)
    with tarfile.open(tmp_path / "bucket/shards/0.tar", "w") as tar:
        for i in range(4):
            tar.add(tmp_path / rows[i]["path"].replace("clips", "bucket/clips", 1), f"{i}.mp4")
    with serving(tmp_path) as server:
        for name, value in {**environment(server), "STDIT_STORE_TIMEOUT": "20"}.items():
            monkeypatch.setenv(name, value)
        forget()
        yield server
        forget()


def forget():
    stores.forget()
    stores._allowed.clear()
    stores._store.cache_clear()


def dataset(**settings):
    return build_dataset(DataConfig(**{"num_frames": 5, "height": 32, "width": 32, **settings}))


SHAPES = {
    "folder": ({"root": "bucket/clips"}, {"root": "s3://bucket/clips"}),
    "manifest": ({"root": "bucket", "manifest": "bucket/rows.jsonl"}, {"root": "s3://bucket", "manifest": "s3://bucket/rows.jsonl"}),
    "parquet": ({"root": "bucket", "manifest": "bucket/rows.parquet"}, {"root": "s3://bucket", "manifest": "rows.parquet"}),
    "manifest here": ({"root": "bucket", "manifest": "bucket/rows.jsonl"}, {"root": "s3://bucket", "manifest": "bucket/rows.jsonl"}),
    "tar": ({"root": "bucket/shards"}, {"root": "s3://bucket/shards"}),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_data_in_a_store_are_those_of_a_folder(bucket, shape):
    here, there = (dataset(**settings) for settings in SHAPES[shape])
    assert fingerprint(here) == fingerprint(there) and here.class_names == there.class_names
    for i in range(4):
        assert here.record(i) == there.record(i) and here.shape(i) == there.shape(i)
        a, b = (d.load(i, np.random.default_rng(i))["pixels"] for d in (here, there))
        assert (a == b).all()


def test_batches_from_a_store_are_keyed_and_a_run_goes_on_at_any_step(bucket):
    there = dataset(root="s3://bucket/clips")
    first = batches(there, 2, 4)
    steps = [next(first).pixels for _ in range(4)]
    later = batches(there, 2, 4, start_step=2)
    assert all((next(later).pixels == pixels).all() for pixels in steps[2:])
    asked = len(bucket.requests)
    again = batches(dataset(root="s3://bucket/clips"), 2, 4)
    assert all((next(again).pixels == pixels).all() for pixels in steps)
    assert len(bucket.requests) == asked  # all of it lies on the disk by now


@pytest.mark.parametrize("shape", SHAPES)
def test_a_start_asks_for_folders_not_for_each_clip(bucket, shape):
    dataset(**SHAPES[shape][1])
    asked = [key for method, key, _ in bucket.requests if key.endswith(".mp4") or (method == "HEAD" and "clips" in key)]
    assert asked == [] and len([1 for _, key, _ in bucket.requests if not key.endswith(".txt")]) <= 8


def test_worker_processes_read_from_a_store(bucket):
    plain = batches(dataset(root="bucket/clips"), 2, 4)
    there = batches(dataset(root="s3://bucket/clips"), 2, 4, workers=1)
    asked = len(bucket.requests)
    assert (next(plain).pixels == next(there).pixels).all() and len(bucket.requests) > asked
    there.close()


def test_worker_processes_read_cached_latents_from_a_store(bucket):
    sizes = ["data.num_frames=5", "data.height=32", "data.width=32"]
    clips = ["data.root=bucket/clips", "data.source=videos"]
    assert cache_latents.main(["quickstart", *clips, *sizes, "--output", "bucket/latents"]) == 0
    here, there = (dataset(root=root, source="latents") for root in ("bucket/latents", "s3://bucket/latents"))
    loaded = batches(there, 2, 4, workers=1)
    assert (next(batches(here, 2, 4)).latents == next(loaded).latents).all()
    loaded.close()


def test_a_part_is_read_by_its_bytes(bucket, tmp_path):
    stores.allow("s3://bucket")
    whole = np.random.default_rng(0).bytes(5 * BLOCK + 17)
    (tmp_path / "bucket/large.bin").write_bytes(whole)
    with RemoteFile("s3://bucket/large.bin") as file:
        file.seek(2 * BLOCK + 5)
        assert file.read(10) == whole[2 * BLOCK + 5 :][:10]
        assert [part for method, _, part in bucket.requests if method == "GET"] == [
            f"bytes={2 * BLOCK}-{3 * BLOCK - 1}"
        ]
        file.seek(-4, os.SEEK_END)
        assert file.read(100) == whole[-4:] and file.read(1) == b""
    with open_regular("s3://bucket/large.bin") as file:
        assert file.read() == whole


def test_a_row_of_a_tensor_in_a_store_is_read_by_its_bytes(bucket, tmp_path):
    stores.allow("s3://bucket")
    latents = torch.randn(8, 4, 2 * BLOCK // 16, dtype=torch.float32)  # rows of two blocks
    save_file({"latents": latents, "half": latents[:, :, :3].half()}, tmp_path / "bucket/rows.safetensors")
    rows = TensorRows("s3://bucket/rows.safetensors")
    assert (rows.row("latents", 5) == latents[5]).all() and rows.row("half", 7).dtype == torch.float16
    parts = [part.removeprefix("bytes=").split("-") for _, _, part in bucket.requests if part]
    assert sum(int(end) - int(begin) + 1 for begin, end in parts) <= 8 * BLOCK  # of 17


def test_a_shard_of_a_cache_in_a_store_that_is_missing_or_cut_short_is_refused_before_a_step(bucket, tmp_path):
    shard = {"file": "0.safetensors", "count": 2, "labels": [None, None], "bytes": 100}
    info = {"num_classes": 0, "class_names": None, "num_frames": 5, "height": 32, "width": 32, "vae": "tiny", "vae_fingerprint": "", "fps": None}  # fmt: skip
    (tmp_path / "bucket/latents").mkdir()
    (tmp_path / "bucket/latents/cache.json").write_text(json.dumps({**info, "shards": [shard]}))
    with pytest.raises(ValueError, match="0.safetensors is missing"):
        dataset(root="s3://bucket/latents")
    (tmp_path / "bucket/latents/0.safetensors").write_bytes(bytes(60))
    forget()
    with pytest.raises(ValueError, match="0.safetensors has 60 bytes instead of 100"):
        dataset(root="s3://bucket/latents")


def test_the_cache_keeps_to_its_limit(bucket, tmp_path, monkeypatch):
    stores.allow("s3://bucket")
    monkeypatch.setenv("STDIT_STORE_CACHE_GB", str(10 * BLOCK / 1e9))
    whole = np.random.default_rng(0).bytes(30 * BLOCK)
    (tmp_path / "bucket/large.bin").write_bytes(whole)
    with open_regular("s3://bucket/large.bin") as file:
        assert file.read() == whole
        kept = sum(found.stat().st_size for found in (tmp_path / "cache/stores").rglob("*") if found.is_file())
        assert 0 < kept <= 12 * BLOCK  # one reading ahead more
        file.seek(0)
        assert file.read() == whole


def test_a_file_that_has_changed_is_read_anew(bucket, tmp_path):
    stores.allow("s3://bucket")
    file = tmp_path / "bucket/note.bin"
    file.write_bytes(b"before")
    before = state_of("s3://bucket/note.bin")
    assert open_regular("s3://bucket/note.bin").read() == b"before"
    file.write_bytes(b"after!")
    stores.forget()
    assert open_regular("s3://bucket/note.bin").read() == b"after!" and state_of("s3://bucket/note.bin") != before


def test_an_index_of_a_store_opens_without_reading_and_knows_what_has_changed(bucket, tmp_path):
    assert index.main(["s3://bucket/clips", "--output", "clips.index", "--workers", "0"]) == 0
    stores.forget()
    indexed, plain = dataset(root="s3://bucket/clips", manifest="clips.index"), dataset(root="bucket/clips")
    assert fingerprint(indexed) == fingerprint(plain)
    assert (
        indexed.load(1, np.random.default_rng(0))["pixels"] == plain.load(1, np.random.default_rng(0))["pixels"]
    ).all()
    write_barcodes(tmp_path / "bucket/clips/a/0.mp4", 30)
    stores.forget()
    with pytest.raises(ValueError, match="older than its files.*stdit index"):
        dataset(root="s3://bucket/clips", manifest="clips.index")


@pytest.mark.parametrize(
    ("status", "reason", "shape"),
    [(0, "no answer within 0.5 s, 3 times", "folder"), *((403, "answers 403, no permission", one) for one in SHAPES)],
)
def test_a_store_that_refuses_or_is_silent_is_named_in_one_line_before_a_step(
    bucket, monkeypatch, status, reason, shape
):
    monkeypatch.setenv("STDIT_STORE_TIMEOUT", "0.5")
    bucket.status = status
    with pytest.raises(ValueError, match=f"s3://bucket.*{reason}") as caught:
        dataset(**SHAPES[shape][1])
    assert "\n" not in str(caught.value)


def test_a_long_listing_may_take_the_time_of_an_answer_for_each_of_its_parts(bucket, monkeypatch):
    monkeypatch.setenv("STDIT_STORE_TIMEOUT", "0.6")
    stores.allow("s3://bucket")
    names, pause = [f"clips/{i}.mp4" for i in range(8)], [0.5]

    def listed_slowly(*_):
        for name in names:
            time.sleep(pause[0])
            yield [{"path": name, "size": 5}]

    monkeypatch.setattr("obstore.list", listed_slowly)
    assert list(stores.files_below("s3://bucket/clips")) == [f"{i}.mp4" for i in range(8)]
    stores.forget()
    pause[0] = 3.0
    with pytest.raises(stores.StoreError, match=r"no answer within 0.6 s, 3 times.*STDIT_STORE_TIMEOUT") as found:
        stores.files_below("s3://bucket/clips")
    assert "\n" not in str(found.value)


def test_a_bucket_is_no_manifest_and_an_object_that_marks_a_folder_no_clip(bucket, tmp_path):
    with pytest.raises(ValueError, match="bucket. does not exist; give a .jsonl") as found:
        dataset(root="s3://bucket", manifest="s3://bucket")
    assert "\n" not in str(found.value)
    one = {"type": "file", "size": 0}
    infos = [{**one, "name": f"bucket/clips/{name}"} for name in ("a", "a-1.mp4", "a/0.mp4", "b.mp4")]
    store = stores._store("s3")
    assert list(stores._names(store, "s3://bucket/clips", infos)) == ["a-1.mp4", "a/0.mp4", "b.mp4"]


def test_a_number_in_a_file_s_name_is_no_status_of_a_store():
    assert answers.status_of(RuntimeError("cannot read bucket/clip 404.mp4: connection reset")) is None
    assert answers.status_of(RuntimeError("Client error with status 404 Not Found: <Error/>")) == 404
    assert answers.status_of(RuntimeError("403 Client Error: Forbidden for url: http://x/404.mp4")) == 403


def test_messages_name_the_url_that_was_given_and_the_status_without_the_request(bucket, capsys, monkeypatch):
    monkeypatch.chdir(bucket.root)

    def said(*command):
        forget()
        assert cli.main(list(command)) == 1
        return capsys.readouterr().err

    small = [
        "train",
        "own_videos",
        "train.trackers=[]",
        "data.num_frames=5",
        "data.height=32",
        "data.width=32",
        "model.size=S/2",
    ]
    nothing = said(*small, "data.root=s3://bucket/nothing")
    assert nothing.startswith("data.root='s3://bucket/nothing' has no files") and "generated" not in nothing
    assert index.main(["s3://bucket/clips", "--output", "clips.index", "--workers", "0"]) == 0
    Path("bucket/clips/a/0.mp4").unlink()
    older = said(*small, "data.root=s3://bucket/clips", "data.manifest=clips.index")
    assert "stdit index s3://bucket/clips" in older and "s3:/b" not in nothing + older
    bucket.status = 503
    monkeypatch.setenv("STDIT_STORE_TIMEOUT", "0.5")
    refused = said(*small, "data.root=s3://bucket/clips")
    assert "(it answers 503 Service Unavailable, 3 times)" in refused and "list-type" not in refused


_ENDS = """
import threading
from stdit.data import stores
stores.allow("s3://bucket")
def ask():
    while True:
        try:
            stores._ask("s3://bucket/clips", lambda store: store.ls("s3://bucket/clips"))
        except stores.StoreError:
            pass
        asked.release()
asked = threading.Semaphore(0)
for _ in range(THREADS):
    threading.Thread(target=ask, daemon=True).start()
try:
    print(stores.names_in("s3://bucket/clips/a"))
except stores.StoreError:
    print("refused")
"""


@pytest.mark.parametrize("status", [200, 403])
@pytest.mark.parametrize("threads", [0, 4])
def test_a_process_ends_whole_right_after_an_answer_and_while_others_are_awaited(bucket, status, threads):
    bucket.status = status
    for _ in range(8):
        ended = subprocess.run(
            [sys.executable, "-c", _ENDS.replace("THREADS", str(threads))], capture_output=True, text=True
        )
        assert (ended.returncode, ended.stderr) == (0, ""), ended


def test_a_store_that_refuses_later_is_an_unreadable_file(bucket):
    there = dataset(root="s3://bucket/clips")
    bucket.status = 403
    with pytest.raises(VideoError, match="403"):
        there.load(0, np.random.default_rng(0))


def test_rows_of_a_manifest_lead_to_no_store_that_the_user_did_not_name(bucket, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"path": "s3://other/a.mp4"}\n')
    for root in (".", "s3://bucket"):
        with pytest.raises(ValueError, match=r"leads outside data.root.*set data.root to the URL"):
            dataset(root=root, manifest="bad.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"path": "s3://bucket/../other/a.mp4"}\n')
    with pytest.raises(ValueError, match="leads outside data.root"):
        dataset(root="s3://bucket", manifest="bad.jsonl")
    assert not [key for _, key, _ in bucket.requests if "other" in key]


def test_a_file_that_is_missing_in_a_store_is_unreadable_by_name(bucket, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"path": "clips/a/0.mp4"}\n{"path": "clips/a/none.mp4"}\n')
    there = dataset(root="s3://bucket", manifest="rows.jsonl")
    with pytest.raises(VideoError, match="none.mp4.*not there"):
        there.load(1, np.random.default_rng(0))


def test_memory_and_file_are_stores_too(bucket, tmp_path):
    import fsspec

    fsspec.filesystem("memory").pipe("/m/a.mp4", (tmp_path / "bucket/clips/a/0.mp4").read_bytes())
    for root in ("memory://m", (tmp_path / "bucket/clips/a").as_uri()):
        assert dataset(root=root).load(0, np.random.default_rng(0))["pixels"].shape == (5, 32, 32, 3)


def test_a_protocol_that_nothing_reads_is_refused(bucket):
    with pytest.raises(ValueError, match="nosuch:// is no store that can be read"):
        dataset(root="nosuch://a/b")


def test_an_address_that_the_user_did_not_name_is_the_name_of_a_file(bucket):
    assert index.main(["s3://bucket/clips", "--output", "clips.index", "--workers", "0"]) == 0
    dataset(root="s3://bucket/clips")
    for name in (
        "s3://bucket/rows.jsonl",
        "s3://bucket/clips/../rows.jsonl",
        "s3://bucket/clipsmore",
        "http://localhost/a",
    ):
        assert not is_remote(name)
        with pytest.raises(VideoError, match="cannot be opened"):
            open_regular(name)
    forget()
    asked = len(bucket.requests)
    with pytest.raises(ValueError, match=r"clips.index is of files in a store.*data.root=s3://bucket/clips"):
        dataset(manifest="clips.index")
    assert len(bucket.requests) == asked


def test_paths_of_this_machine_are_no_urls():
    assert not any(is_url(path) for path in ("a/b.mp4", "/a:/b", "C:/clips", "a:b", "./s3:/a", "D:\\clips"))
    assert url_of("s3:/bucket/./.a") == "s3://bucket/.a" and url_of("file:///a") == "file:///a"


def test_a_web_server_gives_files_that_a_manifest_names_and_no_folders(bucket):
    root = f"http://127.0.0.1:{bucket.server_address[1]}/bucket"
    there, here = dataset(root=root, manifest="rows.jsonl"), dataset(**SHAPES["manifest"][0])
    assert fingerprint(there) == fingerprint(here)
    assert (there.load(2, np.random.default_rng(0))["pixels"] == here.load(2, np.random.default_rng(0))["pixels"]).all()
    with pytest.raises(ValueError, match="folders of a web server cannot be listed"):
        dataset(root=root)


def test_a_silent_store_is_waited_for_once_and_not_for_every_folder(monkeypatch):
    asked = []

    class Silent:
        def ls(self, url, detail):
            asked.append(url)
            time.sleep(5)

    monkeypatch.setenv("STDIT_STORE_TIMEOUT", "0.1")
    monkeypatch.setattr(stores, "_ATTEMPTS", 1)
    monkeypatch.setattr(stores, "_store", lambda protocol: Silent())
    monkeypatch.setattr(stores, "is_remote", lambda url: True)
    with pytest.raises(stores.StoreError, match="no answer within 0.1 s"):
        stores.remember([Path(f"s3://silent/{folder}/a.mp4") for folder in "abc"])
    assert asked == ["s3://silent/a"]

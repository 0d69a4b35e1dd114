"""A cache of latents, a run and a model know what they were made from."""

import hashlib
import json
import os
import shutil
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stdit.config import Config, load_typed
from stdit.data import cached
from stdit.data.cached import CachedLatents
from stdit.data.clips import VideoClips
from stdit.data.config import DataConfig
from stdit.data.datasets import build_dataset
from stdit.data.identity import columns_of, content_of, fingerprint, hash_of, identity_of
from stdit.data.rates import clip_rate
from stdit.data.video_io import VideoError
from stdit.data.video_write import write_video
from stdit.recipes import cache_latents, latent_shards, shard_folder, train

TINY = """
name: t
data: {source: videos, root: clips, manifest: m.csv, num_frames: 5, height: 32, width: 32, workers: 0}
model: {size: S/2, depth: 1, hidden_size: 16, num_heads: 2}
train: {steps: 1, batch_size: 2, samples: 0, precision: fp32}
"""
ROWS = ["a.mp4,x,dark", "b.mp4,x,dim", "c.mp4,y,grey", "d.mp4,y,bright"]


def write(name: str, value: int) -> None:
    write_video(f"clips/{name}.mp4", np.full((5, 32, 32, 3), value, np.uint8), fps=8)


def manifest(rows: list[str], head: str = "path,label,caption") -> None:
    Path("clips/m.csv").write_text("\n".join([head, *rows]) + "\n")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    (root / "clips").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for i, name in enumerate("abcd"):
            write(name, 40 + 50 * i)
    return root / "clips"


@pytest.fixture
def home(tmp_path, monkeypatch, clips):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(clips, "clips")
    Path("t.yaml").write_text(TINY)
    manifest(ROWS)
    return tmp_path


@pytest.fixture
def cache(home, monkeypatch):
    """A function that runs cache_latents with two clips a shard -> cache.json, tensors by shard, indices encoded."""
    encoded: list[int] = []
    real = latent_shards.encode_shard

    def watched(dataset, vae, indices, **options):
        encoded.extend(indices)
        return real(dataset, vae, indices, **options)

    monkeypatch.setattr(latent_shards, "encode_shard", watched)

    def run(*arguments: str):
        encoded.clear()
        assert cache_latents.main(["t.yaml", *arguments, "--output", "lat", "--shard-size", "2"]) == 0
        info = json.loads(Path("lat/cache.json").read_text())
        return info, [load_file(f"lat/{shard['file']}")["latents"] for shard in info["shards"]], list(encoded)

    return run


def annotations(name: str) -> list:
    cached = CachedLatents(Path("lat"), DataConfig(num_frames=5, height=32, width=32))
    return [cached.record(i)[name] for i in range(len(cached))]


def test_a_cache_follows_captions_labels_clips_and_their_order_and_encodes_only_what_changed(cache):
    _, before, encoded = cache()
    assert encoded == [0, 1, 2, 3]
    assert cache()[2] == []
    manifest(["a.mp4,x,MENDED", "b.mp4,y,dim", *ROWS[2:]])
    _, after, encoded = cache()
    assert annotations("caption") == ["MENDED", "dim", "grey", "bright"]
    assert annotations("label") == [0, 1, 1, 1]
    assert encoded == [] and all(map(torch.equal, before, after))
    write("b", 250)
    others = {path: path.stat().st_mtime_ns for path in Path("lat").glob("latents-00001-*")}
    _, after, encoded = cache()
    assert encoded == [1]
    assert len(others) == 2 and all(path.stat().st_mtime_ns == time for path, time in others.items())
    assert torch.equal(before[0][0], after[0][0]) and not torch.equal(before[0][1], after[0][1])
    manifest([ROWS[3], *ROWS[1:3], ROWS[0], "b.mp4,z,again"])
    info, last, encoded = cache()
    assert encoded == []  # each is somewhere in the folder
    assert torch.equal(last[0][0], before[1][1]) and torch.equal(last[1][1], before[0][0])
    assert torch.equal(last[2][0], last[0][1])
    assert annotations("caption")[0] == "bright" and info["class_names"] == ["x", "y", "z"]
    manifest(ROWS[:2])
    cache()
    (shard,) = cache()[0]["shards"]  # files of before have gone at the second time
    files = sorted(path.name for path in Path("lat").iterdir() if path.suffix != ".lock")
    assert files == sorted([
        "cache.json", "settings.json", json.loads(Path("lat/cache.json").read_text())["table"],
        shard["file"], shard["file"].replace(".safetensors", ".json"),
    ])  # fmt: skip


def test_clips_that_are_renamed_or_lie_elsewhere_are_not_encoded_again_and_other_clips_are_refused(cache):
    _, before, _ = cache()
    shutil.move("clips", "elsewhere")
    Path("elsewhere/deep").mkdir()
    shutil.move("elsewhere/a.mp4", "elsewhere/deep/first.mp4")
    Path("elsewhere/m.csv").write_text("\n".join(["path,label,caption", "deep/first.mp4,x,dark", *ROWS[1:]]) + "\n")
    moved = ("data.root=elsewhere",)
    info, after, encoded = cache(*moved)
    assert encoded == [] and all(map(torch.equal, before, after)) and info["root"] == "elsewhere"
    assert cache(*moved)[2] == []
    for i, name in enumerate("abcd"):
        write_video(f"elsewhere/{name}.mp4", np.full((5, 32, 32, 3), 7 * i, np.uint8), fps=8)
    Path("elsewhere/m.csv").write_text("\n".join(["path,label,caption", *ROWS]) + "\n")
    shutil.move("elsewhere", "others")
    files = {path: path.read_bytes() for path in Path("lat").iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="lat holds latents of other clips, which these would replace; choose another"):
        cache("data.root=others")
    assert {path: path.read_bytes() for path in files} == files


def test_latents_of_other_settings_are_not_taken_for_these_though_the_settings_are_lost(cache):
    for name in "abcd":
        write_video(f"clips/{name}.mp4", np.full((9, 32, 32, 3), 9 * ord(name) % 255, np.uint8), fps=8)
    cache()
    Path("lat/settings.json").unlink()
    with pytest.raises(ValueError, match=r"made with other settings \(num_frames\)"):
        cache("data.num_frames=9")
    Path("lat/cache.json").unlink()
    with pytest.raises(ValueError, match="holds latents without their settings.json"):
        cache("data.num_frames=9")
    assert not shard_folder.ShardFolder(Path("lat"), "a hash of others").rows


def test_a_clip_that_could_not_be_read_is_tried_again(cache, monkeypatch):
    load, broken = VideoClips.load, ["c.mp4"]

    def sometimes(self, index, *arguments):
        if Path(self.name(index)).name in broken:
            raise VideoError("the disk was away")
        return load(self, index, *arguments)

    monkeypatch.setattr(VideoClips, "load", sometimes)
    info, before, _ = cache()
    assert [shard["count"] for shard in info["shards"]] == [2, 1] and list(info["skipped"].values()) == [
        "the disk was away"
    ]
    known = (
        Path("lat/cache.json").read_bytes(),
        [path.stat().st_mtime_ns for path in sorted(Path("lat").glob("latents-*"))],
    )
    files = [shard["file"] for shard in info["shards"]]
    info, same, encoded = cache()
    assert encoded == [2] and torch.equal(before[1], same[1])
    assert known == (
        Path("lat/cache.json").read_bytes(),
        [path.stat().st_mtime_ns for path in sorted(Path("lat").glob("latents-*"))],
    )
    broken.clear()
    info, after, encoded = cache()
    assert encoded == [2] and not info["skipped"] and torch.equal(after[1][1], before[1][0])
    assert info["shards"][0]["file"] == files[0] and info["shards"][1]["file"] != files[1]


def test_a_process_of_several_does_not_publish_the_latents_of_a_file_that_has_changed(cache, monkeypatch, capsys):
    _, before, _ = cache()
    size = Path("clips/a.mp4").stat().st_size
    write("a", 41)
    assert Path("clips/a.mp4").stat().st_size == size  # found only by reading it
    published = Path("lat/cache.json").read_bytes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert cache_latents.main(["t.yaml", "--output", "lat", "--shard-size", "2"]) == 0
    assert "the last process to finish writes" in capsys.readouterr().out
    assert Path("lat/cache.json").read_bytes() == published
    monkeypatch.setenv("RANK", "0")
    _, after, encoded = cache()
    assert encoded == [0] and not torch.equal(after[0][0], before[0][0]) and torch.equal(after[1], before[1])


def test_files_that_another_process_may_need_stay(cache):
    info, _, _ = cache()
    write("a", 200)
    folder = shard_folder.ShardFolder(Path("lat"), "")
    with folder.in_use():
        cache()
        assert all((Path("lat") / shard["file"]).is_file() for shard in info["shards"])
    cache()
    assert not (Path("lat") / info["shards"][0]["file"]).is_file()


def test_a_run_goes_on_while_its_cache_is_brought_up_to_date_and_names_a_shard_that_is_gone(cache, monkeypatch, capsys):
    monkeypatch.setattr(cached, "MOST_OPEN", 1)
    _, before, _ = cache()
    dataset = CachedLatents(Path("lat"), DataConfig(num_frames=5, height=32, width=32))
    write("e", 10)
    capsys.readouterr()
    manifest(["e.mp4,x,first", *ROWS[:3], "d.mp4,y,changed"])
    info, _, encoded = cache()
    assert encoded == [0] and "3 replaced files are kept" in capsys.readouterr().out
    late = ForkingPickler.loads(ForkingPickler.dumps(dataset))  # as a loader process that takes another's place
    for one in (dataset, late):
        assert all(torch.equal(one.load(i, None)["latents"], before[i // 2][i % 2]) for i in (3, 0, 2, 1))
        assert one.record(0)["caption"] == "dark" and one.record(3)["caption"] == "bright"
    cache()
    names = {shard["file"] for shard in info["shards"]} | {info["table"]}
    assert {path.name for path in Path("lat").glob("*.safetensors")} == names
    with pytest.raises(ValueError, match="latents-00001-.* is gone: .*updated twice.*start the run again") as found:
        dataset.load(2, None)
    assert not isinstance(found.value, VideoError)


def test_many_clips_are_added_to_few(cache, monkeypatch):
    cache()
    for i in range(30):
        shutil.copy("clips/a.mp4", f"clips/e{i}.mp4")
        with open(f"clips/e{i}.mp4", "ab") as stream:
            stream.write(b"%d" % i)  # another content
    manifest([*(f"e{i}.mp4,x,more" for i in range(15)), *ROWS, *(f"e{i}.mp4,x,more" for i in range(15, 30))])
    monkeypatch.setattr(shard_folder, "_COMPARED", 2)
    monkeypatch.setattr(latent_shards, "MOST_OPEN", 1)
    _, after, encoded = cache()
    assert len(encoded) == 30 and not {15, 16, 17, 18} & set(encoded)
    assert len(torch.cat(after)) == 34


def test_a_cache_of_the_version_before_is_read_and_brought_up_to_date_without_encoding(cache):
    info, before, _ = cache()
    wanted = [(annotations(name)) for name in ("label", "caption", "conditions")]
    as_before(info)
    assert [(annotations(name)) for name in ("label", "caption", "conditions")] == wanted
    old = CachedLatents(Path("lat"), DataConfig(num_frames=5, height=32, width=32))
    trained_on = fingerprint(old)
    assert old.group_of(2) == "c.mp4" and torch.equal(old.load(3, None)["latents"], before[1][1])
    copy = ForkingPickler.loads(ForkingPickler.dumps(old))
    assert copy.record(2) == old.record(2) and copy.group_of(2) == "c.mp4"
    assert cache()[2] == []
    again = CachedLatents(Path("lat"), DataConfig(num_frames=5, height=32, width=32))
    assert again.known_fingerprint == trained_on  # a run on it goes on
    manifest(["d.mp4,y,bright", *ROWS[:3]])
    _, after, encoded = cache()
    assert encoded == []
    assert torch.equal(torch.cat(after), torch.cat(before)[[3, 0, 1, 2]])


def as_before(info: dict) -> None:
    """Rewrite a cache of clips without columns as the version before wrote it, with lists in cache.json."""
    data, shards = build_dataset(load_typed(Config, "t.yaml").data), []
    for number, shard in enumerate(info["shards"]):
        file, name = Path("lat") / shard["file"], f"latents-{number:05d}.safetensors"
        record = json.loads(file.with_suffix(".json").read_text())
        clips = range(2 * number, 2 * number + 2)
        rows = [identity_of(data, i, read=True) for i in clips]
        sources = [[one.source, one.content, hash_of(columns_of(one))] for one in rows]
        listed = {
            "file": name, "conditions": record["conditions"], "clips": [one.source for one in rows],
            "labels": [one.label for one in rows], "captions": [one.caption for one in rows], "columns": {},
            **{key: record[key] for key in ("count", "bytes", "sha256")},
        }  # fmt: skip
        shards.append({**listed, "sources": hash_of(sources)})
        own = {**listed, "rows": record["rows"], "sources": sources, "bad": {}, "annotations": "0"}
        file.rename(f"lat/{name}")
        Path(f"lat/{name}").with_suffix(".json").write_text(json.dumps(own))
        file.with_suffix(".json").unlink()
    Path("lat", info.pop("table")).unlink()
    head = {key: value for key, value in info.items() if key not in ("fingerprint", "columns")}
    Path("lat/cache.json").write_text(json.dumps({**head, "shards": shards}))


def test_processes_receive_no_rows_of_a_cache_and_have_few_of_its_shards_open(cache, monkeypatch):
    manifest([f"{name}.mp4,x,{'long caption ' * 200}{number}" for number in range(3) for name in "abcd"])
    cache()
    dataset = CachedLatents(Path("lat"), DataConfig(num_frames=5, height=32, width=32))
    sent = ForkingPickler.dumps(dataset)
    assert b"long caption" not in bytes(sent) and len(sent) < 4000
    copy = ForkingPickler.loads(sent)
    assert [copy.record(i) for i in range(12)] == [dataset.record(i) for i in range(12)]
    monkeypatch.setattr(cached, "MOST_OPEN", 2)
    shards = str(Path("lat/latents-").resolve())
    for i in (0, 2, 4, 0, 6, 8, 10, 1):
        assert torch.equal(copy.load(i, None)["latents"], dataset.load(i, None)["latents"])
        names = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
        assert sum(name.startswith(shards) for name in names) <= 4  # two of each dataset


def test_a_cache_knows_the_fingerprint_that_its_clips_have(cache, monkeypatch):
    cache()
    dataset = CachedLatents(Path("lat"), DataConfig(num_frames=5, height=32, width=32))
    known = fingerprint(dataset)
    assert known == dataset.known_fingerprint
    dataset.info.pop("fingerprint")
    assert fingerprint(dataset) == known


def test_a_refreshed_cache_equals_a_new_one(cache):
    cache()
    manifest([*ROWS[:1], *ROWS[2:], ROWS[1]])
    info, refreshed, _ = cache()
    shutil.rmtree("lat")
    new_info, new, _ = cache()
    assert all(map(torch.equal, refreshed, new))
    assert info == new_info


def test_a_cache_refuses_what_it_would_freeze_unless_it_is_asked_for(cache, capsys):
    with pytest.raises(
        ValueError, match=r"data.flip=true data.crop=random would be drawn once .* --freeze-augmentation"
    ):
        cache("data.flip=true", "data.crop=random")
    with pytest.raises(ValueError, match="data.crop=random would be drawn once .* use data.crop=center"):
        cache("data.crop=random")
    cache()
    config = {"num_frames": 5, "height": 32, "width": 32}
    with pytest.raises(ValueError, match="data.flip=true cannot change the latents"):
        CachedLatents(Path("lat"), DataConfig(**config, flip=True))
    with pytest.raises(ValueError, match="data.crop=random cannot change the latents"):
        CachedLatents(Path("lat"), DataConfig(**config, crop="random"))
    with pytest.raises(ValueError, match=r"made with other settings \(flip\)"):
        cache("data.flip=true", "--freeze-augmentation")
    assert "data.flip=true: drawn once" in capsys.readouterr().out


def test_a_cache_keeps_the_rate_of_its_clips(cache):
    for name in "abcd":
        write_video(f"clips/{name}.mp4", np.zeros((5, 32, 32, 3), np.uint8), fps=30)
    cache()
    dataset = CachedLatents(Path("lat"), DataConfig(num_frames=5, height=32, width=32))
    assert clip_rate(DataConfig(), dataset) == 30


@pytest.mark.parametrize("damage", ["label", "caption.heap", "cut", "empty", "missing"])
def test_a_damaged_table_of_a_cache_is_refused_in_one_line_with_one_remedy_that_mends_it(cache, damage):
    config = DataConfig(num_frames=5, height=32, width=32)
    table = Path("lat", cache()[0]["table"])
    whole = table.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    if damage == "missing":
        table.unlink()
    elif damage in ("cut", "empty"):
        table.write_bytes(whole[:-10] if damage == "cut" else b"")
    else:
        place = begin + json.loads(whole[8:begin])[damage]["data_offsets"][0]
        table.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(ValueError, match=f"^{table} is (damaged|missing).*; run stdit cache-latents again") as found:
        CachedLatents(Path("lat"), config)
    assert str(found.value).count(";") == 1 and "\n" not in str(found.value)
    assert cache()[2] == [] and table.read_bytes() == whole and len(CachedLatents(Path("lat"), config)) == 4


def test_a_shard_that_is_not_the_recorded_one_is_not_read(cache, monkeypatch):
    cache()
    config = DataConfig(num_frames=5, height=32, width=32)
    (shard,) = Path("lat").glob("latents-00001-*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"latents-00001-.*.safetensors has .*run stdit cache-latents again"):
        CachedLatents(Path("lat"), config)
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(
        ValueError, match=r"latents-00001-.*.safetensors does not match its hash; run stdit cache-latents again"
    ):
        CachedLatents(Path("lat"), config)
    monkeypatch.setattr(cached, "HASHED_AT_START", 100)  # the hashes of a large cache are not compared
    dataset = CachedLatents(Path("lat"), config)
    assert dataset.load(2, None)
    with pytest.raises(
        VideoError, match=r"row 1 of latents-00001-.* does not match its checksum; run stdit cache-latents again"
    ):
        dataset.load(3, None)
    shard.write_bytes(whole)
    shutil.copy(shard, "lat/latents-00009.safetensors")
    assert len(CachedLatents(Path("lat"), config)) == 4
    for text in ("{", "[]", '{"shards": [{"file": "../x"}]}', "[" * 100_000):
        Path("lat/cache.json").write_text(text)
        with pytest.raises(ValueError, match="cache.json cannot be read"):
            CachedLatents(Path("lat"), config)


def fingerprint_of(*overrides: str) -> dict:
    return fingerprint(build_dataset(load_typed(Config, "t.yaml", overrides).data))


def changed(before: dict, after: dict) -> set[str]:
    return {key for key in before if before[key] != after[key]}


def test_the_fingerprint_says_what_changed_and_not_where_the_data_lies(home):
    before = fingerprint_of()
    shutil.copytree("clips", "elsewhere/deep")
    assert fingerprint_of("data.root=elsewhere/deep") == before
    manifest([*ROWS[:3], "d.mp4,y,other"])
    assert changed(before, fingerprint_of()) == {"captions"}
    manifest([*ROWS[:3], "d.mp4,x,bright"])
    assert changed(before, fingerprint_of()) == {"labels"}
    manifest([row.replace(",x,", ",z,") for row in ROWS])
    assert changed(before, fingerprint_of()) == {"classes", "labels"}
    manifest([row + ",1" for row in ROWS], "path,label,caption,score")
    assert changed(before, fingerprint_of()) == {"columns"}
    manifest(ROWS[:3])
    assert changed(before, fingerprint_of()) >= {"samples", "files"}
    manifest(ROWS[::-1])
    assert changed(before, fingerprint_of()) >= {"files", "captions"}
    manifest(ROWS)
    with open("clips/a.mp4", "ab") as stream:
        stream.write(b"more")
    assert changed(before, fingerprint_of()) == {"files"}


def test_a_file_of_the_same_size_is_known_by_its_content(tmp_path):
    for size, places in ((10, (0, 9)), (1_000_000, (5, 500_000, 999_999))):
        file = tmp_path / f"{size}"
        file.write_bytes(bytes(size))
        before = content_of(file)
        for place in places:
            other = bytearray(size)
            other[place] = 1
            file.write_bytes(other)
            assert content_of(file) != before
    assert content_of(tmp_path / "none") is None


@pytest.fixture
def quick(monkeypatch):
    """Runs without curves and without an exported model."""
    from stdit.training.metrics import MetricsLogger

    monkeypatch.setattr(MetricsLogger, "curves", lambda *args, **options: None)
    monkeypatch.setattr(train, "replace_model", lambda *args, **options: None)


def test_a_run_refuses_other_data_unless_changes_are_allowed_and_says_what_differs(home, quick, capsys):
    assert train.run(["t.yaml"]) == 0
    shutil.move("clips", "moved")
    assert train.run(["t.yaml", "data.root=moved", "train.steps=2"]) == 0
    shutil.move("moved", "clips")
    manifest([row.replace(",x,", ",z,") for row in ROWS])
    assert train.run(["t.yaml", "train.steps=3"]) == 1
    error = capsys.readouterr().err
    assert "data_fingerprint.classes: ['x', 'y'] -> ['y', 'z']" in error and "train.allow_changes=true" in error
    assert train.run(["t.yaml", "train.steps=3", "train.allow_changes=true"]) == 0
    manifest([*ROWS, "a.mp4,w,more"])
    assert train.run(["t.yaml", "train.steps=4", "train.allow_changes=true"]) == 1
    error = capsys.readouterr().err
    assert "does not fit the model of this config" in error and "Traceback" not in error


def test_a_checkpoint_from_before_fingerprints_resumes_with_a_note(home, quick, capsys):
    assert train.run(["t.yaml"]) == 0
    folder = Path("checkpoints/t/step-1")
    info = json.loads((folder / "info.json").read_text())
    del info["config"]["data_fingerprint"]
    (folder / "info.json").write_text(json.dumps(info))
    listed = json.loads((folder / "MANIFEST.json").read_text())
    data = (folder / "info.json").read_bytes()
    listed["info.json"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "MANIFEST.json").write_text(json.dumps(listed))
    manifest(ROWS[:3])
    assert train.run(["t.yaml", "train.steps=2"]) == 0
    assert "does not say which data it was trained on" in capsys.readouterr().err


def test_a_manifest_with_hashes_is_compared_with_its_files(home):
    hashes = [hashlib.sha256(Path(f"clips/{name}.mp4").read_bytes()).hexdigest() for name in "abcd"]
    hashes[1] = hashes[0]
    manifest([f"{row},{digest}" for row, digest in zip(ROWS, hashes, strict=True)], "path,label,caption,sha256")
    dataset = build_dataset(load_typed(Config, "t.yaml").data)
    rng = np.random.default_rng(0)
    assert dataset.load(0, rng)["pixels"].shape == (5, 32, 32, 3)
    with pytest.raises(VideoError, match="does not have the sha256 of the manifest"):
        dataset.load(1, rng)


def test_an_exported_model_is_compared_with_its_hashes_and_one_that_is_not_finite_is_not_exported(home):
    from stdit import STDiT, STDiTPipeline
    from stdit.training.results import check_finite

    assert train.run(["t.yaml"]) == 0
    model = STDiT.from_pretrained("models/t")
    file = Path("models/t/transformer/diffusion_pytorch_model.safetensors")
    tensors = load_file(file)
    tensors["final_layer.linear.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    for kind in (STDiT, STDiTPipeline):
        with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors does not match its hash"):
            kind.from_pretrained("models/t")
    Path("models/t/MANIFEST.json").unlink()
    pipe = STDiTPipeline.from_pretrained("models/t")
    with torch.no_grad():
        model.final_layer.linear.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"final_layer.linear.weight have numbers that are not finite; nothing done"):
        check_finite(model, "nothing done")
    pipe.transformer.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="sampled latents have numbers that are not finite"):
        pipe(class_labels=["x"], num_inference_steps=1, progress=False)

"""A cache of latents, a run and a model know what they were made from."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stdit.config import Config, load_typed
from stdit.data.cached import CachedLatents
from stdit.data.config import DataConfig
from stdit.data.datasets import build_dataset
from stdit.data.identity import content_of, fingerprint
from stdit.data.rates import clip_rate
from stdit.data.video_io import VideoError
from stdit.data.video_write import write_video
from stdit.recipes import cache_latents, latent_shards, train

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


def annotations(info: dict, key: str) -> list:
    return [value for shard in info["shards"] for value in shard[key]]


def test_a_cache_follows_captions_labels_clips_and_their_order_and_encodes_only_what_changed(cache):
    _, before, encoded = cache()
    assert encoded == [0, 1, 2, 3]
    assert cache()[2] == []
    manifest(["a.mp4,x,MENDED", "b.mp4,y,dim", *ROWS[2:]])
    info, after, encoded = cache()
    assert annotations(info, "captions") == ["MENDED", "dim", "grey", "bright"]
    assert annotations(info, "labels") == [0, 1, 1, 1]
    assert encoded == [] and all(map(torch.equal, before, after))
    write("b", 250)
    info, after, encoded = cache()
    assert encoded == [1]
    assert torch.equal(before[0][0], after[0][0]) and not torch.equal(before[0][1], after[0][1])
    manifest([ROWS[3], *ROWS[1:3], ROWS[0], "b.mp4,z,again"])
    info, last, encoded = cache()
    assert encoded == [0, 3, 4]
    assert torch.equal(last[0][0], before[1][1]) and torch.equal(last[1][1], before[0][0])
    assert annotations(info, "captions")[0] == "bright" and info["class_names"] == ["x", "y", "z"]
    manifest(ROWS[:2])
    assert len(cache()[0]["shards"]) == 1
    assert sorted(path.name for path in Path("lat").glob("latents-*")) == [
        "latents-00000.json",
        "latents-00000.safetensors",
    ]


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


def test_a_shard_that_is_not_the_recorded_one_is_not_read(cache):
    cache()
    config = DataConfig(num_frames=5, height=32, width=32)
    shard = Path("lat/latents-00001.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"latents-00001.safetensors has .*run cache_latents again"):
        CachedLatents(Path("lat"), config)
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    dataset = CachedLatents(Path("lat"), config)
    assert dataset.load(0, None)
    with pytest.raises(ValueError, match=r"latents-00001.safetensors does not match.*run cache_latents again"):
        dataset.load(2, None)
    shard.write_bytes(whole)
    shutil.copy("lat/latents-00000.safetensors", "lat/latents-00009.safetensors")
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

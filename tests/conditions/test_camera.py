"""A new condition is one class and one row: here a camera pose of three numbers for every frame of a clip."""

import json

import pytest
import torch
from media import write_barcodes
from torch import nn

from stdit import STDiTPipeline
from stdit.conditions import CONDITIONERS, Conditioner
from stdit.conditions.base import last_of_groups
from stdit.config import Config, load_typed
from stdit.data.datasets import build_dataset
from stdit.recipes import cache_latents, train

CONFIG = """
name: t
data: {root: clips, manifest: clips/manifest.jsonl, source: videos, num_frames: 9, height: 32, width: 32, workers: 0}
model: {size: S/2, depth: 2, hidden_size: 32, num_heads: 2, extra_conditions: {camera: {}}}
train: {steps: 3, batch_size: 2, lr: 1.0e-2, checkpoint_every: 3, log_every: 1, preview_every: 100, samples: 1, sample_steps: 2,
        precision: fp32}
"""
FAST = {"num_inference_steps": 2, "progress": False, "precision": "fp32", "seed": 3}


class CameraEmbedder(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(3, dim)

    def forward(self, poses):
        known = ~poses.isnan().any(-1, keepdim=True)
        return self.linear(poses.nan_to_num()) * known


class Camera(Conditioner):
    """Three numbers per frame, nan where unknown; a latent frame takes the pose of its last pixel frame."""

    name = "camera"
    keywords = ("camera",)
    module = "camera_embedder"
    clip_ndim = 2

    def embedder(self, dim):
        return CameraEmbedder(dim)

    def null(self, count):
        return torch.full((count, 1, 3), float("nan"))

    @classmethod
    def read(cls, record, clip):
        poses = record.get("camera")
        return None if poses is None else [poses[i] for i in clip.frames]

    def encode(self, values, stride):
        return self.value(last_of_groups(values, stride))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setitem(CONDITIONERS, "camera", Camera)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    rows = []
    for i in range(3):
        write_barcodes(tmp_path / "clips" / f"{i}.mp4", 12)
        rows.append({"path": f"{i}.mp4", "camera": [[frame / 12, i, -1.0] for frame in range(12)]})
    (tmp_path / "clips" / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "t.yaml").write_text(CONFIG)
    return tmp_path


def poses(frames=3, shift=0.0):
    return torch.linspace(-1, 1, frames * 3).view(1, frames, 3) + shift


def lively(pipe):
    """Random weights everywhere; a newly initialised head predicts zero for every condition."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in pipe.transformer.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return pipe


def test_a_condition_per_frame_trains_from_clips_and_from_cached_latents_alike(home):
    assert train.run(["t.yaml"]) == 0
    assert cache_latents.main(["t.yaml", "--output", "latents"]) == 0
    cached = build_dataset(load_typed(Config, "t.yaml", ["data.source=latents", "data.root=latents"]).data)
    assert all(len(cached.record(i)["conditions"]["camera"]) == 9 for i in range(len(cached)))
    assert train.run(["t.yaml", "name=cached", "data.source=latents", "data.root=latents"]) == 0
    pipe = STDiTPipeline.from_pretrained("models/t")
    fresh = STDiTPipeline.from_pretrained("models/cached")
    for model in (pipe.transformer, fresh.transformer):
        assert list(model.conditioners) == ["camera"]
    moved = pipe.transformer.camera_embedder.linear.weight.abs().max()
    assert moved > 0
    (home / "clips" / "manifest.jsonl").write_text('{"path": "0.mp4"}\n{"path": "1.mp4"}\n')
    assert train.run(["t.yaml", "name=without"]) == 1


def test_the_condition_is_dropped_by_key_guided_and_has_an_effect_in_a_task(home, capsys):
    assert train.run(["t.yaml", "train.samples=0"]) == 0
    keys = [(0, step, 0) for step in range(400)]
    dropped = Camera().dropped(keys, 0.25)
    assert 70 < sum(dropped) < 130 and dropped == Camera().dropped(keys, 0.25)

    pipe = lively(STDiTPipeline.from_pretrained("models/t"))
    plain = pipe(num_videos=1, num_frames=9, **FAST)
    told = pipe(num_videos=1, num_frames=9, camera=poses(), **FAST)
    guided = pipe(num_videos=1, num_frames=9, camera=poses(), guidance_scale=4.0, **FAST)
    assert not torch.allclose(plain, told) and not torch.allclose(told, guided)
    assert torch.equal(plain, pipe(num_videos=1, num_frames=9, guidance_scale=4.0, **FAST))  # null against null

    clip = told[:, :, :5]
    one, other = (pipe.extend(clip, after=4, camera=poses(shift=s), **FAST) for s in (0.0, 0.5))
    assert torch.equal(one[:, :, :5], clip) and not torch.allclose(one[:, :, 5:], other[:, :, 5:])
    with pytest.raises(ValueError, match="latent frames"):
        pipe.extend(clip, after=4, camera=poses(2), **FAST)


def test_each_frame_of_a_causal_stream_gets_its_own_condition(home):
    causal = ["model.causal=true", "model.position_encoding=rope", "model.window=2", "train.samples=0"]
    assert train.run(["t.yaml", *causal]) == 0
    pipe = lively(STDiTPipeline.from_pretrained("models/t"))
    fast = {key: value for key, value in FAST.items() if key != "progress"}
    clip = pipe(num_videos=1, num_frames=5, camera=poses(2), **FAST)

    def stream(camera):
        return list(pipe.stream(clip, 12, camera=camera, **fast))

    path = poses(5)
    turned = path.clone()
    turned[:, 4] += 2.0
    first, second = stream(path), stream(turned)
    assert all(torch.equal(a, b) for a, b in zip(first[:2], second[:2], strict=True))
    assert not torch.allclose(first[2], second[2])

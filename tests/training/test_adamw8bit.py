"""AdamW with moments of 8 bits (bitsandbytes)."""

import builtins
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from stdit.model.cost import moments_of
from stdit.recipes import train
from stdit.training.loop import TrainingLoop
from stdit.training.optim import build_optimizers, check_optimizer
from stdit.training.state import flatten_optimizer, load_checkpoint, restore_optimizer, save_checkpoint

# Matrices of 4096 numbers and more have moments of 8 bits, all else in float32.
CONFIG = """
name: t
data: {source: shapes, num_frames: 5, height: 32, width: 32, num_shapes: 40, workers: 0}
model: {size: S/2, depth: 1, hidden_size: 64, num_heads: 2, patch_size: [1, 2, 2]}
train: {steps: 4, decay_steps: 20, batch_size: 4, optimizer: adamw8bit, lr: 1.0e-3, ema_decay: 0.9, checkpoint_every: 2,
        log_every: 1, preview_every: 1000, samples: 0, precision: fp32, trackers: []}
"""


def test_a_missing_library_is_named_with_its_extra_before_anything_is_built(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "bitsandbytes":
            raise ImportError("No module named 'bitsandbytes'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    check_optimizer("adamw")
    with pytest.raises(ValueError, match=r"pip install 'stdit\[bitsandbytes\]', or set train.optimizer=adamw"):
        check_optimizer("adamw8bit")
    monkeypatch.chdir(tmp_path)
    Path("t.yaml").write_text(CONFIG)
    assert train.run(["t.yaml"]) == 1
    assert capsys.readouterr().err.count("\n") == 1 and not Path("checkpoints").exists()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 100), nn.GELU(), nn.Linear(100, 64), nn.Linear(64, 3))


def steps(network: nn.Module, optimizers: list, numbers: range) -> list[torch.Tensor]:
    for number in numbers:
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(number))
        network(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach().clone() for p in network.parameters()]


@pytest.fixture
def library():
    return pytest.importorskip("bitsandbytes")


def test_codes_and_scales_are_restored_to_the_bit_from_plain_tensors(library, tmp_path):
    whole, half, again = model(), model(), model()
    expected = steps(whole, build_optimizers(whole, "adamw8bit", 1e-2, 0.1), range(6))
    first = build_optimizers(half, "adamw8bit", 1e-2, 0.1)
    steps(half, first, range(3))
    tensors, numbers = flatten_optimizer(first[0])
    assert {type(value) for value in tensors.values()} == {torch.Tensor}
    save_checkpoint(tmp_path, 3, {"model": half.state_dict(), "optimizer_0": tensors}, {"optimizer": numbers})
    assert {path.suffix for path in (tmp_path / "step-3").iterdir()} == {".safetensors", ".json"}
    checkpoint = load_checkpoint(tmp_path)
    again.load_state_dict(checkpoint.tensors["model"])
    second = build_optimizers(again, "adamw8bit", 0.5)
    info = json.loads(json.dumps(checkpoint.info["optimizer"]))
    restore_optimizer(second[0], checkpoint.tensors["optimizer_0"], info)
    found, _ = flatten_optimizer(second[0])
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in tensors.items())
    assert all(torch.equal(a, b) for a, b in zip(steps(again, second, range(3, 6)), expected, strict=True))


def test_moments_of_8_bits_step_nearly_as_those_of_32_and_take_the_planned_memory(library):
    networks = {name: model() for name in ("adamw", "adamw8bit")}
    before = [p.detach().clone() for p in model().parameters()]
    optimizers = {name: build_optimizers(network, name, 1e-3) for name, network in networks.items()}
    exact, coarse = (steps(networks[name], optimizers[name], range(5)) for name in networks)
    moved = sum(float((a - b).square().sum()) for a, b in zip(exact, before, strict=True))
    apart = sum(float((a - b).square().sum()) for a, b in zip(exact, coarse, strict=True))
    assert 0 < apart < 0.05 * moved
    for name, (optimizer,) in optimizers.items():
        kept = [v for key, v in flatten_optimizer(optimizer)[0].items() if not key.endswith(("step", "qmap1", "qmap2"))]
        assert sum(value.nbytes for value in kept) == moments_of(networks[name].parameters(), name)


def test_a_run_is_resumed_to_the_bit(library, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("t.yaml").write_text(CONFIG)
    assert train.run(["t.yaml", "name=whole"]) == 0
    save = TrainingLoop.save

    def save_and_stop(self):
        save(self)
        if self.step == 2:
            raise ValueError("stopped")

    monkeypatch.setattr(TrainingLoop, "save", save_and_stop)
    assert train.run(["t.yaml", "name=halves"]) == 1
    monkeypatch.setattr(TrainingLoop, "save", save)
    assert train.run(["t.yaml", "name=halves"]) == 0
    for group in ("model", "ema", "optimizer_0"):
        whole, halves = (load_file(f"checkpoints/{name}/step-4/{group}.safetensors") for name in ("whole", "halves"))
        assert whole.keys() == halves.keys() and all(torch.equal(whole[key], halves[key]) for key in whole)
    with safe_open("checkpoints/whole/step-4/optimizer_0.safetensors", framework="pt") as file:
        kinds = {file.get_slice(key).get_dtype() for key in file.keys() if key.endswith(("state1", "state2"))}  # noqa: SIM118
    assert kinds == {"U8", "F32"}


def test_moments_of_another_optimizer_are_refused_even_if_changes_are_allowed(library, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("t.yaml").write_text(CONFIG)
    assert train.run(["t.yaml", "train.steps=2"]) == 0
    capsys.readouterr()
    for other in ("adamw", "muon"):
        assert train.run(["t.yaml", f"train.optimizer={other}", "train.allow_changes=true"]) == 1
        assert "has the moments of another optimizer (train.optimizer:" in capsys.readouterr().err

"""Sampling on a device other than the CPU mixes no devices and gives the CPU's clips (tests/other_device.py)."""

import numpy as np
import pytest
import torch
from conftest import fill
from other_device import OTHER, other_device

from stdit.model.stdit import STDiT
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.sampling.solvers import SOLVERS
from stdit.vae import TinyVAE

pytestmark = pytest.mark.filterwarnings("ignore:this model")
FAST = {"num_inference_steps": 2, "progress": False, "precision": "fp32"}


def clip(frames: int) -> torch.Tensor:
    return torch.rand(1, 3, frames, 16, 16, generator=torch.Generator().manual_seed(frames)) * 2 - 1


def mask() -> torch.Tensor:
    regenerated = torch.zeros(5, 16, 16, dtype=torch.bool)
    regenerated[:, 3:9, 2:9] = True
    return regenerated


CALLS = {
    "negative": lambda pipe, **given: pipe([1], negative_class_labels=2, **given),
    "extend": lambda pipe, **given: pipe.extend(clip(5), after=8, class_labels=1, window=9, **given),
    "connect": lambda pipe, **given: pipe.connect(clip(1)[:, :, 0], clip(5), 3, **given),
    "loop": lambda pipe, **given: pipe.loop(clip(5), 4, **given),
    "interpolate": lambda pipe, **given: pipe.interpolate(clip(3), 2, **given),
    "inpaint": lambda pipe, **given: pipe.inpaint(clip(5), mask(), **given),
    "edit": lambda pipe, **given: pipe.edit(clip(5), 0.5, class_labels=2, **given),
    "history": lambda pipe, **given: pipe.extend(clip(5), after=4, history_guidance=1.5, **given),
    "autoregressive": lambda pipe, **given: pipe([1], arrangement="autoregressive", **given),
    "pyramid": lambda pipe, **given: pipe([1], arrangement="pyramid", **given),
    **{
        f"solver {name}": lambda pipe, name=name, **given: pipe([1], solver=name, **given | {"num_inference_steps": 4})
        for name in SOLVERS
        if name != "flow_map"
    },
}


def build(objective: str = "flow", **model) -> STDiTPipeline:
    torch.manual_seed(0)
    made = fill(STDiT(depth=2, hidden_size=32, num_heads=4, in_channels=16, num_classes=3, learn_sigma=False, **model))
    vae = fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8)))
    return STDiTPipeline(made.eval(), vae, STDiTScheduler(objective, learn_sigma=False), 9, 16, 16, 8.0, objective)


def on_both(call, objective: str, **model) -> tuple[np.ndarray, np.ndarray]:
    """The result of a call on the CPU and on the other device."""
    expected = call(build(objective, **model))
    with other_device():
        moved = build(objective, **model)
        for part in (moved.transformer, moved.vae):
            part.to(OTHER)
        found = call(moved)
    return expected, found.cpu()


@pytest.mark.parametrize(("name", "objective"), [*((name, "flow") for name in CALLS), ("solver ddpm", "ddpm")])
def test_every_call_gives_the_same_clip_on_another_device(name, objective):
    expected, found = on_both(lambda pipe: CALLS[name](pipe, **FAST), objective, axes=["spatial", "temporal"])
    assert (expected - found).abs().max() < 1e-4


def test_a_flow_map_gives_the_same_clip_on_another_device():
    expected, found = on_both(lambda pipe: pipe([1], solver="flow_map", **FAST), "flow", flow_map=True)
    assert (expected - found).abs().max() < 1e-4


def test_a_stream_gives_the_same_clip_on_another_device():
    def streamed(pipe):
        return torch.cat([part.cpu() for part in pipe.stream(clip(5), 8, 1, **FAST)], 2)

    causal = {"axes": ["joint"], "causal": True, "position_encoding": "rope_3d", "window": 2}
    expected, found = on_both(streamed, "flow", **causal)
    assert (expected - found).abs().max() < 1e-4


@pytest.mark.parametrize("causal", [False, True])
def test_parts_that_wait_on_the_cpu_give_the_same_clip_on_another_device(monkeypatch, causal):
    """diffusers' enable_model_cpu_offload: a part is on the device while it runs, and all are on the CPU after a call."""
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.empty_device_cache", lambda kind: None)
    model = {"axes": ["joint"], "causal": True, "position_encoding": "rope_3d", "window": 2} if causal else {}
    expected = [call(build("flow", **model)) for call in (_extended, _streamed)[: 1 + causal]]
    with other_device():
        pipe, places = build("flow", **model), []
        pipe.enable_model_cpu_offload(device=OTHER.type)
        for part in (pipe.transformer, pipe.vae):
            before = part._hf_hook.pre_forward

            def placed(module, *args, before=before, **kwargs):
                found = before(module, *args, **kwargs)
                places.append((type(module).__name__, next(module.parameters()).device.type))
                return found

            part._hf_hook.pre_forward = placed
        for call, clips in zip((_extended, _streamed), expected, strict=False):
            assert (call(pipe).cpu() - clips).abs().max() < 1e-4
            assert {next(part.parameters()).device.type for part in (pipe.transformer, pipe.vae)} == {"cpu"}
    assert set(places) == {("STDiT", OTHER.type), ("TinyVAE", OTHER.type)}


def _extended(pipe):
    return pipe.extend(clip(5), after=4, class_labels=1, **FAST)


def _streamed(pipe):
    return torch.cat([part.cpu() for part in pipe.stream(clip(5), 8, 1, **FAST)], 2)

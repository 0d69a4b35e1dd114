"""Attention that is masked by frames multiplies what is seen, and no more, and equals attention with a mask of all tokens."""

import math

import numpy as np
import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch.nn.attention.flex_attention import create_block_mask

from stdit.model.cost import forward_cost, frame_growth
from stdit.model.stdit import STDiT
from stdit.nn import frame_mask
from stdit.nn.config import BlockConfig
from stdit.nn.context import visible_frames
from stdit.nn.layout import DenseLayout, TeacherForcingLayout
from stdit.training.compiled import compile_blocks

SMALL = {"depth": 2, "hidden_size": 32, "num_heads": 2, "in_channels": 4, "num_classes": 2, "sample_size": (6, 8, 8)}
ROPE = {"causal": True, "position_encoding": "rope_3d"}
CASES = {
    "causal": (ROPE, {}),
    "window": ({**ROPE, "window": 2}, {}),
    "window and sink": ({**ROPE, "window": 2, "sink": 1}, {}),
    "factorized": ({**ROPE, "window": 3, "axes": ["spatial", "temporal"]}, {}),
    "teacher forcing": (ROPE, {"history": True}),
    "teacher forcing, window and sink": ({**ROPE, "window": 2, "sink": 1}, {"history": True}),
    "a label among the patches": ({**ROPE, "window": 2, "conditioning": "in_context"}, {}),
}


def made(**settings):
    torch.manual_seed(0)
    model = STDiT(**{**SMALL, "learn_sigma": False, **settings})
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def inputs(history=False):
    torch.manual_seed(1)
    x = torch.randn(2, 4, 6, 8, 8)
    found = {"hidden_states": x, "timestep": 1000 * torch.rand(2, 6), "class_labels": torch.tensor([0, 1])}
    if history:
        found["history"] = (torch.randn_like(x), 1000 * torch.rand(2, 6))
    return found


def run(model, given):
    model.zero_grad()
    output = model(**given)
    output.square().mean().backward()
    return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(found, expected):
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("least", [1, 40])
def test_chunks_have_the_outputs_and_gradients_of_a_mask_of_all_tokens(case, least, monkeypatch):
    settings, how = CASES[case]
    model, given = made(**settings), inputs(**how)
    monkeypatch.setattr(frame_mask, "LEAST_QUERIES", 10**9)  # one chunk: the dense mask
    output, gradients = run(model, given)
    monkeypatch.setattr(frame_mask, "LEAST_QUERIES", least)
    chunked, others = run(model, given)
    assert apart(chunked, output) < 1e-5
    assert max(apart(others[name], gradients[name]) for name in gradients) < 1e-4


@pytest.mark.parametrize("case", ["causal", "window and sink", "teacher forcing, window and sink", "factorized"])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_has_the_outputs_of_chunks(case):
    settings, how = CASES[case]  # torch has no gradients of flex attention on CPUs
    model, given = made(**settings), inputs(**how)
    with torch.no_grad(), attention_backend("native"):  # the backend of a model is also that of others: restored here
        expected = model(**given)
        model.set_attention_backend("flex")
        assert apart(model(**given), expected) < 1e-5


@pytest.mark.parametrize("case", ["causal", "window and sink", "teacher forcing, window and sink"])
def test_chunks_compile_as_one_graph_with_equal_gradients(case, monkeypatch):
    monkeypatch.setattr(frame_mask, "LEAST_QUERIES", 1)
    settings, how = CASES[case]
    model, given = made(**settings), inputs(**how)
    output, gradients = run(model, given)
    torch._dynamo.reset()
    compile_blocks(model, backend="aot_eager")
    compiled, others = run(model, given)
    assert apart(compiled, output) < 1e-5
    assert max(apart(others[name], gradients[name]) for name in gradients) < 1e-4


def test_flex_attention_compiles_in_one_graph():
    model, given = made(**CASES["window and sink"][0]), inputs()
    with torch.no_grad(), attention_backend("native"):
        model.set_attention_backend("flex")
        expected = model(**given)
        torch._dynamo.reset()
        compile_blocks(model, backend="aot_eager")
        assert apart(model(**given), expected) < 1e-5


def seen(layout, **settings):
    config = BlockConfig(32, 2, causal=True, **settings)
    positions = layout.positions("joint")
    return visible_frames(config, "joint", positions, positions, noisy=layout.is_noisy_copy("joint"))


@pytest.mark.parametrize(
    "found",
    [
        seen(DenseLayout((12, 5, 7)), window=3, sink=1),
        seen(DenseLayout((8, 16, 16))),
        seen(TeacherForcingLayout((12, 9, 9)), window=2),
        seen(DenseLayout((40, 4, 4)), window=8),
    ],
    ids=["window and sink", "causal", "teacher forcing", "small frames"],
)
def test_block_masks_are_torchs_own_and_are_kept(found):
    mask = found.block_mask(torch.device("cpu"))
    lengths = int(found.queries.sum()), int(found.keys.sum())
    expected = create_block_mask(mask.mask_mod, None, None, *lengths, device="cpu")
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, columns = (getattr(mask, f"{kind}_{part}") for part in ("num_blocks", "indices"))
        assert torch.equal(counts, getattr(expected, f"{kind}_num_blocks"))
        for row, count in enumerate(counts[0, 0].tolist()):
            assert torch.equal(columns[0, 0, row, :count], getattr(expected, f"{kind}_indices")[0, 0, row, :count])
    again = found._replace(sees=found.sees.copy())
    assert again.block_mask(torch.device("cpu")) is mask


def test_operations_of_a_windowed_model_grow_with_the_frames_and_those_of_a_plan_are_counted_alike():
    model = {
        "depth": 1,
        "hidden_size": 64,
        "num_heads": 2,
        "causal": True,
        "position_encoding": "rope",
        "num_classes": 2,
    }
    windowed = [forward_cost({**model, "window": 4}, (t, 32, 32)).flops["attention joint"] for t in (8, 128)]
    dense = [forward_cost({**model, "causal": False}, (t, 32, 32)).flops["attention joint"] for t in (8, 128)]
    assert math.log(windowed[1] / windowed[0], 16) < 1.1
    assert math.log(dense[1] / dense[0], 16) > 1.6
    for frames in (8, 16):
        growth = frame_growth(64, (frames, 16, 16))
        for name, settings in {"joint": {"causal": False}, "causal": {}, "window of 4": {"window": 4}}.items():
            cost = forward_cost({**model, **settings}, (frames, 32, 32)).flops
            assert cost["attention joint"] + cost["mlp"] == pytest.approx(growth[name], rel=1e-6)


def test_tables_of_a_long_clip_are_small():
    found = seen(DenseLayout((33, 45, 80)), window=4)  # 129 frames of 720p: a mask of all tokens takes 14 GB
    assert found.sees.nbytes == 33 * 33
    assert sum(chunk.mask.numel() for chunk in found.chunks() if chunk.mask is not None) == 0
    assert found.products() == pytest.approx(3600**2 * sum(min(t + 1, 4) for t in range(33)))
    assert np.all(found.queries == 3600)

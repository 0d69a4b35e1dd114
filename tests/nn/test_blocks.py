import pytest
import torch
from conftest import fill

from stdit.nn.blocks import STDiTBlock
from stdit.nn.layout import AXES
from stdit.nn.modulation import Condition


@pytest.mark.parametrize("axis", AXES)
def test_a_block_whose_gates_are_zero_is_the_identity(axis):
    block = STDiTBlock(32, 4, axis)
    torch.nn.init.zeros_(block.adaLN_modulation[-1].weight)
    torch.nn.init.zeros_(block.adaLN_modulation[-1].bias)
    x, condition = torch.randn(2, 3, 16, 32), Condition(torch.randn(2, 3, 1, 32))
    assert torch.equal(block(x, condition), x)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_an_image_is_a_one_frame_video(qk_norm):
    joint, spatial = fill(STDiTBlock(32, 4, "joint", qk_norm=qk_norm)), STDiTBlock(32, 4, "spatial", qk_norm=qk_norm)
    spatial.load_state_dict(joint.state_dict())
    x, condition = torch.randn(2, 1, 16, 32), Condition(torch.randn(2, 1, 1, 32))
    assert torch.equal(joint(x, condition), spatial(x, condition))


def test_spatial_attention_keeps_frames_apart_and_temporal_attention_keeps_places_apart():
    x, condition = torch.randn(1, 4, 6, 32), Condition(torch.randn(1, 1, 1, 32))
    changed = x.clone()
    changed[0, 2, 3] = torch.randn(32)
    moved = {
        axis: (fill(block := STDiTBlock(32, 4, axis), 0.2)(x, condition) - block(changed, condition)).abs().sum(-1)[0]
        > 1e-6
        for axis in AXES
    }
    assert moved["joint"].all()
    assert moved["spatial"].any(1).tolist() == [False, False, True, False]
    assert moved["temporal"].any(0).tolist() == [False, False, False, True, False, False]


def test_the_order_of_frames_matters_to_temporal_attention():
    block = fill(STDiTBlock(32, 4, "temporal"), 0.2)
    x, condition = torch.randn(1, 4, 2, 32), Condition(torch.randn(1, 1, 1, 32))
    assert (block(x, condition).flip(1) - block(x.flip(1), condition)).abs().max() > 1e-3

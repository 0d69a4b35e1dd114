import pytest
import torch
from conftest import context, fill

from stdit.nn.blocks import STDiTBlock
from stdit.nn.config import BlockConfig
from stdit.nn.layout import AXES

CONFIG = BlockConfig(32, 4)


@pytest.mark.parametrize("axis", AXES)
def test_a_block_whose_gates_are_zero_is_the_identity(axis):
    block = STDiTBlock(CONFIG, axis)
    torch.nn.init.zeros_(block.adaLN_modulation[-1].weight)
    torch.nn.init.zeros_(block.adaLN_modulation[-1].bias)
    x, vector = torch.randn(2, 3, 16, 32), torch.randn(2, 3, 1, 32)
    assert torch.equal(block(x, context(x, vector, block)), x)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_an_image_is_a_one_frame_video(qk_norm):
    config = BlockConfig(32, 4, qk_norm=qk_norm)
    joint, spatial = fill(STDiTBlock(config, "joint")), STDiTBlock(config, "spatial")
    spatial.load_state_dict(joint.state_dict())
    x, vector = torch.randn(2, 1, 16, 32), torch.randn(2, 1, 1, 32)
    ctx = context(x, vector, joint, spatial)
    assert torch.equal(joint(x, ctx), spatial(x, ctx))


def test_spatial_attention_separates_frames_and_temporal_attention_separates_patches():
    x, vector = torch.randn(1, 4, 6, 32), torch.randn(1, 1, 1, 32)
    changed = x.clone()
    changed[0, 2, 3] = torch.randn(32)
    moved = {}
    for axis in AXES:
        block = fill(STDiTBlock(CONFIG, axis), 0.2)
        ctx = context(x, vector, block)
        moved[axis] = (block(x, ctx) - block(changed, ctx)).abs().sum(-1)[0] > 1e-6
    assert moved["joint"].all()
    assert moved["spatial"].any(1).tolist() == [False, False, True, False]
    assert moved["temporal"].any(0).tolist() == [False, False, False, True, False, False]


def test_the_order_of_frames_matters_to_temporal_attention():
    block = fill(STDiTBlock(CONFIG, "temporal"), 0.2)
    x, vector = torch.randn(1, 4, 2, 32), torch.randn(1, 1, 1, 32)
    ctx = context(x, vector, block)
    assert (block(x, ctx).flip(1) - block(x.flip(1), ctx)).abs().max() > 1e-3

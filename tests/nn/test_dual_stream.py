"""Our dual-stream and single-stream blocks against diffusers' blocks of SD3 and FLUX, with the same weights."""

import pytest
import torch
from conftest import context, fill
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

from stdit.model.stdit import STDiT
from stdit.model.trunks import TrunkContext
from stdit.nn.checkpointing import CHECKPOINTING
from stdit.nn.config import BlockConfig
from stdit.nn.dual_stream import DualStreamBlock, SingleStreamBlock
from stdit.nn.layout import DenseLayout


def together(state: dict, *names: str) -> dict:
    return {kind: torch.cat([state[f"{name}.{kind}"] for name in names]) for kind in ("weight", "bias")}


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_dual_block_on_one_frame_equals_sd3s(qk_norm):
    theirs = fill(JointTransformerBlock(32, 4, 8, qk_norm="rms_norm" if qk_norm else None), 0.2).eval()
    state, ours = theirs.state_dict(), DualStreamBlock(BlockConfig(32, 4, qk_norm=qk_norm))
    moved = {
        "adaLN_modulation.1": "norm1.linear", "text_adaLN.1": "norm1_context.linear", "attn.proj": "attn.to_out.0",
        "attn.text_proj": "attn.to_add_out", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2",
        "text_mlp.fc1": "ff_context.net.0.proj", "text_mlp.fc2": "ff_context.net.2",
    }  # fmt: skip
    weights = {f"{a}.{k}": state[f"{b}.{k}"] for a, b in moved.items() for k in ("weight", "bias")}
    for name, parts in (
        ("attn.qkv", ("to_q", "to_k", "to_v")),
        ("attn.text_qkv", ("add_q_proj", "add_k_proj", "add_v_proj")),
    ):
        weights |= {f"{name}.{k}": v for k, v in together(state, *(f"attn.{p}" for p in parts)).items()}
    if qk_norm:
        norms = {"q_norm": "norm_q", "k_norm": "norm_k", "text_q_norm": "norm_added_q", "text_k_norm": "norm_added_k"}
        weights |= {f"attn.{a}.weight": state[f"attn.{b}.weight"] for a, b in norms.items()}
    ours.load_state_dict(weights)
    x, text, vector = torch.randn(2, 9, 32), torch.randn(2, 5, 32), torch.randn(2, 32)
    their_text, their_x = theirs(x, text, vector)
    our_x, our_text = ours(x[:, None], text, context(x[:, None], vector[:, None, None], ours))
    torch.testing.assert_close(our_x[:, 0], their_x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_text, their_text, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_single_block_on_one_frame_equals_fluxs():
    theirs = fill(FluxSingleTransformerBlock(32, 4, 8), 0.2).eval()
    state, ours = theirs.state_dict(), SingleStreamBlock(BlockConfig(32, 4, qk_norm=True))
    moved = {"adaLN_modulation.1": "norm.linear", "proj_mlp": "proj_mlp", "proj_out": "proj_out"}
    weights = {f"{a}.{k}": state[f"{b}.{k}"] for a, b in moved.items() for k in ("weight", "bias")}
    weights |= {f"attn.qkv.{k}": v for k, v in together(state, "attn.to_q", "attn.to_k", "attn.to_v").items()}
    weights |= {f"attn.{a}.weight": state[f"attn.{b}.weight"] for a, b in (("q_norm", "norm_q"), ("k_norm", "norm_k"))}
    ours.load_state_dict(weights)
    x, text, vector = torch.randn(2, 9, 32), torch.randn(2, 5, 32), torch.randn(2, 32)
    their_text, their_x = theirs(x, text, vector)
    our_x, our_text = ours(x[:, None], text, context(x[:, None], vector[:, None, None], ours))
    torch.testing.assert_close(our_x[:, 0], their_x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_text, their_text, atol=1e-5, rtol=1e-5)


def model(**changes) -> STDiT:
    torch.manual_seed(0)
    size = {
        "depth": 4,
        "hidden_size": 32,
        "num_heads": 4,
        "in_channels": 4,
        "caption_channels": 12,
        "num_single_blocks": 2,
    }
    return STDiT(**{**size, "trunk": "dual_stream", "learn_sigma": False, **changes})


def case(frames=3):
    mask = torch.arange(6) < torch.tensor([[4], [6]])
    return (torch.randn(2, 4, frames, 8, 8), torch.tensor([100.0, 700.0])), {"captions": torch.randn(2, 6, 12), "caption_mask": mask}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("entry", ["sincos", "rope_3d"])
def test_frames_captions_and_levels_have_an_effect_and_padding_has_none(entry):
    video, ((x, t), words) = fill(model(position_encoding=entry, qk_norm=True), 0.1).eval(), case()
    out = video(x, t, **words)
    still = x[:, :, :1].expand_as(x)
    assert not torch.allclose(
        *video(still, t, **words)[:, :, :2].unbind(2)
    )  # equal frames at different positions differ
    changed = {**words, "captions": words["captions"].clone()}
    changed["captions"][0, 4:] += 5
    torch.testing.assert_close(video(x, t, **changed), out, atol=1e-5, rtol=1e-5)
    changed["captions"][0, 3] += 5
    assert not torch.allclose(video(x, t, **changed)[0], out[0])
    assert not torch.allclose(video(x, t[:, None] + torch.tensor([[0.0, 0.0, 90.0]]), **words), out)


@torch.no_grad()
def test_fresh_blocks_are_the_identity_and_captions_reach_them_in_training():
    fresh, ((x, t), words) = model(), case()
    condition = fresh.condition(t, fresh.gather_conditions(2, **words), 2)
    video, text = torch.randn(2, 3, 16, 32), torch.randn(2, 6, 32)
    ctx = TrunkContext(fresh.blocks, None, fresh.trunk_config.block, condition, DenseLayout((3, 4, 4))).of()
    for block in fresh.blocks:
        made, said = block(video, text, ctx)
        assert torch.equal(made, video) and torch.equal(said, text)
    assert fresh(x, t, **words).abs().max() == 0


def test_gradient_checkpointing_changes_no_gradient():
    (x, t), words = case()
    gradients = []
    for checkpointing in (False, True, "selective"):
        network = fill(model(), 0.1)
        if checkpointing:
            network.enable_gradient_checkpointing(CHECKPOINTING[checkpointing])
        network(x, t, **words).square().mean().backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    plain, full, selective = gradients
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, full, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(full, selective, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_channels": None}, "name a text encoder"),
        ({"num_single_blocks": 5}, "use 0 to 4"),
        ({"axes": ["spatial", "temporal"]}, r"axes=\[joint\]"),
        ({"conditioning": "adaln_single"}, "conditioning=adaln_zero"),
        ({"trunk": "stack"}, "belongs to trunk='dual_stream'"),
    ],
)
def test_invalid_dual_streams_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        model(**changes)

import pytest
import torch
from conftest import context, fill

from stdit.model.config import size_arguments
from stdit.model.cost import forward_cost
from stdit.model.stdit import STDiT
from stdit.model.trunks import TrunkContext
from stdit.nn.cache import FrameCache
from stdit.nn.conditioning import CONDITIONINGS
from stdit.nn.layout import DenseLayout

# "Scalable Diffusion Models with Transformers": Gflops in figure 5 and parameters, XL/2 at 256 px
PAPER = {
    "adaln_zero": (118.64, 675),
    "adaln": (118.56, 600),
    "cross_attention": (137.62, 598),
    "in_context": (119.37, 449),
}


def model(**changes) -> STDiT:
    arguments = {"depth": 2, "hidden_size": 32, "num_heads": 4, "in_channels": 4, "num_classes": 5, **changes}
    torch.manual_seed(0)
    return fill(STDiT(**arguments), 0.1).eval()


def inputs(frames=3, batch=2):
    return torch.randn(batch, 4, frames, 8, 8), torch.tensor([100.0, 700.0])[:batch], torch.tensor([1, 4])[:batch]


def captions(batch=2):
    words, mask = torch.randn(batch, 6, 12), torch.ones(batch, 6, dtype=torch.bool)
    mask[0, 4:] = False
    return {"captions": words, "caption_mask": mask}


@pytest.mark.parametrize("conditioning", PAPER)
def test_gflops_and_parameters_equal_the_papers_for_every_conditioning(conditioning):
    image = {"num_classes": 1000, "in_channels": 4, "axes": ["spatial"], "conditioning": conditioning}
    cost = forward_cost({**size_arguments("XL/2"), **image}, (1, 32, 32))
    gflops, millions = PAPER[conditioning]
    assert cost.total / 1e9 == pytest.approx(gflops, rel=0.01)
    assert (cost.parameters + cost.table) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("worded", [False, True], ids=["labels", "captions"])
@torch.no_grad()
def test_one_frame_of_a_video_model_is_an_image(conditioning, worded):
    changes = {"conditioning": conditioning, "caption_channels": 12 if worded else None}
    words = captions() if worded else {}
    joint, spatial = model(axes=["joint"], **changes), model(axes=["spatial"], **changes)
    x, t, labels = inputs(frames=1)
    assert torch.equal(joint(x, t, labels, **words), spatial(x, t, labels, **words))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@torch.no_grad()
def test_a_condition_of_the_clip_equals_the_same_condition_for_every_frame(conditioning):
    told = model(conditioning=conditioning, caption_channels=12, axes=["spatial", "temporal"])
    (x, t, labels), words = inputs(), captions()
    each = {name: value[:, None].expand(-1, 3, *value.shape[1:]) for name, value in words.items()}
    once = told(x, t, labels, **words)
    often = told(x, t[:, None].expand(2, 3), labels[:, None].expand(2, 3), **each)
    torch.testing.assert_close(once, often, atol=1e-5, rtol=1e-5)
    other = {"captions": each["captions"].clone(), "caption_mask": each["caption_mask"]}
    other["captions"][:, 2] += 1
    assert not torch.allclose(once, told(x, t, labels, **other))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@torch.no_grad()
def test_every_condition_has_an_effect_and_padding_has_none(conditioning):
    told = model(conditioning=conditioning, caption_channels=12)
    (x, t, labels), words = inputs(), captions()
    out = told(x, t, labels, **words)
    assert not torch.allclose(out, told(x, t + 50, labels, **words))
    assert not torch.allclose(out, told(x, t, labels.flip(0), **words))
    padded, spoken = words["captions"].clone(), words["captions"].clone()
    padded[0, 4:] += 5
    spoken[0, 3] += 5
    torch.testing.assert_close(told(x, t, labels, captions=padded, caption_mask=words["caption_mask"]), out)
    heard = told(x, t, labels, captions=spoken, caption_mask=words["caption_mask"])
    assert not torch.allclose(heard[0], out[0]) and torch.allclose(heard[1], out[1])


@torch.no_grad()
def test_time_dependent_attention_equals_diffits_equations():
    told = fill(STDiT(1, 32, 4, in_channels=4, num_classes=5, conditioning="time_attention", axes=["spatial"]), 0.2)
    block, attn = told.blocks[0], told.blocks[0].attn
    x, vector = torch.randn(2, 1, 9, 32), torch.randn(2, 1, 1, 32)
    y = torch.nn.functional.layer_norm(x[:, 0], (32,), block.norm1.weight, block.norm1.bias)
    qkv = y @ attn.qkv.weight.T + attn.qkv.bias + vector[:, 0] @ attn.qkv_time.weight.T  # q, k, v of TMSA
    q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in qkv.chunk(3, -1))
    seen = ((q @ k.transpose(-1, -2)) / 8**0.5).softmax(-1) @ v  # TMSA itself, without its bias
    hidden = x[:, 0] + attn.proj(seen.transpose(1, 2).flatten(2))  # the block
    hidden = hidden + block.mlp(torch.nn.functional.layer_norm(hidden, (32,), block.norm2.weight, block.norm2.bias))
    torch.testing.assert_close(block(x, context(x, vector, block))[:, 0], hidden, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("conditioning", ["adaln_zero", "adaln_single", "adaln_lora"])
@pytest.mark.parametrize("worded", [False, True], ids=["labels", "captions"])
@torch.no_grad()
def test_a_gated_block_is_the_identity_when_fresh(conditioning, worded):
    fresh = STDiT(
        2, 32, 4, in_channels=4, num_classes=5, conditioning=conditioning, caption_channels=12 if worded else None
    )
    _x, t, labels = inputs()
    condition = fresh.condition(t, fresh.gather_conditions(2, class_labels=labels, **(captions() if worded else {})), 2)
    tokens = torch.randn(2, 3, 16, 32)
    ctx = TrunkContext(fresh.blocks, None, fresh.trunk_config.block, condition, DenseLayout((3, 4, 4)))
    assert all(torch.equal(block(tokens, ctx.of()), tokens) for block in fresh.blocks)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@torch.no_grad()
def test_first_block_caching_works_with_every_conditioning(conditioning):
    told = model(conditioning=conditioning, causal=True, window=2, position_encoding="rope")
    (x, t, labels), cache, parts = inputs(), FrameCache(2), []
    cache.writing = True
    for i in range(3):
        parts.append(told(x[:, :, i : i + 1], t[:, None], labels, cache=cache))
    torch.testing.assert_close(torch.cat(parts, 2), told(x, t, labels), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("conditioning", ["adaln", "adaln_single", "adaln_lora"])
@torch.no_grad()
def test_packed_clips_give_the_output_of_each_clip_alone(conditioning):
    told = model(conditioning=conditioning)
    clips, labels = [torch.randn(4, 2, 4, 4), torch.randn(4, 1, 8, 4)], torch.tensor([1, 2])
    steps = [torch.tensor([100.0, 300.0]), torch.tensor([50.0])]
    packed = told(clips, steps, labels)
    for i in range(2):
        alone = told(clips[i][None], steps[i][None], labels[i : i + 1])[0]
        torch.testing.assert_close(packed[i], alone, atol=1e-5, rtol=1e-5)


def test_invalid_combinations_are_refused():
    x, t, labels = inputs()
    with pytest.raises(ValueError, match="Did you mean 'adaln_zero'"):
        model(conditioning="adaln_zeros")
    with pytest.raises(ValueError, match="causal model's cache"):
        model(conditioning="in_context", caption_channels=12, causal=True, position_encoding="rope")
    with pytest.raises(ValueError, match="takes no 'captions'"):
        model()(x, t, labels, **captions())
    with pytest.raises(ValueError, match="needs `captions`"):
        model(caption_channels=12)(x, t, labels)
    with pytest.raises(ValueError, match=r"objective\.mask_probs\.region=0"):
        model(conditioning="in_context")(x, torch.rand(2, 3, 16), labels)
    with pytest.raises(ValueError, match="batches of one shape"):
        model(conditioning="cross_attention")([x[0]], [t[0]], labels[:1])

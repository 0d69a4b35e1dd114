"""Every conditioning and trunk: the initialisation that its paper states, an image as one frame, and learning."""

import pytest
import torch
from conftest import fill

from stdit.data.config import DataConfig
from stdit.data.datasets import MovingShapes
from stdit.diffusion.objective import ObjectiveConfig, build_objective
from stdit.model.stdit import STDiT
from stdit.model.unet import UNet
from stdit.rng import keyed_rng
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.text import HashedWordEncoder
from stdit.training.optim import build_optimizers
from stdit.training.step import LatentBatch, diffusion_losses
from stdit.vae import load_vae

UVIT = {"trunk": "long_skip", "depth": 3, "conditioning": "in_context", "learned_pos_embed": True, "timestep_mlp": False,
        "activation": "gelu", "output_conv": True}  # fmt: skip
VARIANTS = {
    "adaLN-Zero": {},
    "adaLN": {"conditioning": "adaln"},
    "adaLN-single": {"conditioning": "adaln_single"},
    "adaLN-LoRA": {"conditioning": "adaln_lora"},
    "cross-attention": {"conditioning": "cross_attention"},
    "in-context": {"conditioning": "in_context"},
    "factorized": {"axes": ["spatial", "temporal"]},
    "captions": {"conditioning": "adaln_single", "caption_channels": 64, "num_classes": 0},
    "U-ViT": UVIT,
    "MDT v2": {
        "trunk": "masked",
        "depth": 3,
        "num_decoder_blocks": 1,
        "learned_pos_embed": True,
        "relative_position_bias": True,
    },
    "DiffiT": {"conditioning": "time_attention", "relative_position_bias": True},
    "DiffiT's U": {"conditioning": "time_attention", "trunk": "u_shape", "depth": 3, "relative_position_bias": True},
    "MMDiT": {"trunk": "dual_stream", "caption_channels": 64, "qk_norm": True},
    "FLUX": {
        "trunk": "dual_stream",
        "num_single_blocks": 1,
        "caption_channels": 64,
        "qk_norm": True,
        "position_encoding": "rope_3d",
    },
    "U-Net": {"network": "unet", "channels": (16, 32)},
}
# In their papers gates are zero at first. The others are initialised like plain transformers (or convolutions).
IDENTITY = {"adaLN-Zero", "adaLN-single", "adaLN-LoRA", "factorized", "captions", "MMDiT", "FLUX"}


def build(name: str, **changes):
    arguments = {"in_channels": 16, "num_classes": 12, "learn_sigma": False, **VARIANTS[name], **changes}
    torch.manual_seed(0)
    if arguments.pop("network", None):
        arguments.pop("axes", None)
        return UNet(**{"sample_size": (2, 4, 4), **arguments})
    return STDiT(**{"depth": 2, "hidden_size": 48, "num_heads": 4, "sample_size": (2, 4, 4), **arguments})


@pytest.fixture(scope="module")
def shapes():
    """48 moving shapes of 5 frames as latents (48, 16, 2, 4, 4), their labels, their captions as tokens."""
    data, vae = (
        MovingShapes(DataConfig(source="shapes", num_frames=5, height=32, width=32, num_shapes=48)),
        load_vae("tiny"),
    )
    pixels = torch.stack([data.load(i, keyed_rng("sample", 0, i))["pixels"] for i in range(48)])
    with torch.no_grad():
        latents = vae.encode(pixels.permute(0, 4, 1, 2, 3).float() / 127.5 - 1)
    words = HashedWordEncoder().encode([data.record(i)["caption"] for i in range(48)])
    return vae, latents, torch.tensor([data.label(i) for i in range(48)]), words


def conditions_of(model, labels, words, rows=slice(None)):
    values = {"label": (labels[rows],), "caption": (words[0][rows], words[1][rows])}
    return {name: conditioner.value(*values[name]) for name, conditioner in model.conditioners.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_initialised_as_its_paper_says(name, shapes):
    if name == "U-Net":
        pytest.skip("it has no blocks of a residual stream to pass through")
    _, latents, labels, words = shapes
    model, prompt = build(name), conditions_of(build(name), labels, words, slice(2))
    passed = []
    for block in model.blocks:
        block.register_forward_hook(
            lambda _, given, made: passed.append((given[0], made[0] if isinstance(made, tuple) else made))
        )
    out = model(latents[:2], torch.tensor([100.0, 900.0]), conditions=prompt)
    assert out.isfinite().all()
    unmoved = all(torch.equal(a, b) for a, b in passed)
    assert unmoved == (name in IDENTITY)


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_one_frame_of_a_variant_is_an_image(name, shapes):
    _, latents, labels, words = shapes
    if name == "U-Net":
        video, image = build(name), build(name, sample_size=(1, 4, 4))
        prompt = conditions_of(image, labels, words, slice(2))
        t = torch.tensor([100.0, 900.0])
        assert (
            video(latents[:2, :, :1], t, conditions=prompt).shape
            == image(latents[:2, :, :1], t, conditions=prompt).shape
        )
        return
    model = fill(build(name), 0.1).eval()
    prompt, t = conditions_of(model, labels, words, slice(2)), torch.tensor([100.0, 900.0])
    one = model(latents[:2, :, :1], t, conditions=prompt)
    # Neither axes nor temporal position encodings have an effect on a single frame.
    how = {"MMDiT": "rope", "FLUX": "sincos+rope_3d", "factorized": "rope"}
    other = build(name, **({"position_encoding": how[name]} if name in how else {"axes": ["spatial"]}))
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.eval()(latents[:2, :, :1], t, conditions=prompt), one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_learns_moving_shapes_in_200_steps_and_samples(name, shapes):
    vae, latents, labels, words = shapes
    model, masked = build(name), name == "MDT v2"
    objective = build_objective(ObjectiveConfig(shift=2.0, mask_ratio=0.3 if masked else 0.0))
    optimizers, losses = build_optimizers(model, "adamw", 2e-3), []
    for step in range(200):
        rows = torch.from_numpy(keyed_rng("order", 0, step).permutation(48)[:8])
        keys = [(0, step, slot) for slot in range(8)]
        batch = (LatentBatch(latents[rows]), conditions_of(model, labels, words, rows))
        loss = diffusion_losses(model, objective, [batch[0]], batch[1], keys, patch=model.patch_size).clips.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    first, last = sum(losses[:20]) / 20, sum(losses[-20:]) / 20
    assert last < 0.9 * first, (first, last)
    spoken = model.config.caption_channels is not None
    pipe = STDiTPipeline(
        model.eval(), vae, STDiTScheduler("flow", 2.0), 5, 32, 32, text_encoder="words" if spoken else None
    )
    said = {"captions": "a red circle moves left"} if spoken else {}
    clips = pipe([0, 1] if model.num_classes else None, num_videos=2, num_inference_steps=4, progress=False, **said)
    assert clips.shape == (2, 3, 5, 32, 32) and clips.isfinite().all() and float(clips.std()) > 0.05

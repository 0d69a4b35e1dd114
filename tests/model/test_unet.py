import pytest
import torch
from conftest import fill

from stdit.config import Config, load_typed
from stdit.diffusion.objective import ObjectiveConfig, build_objective
from stdit.diffusion.paths import DDPMPath
from stdit.model.unet import UNet
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.vae import TinyVAE


def unet(frames=3, **changes) -> UNet:
    torch.manual_seed(0)
    arguments = {"in_channels": 4, "num_classes": 5, "sample_size": (frames, 8, 8), "channels": (8, 16), **changes}
    return fill(UNet(**arguments), 0.02).eval()


@pytest.mark.parametrize("frames", [1, 3])
@torch.no_grad()
def test_the_unet_has_a_transformers_inputs_and_labels_and_levels_have_an_effect(frames):
    net, x = unet(frames), torch.randn(2, 4, frames, 8, 8)
    t, labels = torch.tensor([100.0, 700.0]), torch.tensor([1, 4])
    out = net(x, t, labels)
    assert out.shape == x.shape
    torch.testing.assert_close(net(x, t[:, None].expand(2, frames), labels), out)
    assert not torch.allclose(net(x, t + 200, labels), out, atol=1e-6)
    assert not torch.allclose(net(x, t, labels.flip(0)), out, atol=1e-6)
    torch.testing.assert_close(net(x, t), net(x, t, torch.tensor([5, 5])))


def test_its_gradients_are_finite_in_the_precision_cpus_train_in():
    net = unet(2, in_channels=16, channels=(32, 64))
    with torch.autocast("cpu", torch.bfloat16):
        out = net(torch.randn(32, 16, 2, 8, 8), torch.rand(32) * 1000, torch.randint(0, 5, (32,)))
    out.float().square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is not None and not p.grad.isfinite().all()] == []


@torch.no_grad()
def test_captions_have_an_effect_and_their_padding_has_none():
    net, x, t = unet(caption_channels=12), torch.randn(2, 4, 3, 8, 8), torch.tensor([100.0, 700.0])
    words, mask = torch.randn(2, 6, 12), torch.arange(6) < torch.tensor([[4], [6]])
    out = net(x, t, captions=words, caption_mask=mask)
    padded = words.clone()
    padded[0, 4:] += 5
    torch.testing.assert_close(net(x, t, captions=padded, caption_mask=mask), out)
    assert not torch.allclose(net(x, t, captions=words + 1, caption_mask=mask), out, atol=1e-6)


@torch.no_grad()
def test_a_pipeline_samples_with_a_unet_and_saves_it(tmp_path):
    vae = fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8)))
    scheduler = STDiTScheduler("ddpm", betas="scaled_linear", learn_sigma=False, solver="ddim")
    pipe = STDiTPipeline(unet(2, in_channels=16), vae, scheduler, 5, 32, 32, objective="ddpm")
    clips = pipe([1, 2], num_inference_steps=2, progress=False)
    assert clips.shape == (2, 3, 5, 32, 32)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(STDiTPipeline.from_pretrained(tmp_path)([1, 2], num_inference_steps=2, progress=False), clips)
    with (
        pytest.raises(ValueError, match="one noise level for all frames"),
        pytest.warns(UserWarning, match="but never with known frames"),
    ):
        pipe.animate(torch.zeros(1, 3, 32, 32), 5, [1], num_inference_steps=2, progress=False)


def test_stable_diffusions_betas_are_evenly_spaced_in_their_roots():
    bar = DDPMPath("scaled_linear").alpha_bar
    betas = 1 - bar[1:] / bar[:-1]
    assert betas[0] == pytest.approx(0.00085) and betas[-1] == pytest.approx(0.012)
    roots = betas.sqrt().diff()
    assert (roots - roots.mean()).abs().max() < 1e-9
    assert float(DDPMPath().alpha_bar[-1]) == pytest.approx(4.0358e-05, rel=1e-4)  # DiT's own


def test_without_a_learned_variance_ddpm_compares_the_noise_alone():
    objective = build_objective(ObjectiveConfig(name="ddpm", learn_sigma=False))
    x, noise, levels = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 4, 3, 8, 8), torch.full((2, 1), 0.5)
    noisy = objective.noisy(x, noise, levels)
    assert objective.loss(noise, noisy, x, noise, levels).abs().max() == 0
    found = objective.estimate(noise, noisy, levels)
    assert found.variance is None
    torch.testing.assert_close(found.clean, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.mask_strategy=mixed"], "objective.mask_strategy=shared"),
        (["data.packing=true", "data.sizes=[[5,64,64]]"], "data.packing=false"),
    ],
)
def test_what_a_unet_does_not_support_is_refused_when_the_config_is_read(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_typed(Config, "configs/video.yaml", ["model.network=unet", "objective.mask_strategy=shared", *overrides])


@pytest.mark.parametrize(("changes", "message"), [({"channels": (8,)}, "two widths"), ({"causal": True}, "not causal")])
def test_invalid_unets_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        unet(**changes)

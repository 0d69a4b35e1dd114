"""A training step: known frames are encoded as in sampling, and the loss is on all others."""

import pytest
import torch
from conftest import fill

from stdit.data.loader import Batch
from stdit.diffusion.masks import MASK_STRATEGIES
from stdit.diffusion.objective import ObjectiveConfig, build_objective
from stdit.rng import keyed_normal
from stdit.training.step import LatentBatch, diffusion_losses, to_latents
from stdit.vae import TinyVAE

KEYS = [(0, 3, slot) for slot in range(4)]
KNOWING = sorted(set(MASK_STRATEGIES) - {"shared", "per_frame", "teacher_forcing"})


def losses(scheme, model, latents=None, restarted=lambda starts: torch.zeros(int(starts.sum()), 4, 4, 4), **config):
    latents = torch.randn(4, 4, 5, 4, 4, generator=torch.Generator().manual_seed(0)) if latents is None else latents
    objective = build_objective(ObjectiveConfig(mask_strategy=scheme, **config))
    return diffusion_losses(model, objective, [LatentBatch(latents, restarted)], {}, KEYS, patch=(1, 2, 2)).clips


def known_pixels(timestep, like):
    """The pixels of latents whose patch of 2 x 2 is at level 0: (B, 1, T, h, w), bool."""
    known = timestep == 0
    if known.ndim == 3:
        known = known.unflatten(2, (2, 2)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return known.view(*known.shape, *[1] * (4 - known.ndim))[:, None].expand_as(like)


@pytest.mark.parametrize("scheme", KNOWING)
def test_predictions_for_known_frames_change_no_loss(scheme):
    def says(value):
        return lambda x, timestep, conditions: torch.where(known_pixels(timestep, x), value, 0.1 * x)

    found = losses(scheme, says(0.0))
    assert torch.isfinite(found).all()
    assert torch.equal(found, losses(scheme, says(1000.0)))


@pytest.mark.parametrize("scheme", KNOWING)
def test_the_loss_is_the_mean_over_the_predicted_part_of_each_frame(scheme):
    seen = {}

    def silent(x, timestep, conditions):
        seen.update(x=x, known=known_pixels(timestep, x))
        return torch.zeros_like(x)

    def exact(x, timestep, conditions):  # for clips of zeros the exact prediction follows from the noise
        level = (timestep if timestep.ndim == 2 else timestep.unflatten(2, (2, 2))) / 1000
        if level.ndim == 4:
            level = level.repeat_interleave(2, 2).repeat_interleave(2, 3)
        level = level.view(*level.shape, *[1] * (4 - level.ndim))[:, None]
        return torch.where(level > 0, x / level.clamp(min=1e-9), 0)

    zero = torch.zeros(4, 4, 5, 4, 4)
    assert losses(scheme, exact, zero).abs().max() < 1e-8
    found = losses(scheme, silent, zero)
    assert seen["known"].any()
    assert not seen["x"][seen["known"]].any()
    noise = keyed_normal("noise", KEYS, (4, 5, 4, 4))
    for clip, open_ in enumerate(~seen["known"]):
        frames = [noise[clip, :, t][open_[:, t]].square().mean() for t in range(5) if open_[:, t].any()]
        torch.testing.assert_close(found[clip], torch.stack(frames).mean())


def test_every_clip_of_a_batch_has_its_own_strategy_and_the_loss_of_the_clip_alone(tiny_model):
    objective = build_objective(
        ObjectiveConfig(mask_strategy="mixed", mask_probs={**dict.fromkeys(KNOWING, 1.0), "shared": 4.0, "region": 5.0})
    )
    model, keys, asked = tiny_model(learn_sigma=False), [(0, 3, slot) for slot in range(16)], []
    latents, labels = torch.randn(16, 4, 3, 4, 4), torch.arange(16) % 5

    def watched(x, timestep, **told):
        asked.append(tuple(timestep.shape))
        return model(x, timestep, **told)

    def of(rows):
        pick = torch.tensor(rows)
        clips = LatentBatch(latents[pick], lambda starts: torch.full((int(starts.sum()), 4, 4, 4), 0.5))
        return diffusion_losses(
            watched, objective, [clips], {"label": labels[pick, None]}, [keys[row] for row in rows], patch=(1, 2, 2)
        )

    with torch.no_grad():
        together, groups = of(list(range(16))), list(asked)
        alone = [of([row]) for row in range(16)]
    assert groups == [(16, 3, 4)]  # by patch, as some are
    assert len(set(asked[1:])) == 3  # levels per clip, per frame and per patch
    for name in ("clips", "levels"):
        expected = torch.cat([getattr(one, name) for one in alone])
        torch.testing.assert_close(getattr(together, name), expected, atol=1e-5, rtol=1e-5)


def test_a_known_segment_inside_a_clip_is_encoded_independently():
    seen = {}

    def model(x, timestep, conditions):
        seen.update(x=x, known=(timestep == 0))
        return torch.zeros_like(x)

    latents = torch.randn(4, 4, 5, 4, 4)
    for scheme, restarts in (("suffix", True), ("prefix", False), ("motion", False), ("ends", True)):
        losses(scheme, model, latents, lambda starts: torch.full((int(starts.sum()), 4, 4, 4), 7.0))
        x, known = seen["x"].transpose(1, 2), seen["known"]
        begins = known.clone()
        begins[:, 1:] &= ~known[:, :-1]
        begins[:, 0] = False
        assert bool(begins.any()) == restarts
        assert (x[begins] == 7).all()
        assert torch.equal(x[known & ~begins], latents.transpose(1, 2)[known & ~begins])


@torch.no_grad()
def test_cached_latents_and_pixels_give_equal_known_segments():
    vae = fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8))).eval()
    frames = torch.randint(0, 256, (2, 9, 32, 32, 3), dtype=torch.uint8)
    pixels = frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    alone = torch.cat(
        [vae.encode(pixels[:, :, :1])] + [vae.encode_segment(vae.frames_of_latent(pixels, t)) for t in (1, 2)], 2
    )

    def batch(**parts):
        empty = {"pixels": None, "latents": None, "reencoded": None}
        return Batch(**{**empty, **parts}, conditions={}, keys=KEYS[:2], bad={}, total=2)

    starts = torch.tensor([[False, True, False], [False, False, True]])
    (from_pixels,) = to_latents(batch(pixels=frames), vae)
    (from_cache,) = to_latents(batch(latents=vae.encode(pixels), reencoded=alone), vae)
    torch.testing.assert_close(from_pixels.latents, from_cache.latents)
    torch.testing.assert_close(from_pixels.reencode(starts), from_cache.reencode(starts), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(from_cache.reencode(starts)[0], alone[0, :, 1])
    assert not torch.allclose(from_cache.reencode(starts)[0], from_cache.latents[0, :, 1], atol=1e-3)
    (old,) = to_latents(batch(latents=vae.encode(pixels)), vae)
    with pytest.raises(ValueError, match="cache them again"):
        old.reencode(starts)


def test_larger_clips_are_trained_and_sampled_at_higher_noise():
    small, large = 64, 1024
    plain = build_objective(ObjectiveConfig(shift=2.0))
    grown = build_objective(ObjectiveConfig(shift=2.0, shift_tokens=small))
    draw = [o.sample_levels(torch.Generator().manual_seed(0), 500, n) for o in (plain, grown) for n in (small, large)]
    assert torch.equal(draw[0], draw[1])
    assert torch.equal(draw[0], draw[2])
    assert (draw[3] > draw[2]).all()
    levels = [grown.schedule(10, n) for n in (small, large)]
    assert (levels[1] >= levels[0]).all()
    assert (levels[1][1:-1] > levels[0][1:-1]).all()
    assert [float(levels[1][i]) for i in (0, -1)] == [1.0, 0.0]

import math

import pytest
import torch

from stdit.diffusion.levels import sample_levels, shift_levels, size_shift
from stdit.diffusion.paths import DDPMPath, FlowPath, like


def test_ddpm_levels_are_dits_betas():
    path, product = DDPMPath(), 1.0
    for i in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        if i in (0, 1, 500, 999):
            alpha, sigma = path.alpha_sigma(torch.tensor([(i + 1) / 1000], dtype=torch.float64))
            assert alpha.item() == pytest.approx(math.sqrt(product), rel=1e-10)
            assert sigma.item() == pytest.approx(math.sqrt(1 - product), rel=1e-10)


@pytest.mark.parametrize("path", [FlowPath(), DDPMPath()])
def test_levels_and_timesteps_convert_there_and_back(path):
    timesteps = torch.arange(0, 1000, 7).float()
    assert torch.equal(path.timestep(path.levels(timesteps)).round(), timesteps)
    assert path.timestep(torch.zeros(1)).item() == 0


@pytest.mark.parametrize("path", [FlowPath(), DDPMPath()])
@pytest.mark.parametrize("steps", [1, 2, 30, 250, 1000])
def test_schedules_fall_from_noise_to_zero(path, steps):
    schedule = path.schedule(steps)
    assert schedule.shape == (steps + 1,)
    assert schedule[0] == 1
    assert schedule[-1] == 0
    assert (schedule.diff() < 0).all()


def test_too_many_ddpm_steps_are_refused():
    with pytest.raises(ValueError, match="num_inference_steps=1001"):
        DDPMPath().schedule(1001)


@pytest.mark.parametrize("shape", [(2,), (2, 3), (2, 3, 4, 4)])
def test_levels_broadcast_over_frames_and_patches(shape):
    levels, x = torch.rand(shape), torch.zeros(2, 5, 3, 4, 4)
    spread = (like(levels, x) + x)[:, 0]
    assert torch.equal(spread, levels.reshape(shape + (1,) * (4 - len(shape))).expand(2, 3, 4, 4))


def test_shift_keeps_the_ends_and_raises_the_middle():
    shifted = shift_levels(torch.tensor([0.0, 0.25, 0.5, 1.0]), 3.0)
    torch.testing.assert_close(shifted, torch.tensor([0.0, 0.5, 0.75, 1.0]))
    assert size_shift(2.0, 400, 100) == 4.0
    assert size_shift(2.0, 400, 0) == 2.0


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_levels_are_between_0_and_1_with_a_mean_of_one_half(distribution):
    many = sample_levels(torch.Generator().manual_seed(0), 2000, distribution)
    assert 0 < many.min() < many.max() < 1
    assert many.mean().item() == pytest.approx(0.5, abs=0.02)

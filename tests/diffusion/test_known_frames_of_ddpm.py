"""DDPM with a learned variance on clips with known frames, whose level is 0."""

import pytest
import torch

from stdit.diffusion.objective import ObjectiveConfig, build_objective


@pytest.mark.parametrize("level", [0.001, 0.5, 1.0])
def test_a_known_frame_leaves_the_gradient_of_the_others_as_it_is_without_it(level):
    objective = build_objective(ObjectiveConfig("ddpm"))
    torch.manual_seed(0)
    clean, noise, output = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 4, 2, 4, 4), torch.randn(1, 8, 2, 4, 4)

    def gradient(levels):
        given = output.clone().requires_grad_()
        x = objective.noisy(clean, noise, levels)
        objective.loss(given, x, clean, noise=noise, levels=levels)[:, 1].sum().backward()
        return given.grad

    found = gradient(torch.tensor([[0.0, level]]))
    assert torch.isfinite(found).all() and found[:, :, 0].abs().max() == 0
    torch.testing.assert_close(found[:, :, 1], gradient(torch.full((1, 2), level))[:, :, 1])

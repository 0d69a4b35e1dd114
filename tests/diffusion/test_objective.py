import math

import pytest
import torch

from stdit.diffusion.levels import shift_levels
from stdit.diffusion.objective import ObjectiveConfig, build_objective
from stdit.diffusion.variational import learned_log_variance, posterior, variational_bound


@pytest.mark.parametrize("name", ["flow", "ddpm"])
def test_the_exact_prediction_has_no_loss_and_restores_the_data(name):
    objective = build_objective(ObjectiveConfig(name=name))
    clean, noise = torch.randn(2, 4, 3, 4, 4).clamp(-1, 1), torch.randn(2, 4, 3, 4, 4)
    levels = torch.tensor([[0.3, 0.6, 0.9], [0.5, 0.5, 0.5]])
    x = objective.noisy(clean, noise, levels)
    answer = noise - clean if name == "flow" else torch.cat([noise, -torch.ones_like(noise)], 1)
    estimate = objective.estimate(answer, x, levels)
    torch.testing.assert_close(estimate.clean, clean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(estimate.noise, noise, atol=1e-5, rtol=1e-5)
    loss = objective.loss(answer, x, clean, noise, levels)
    assert loss.shape == (2, 3, 4, 4)
    assert loss.abs().max() < (
        1e-6 if name == "flow" else 1e-4
    )  # with the variance of the posterior the divergence is 0


@pytest.mark.parametrize("name", ["flow", "ddpm"])
def test_the_loss_of_a_frame_depends_on_that_frame_only(name):
    objective = build_objective(ObjectiveConfig(name=name))
    clean, noise, levels = torch.randn(1, 4, 3, 4, 4), torch.randn(1, 4, 3, 4, 4), torch.full((1, 3), 0.5)
    x = objective.noisy(clean, noise, levels)
    output = torch.randn(1, 8 if name == "ddpm" else 4, 3, 4, 4)
    changed = output.clone()
    changed[:, :, 1] += 1
    moved = objective.loss(output, x, clean, noise, levels) != objective.loss(changed, x, clean, noise, levels)
    assert moved.any(3).any(2).tolist() == [[False, True, False]]


def test_ddpm_samples_discrete_steps_and_flow_continuous_levels():
    ddpm, flow = build_objective(ObjectiveConfig(name="ddpm")), build_objective(ObjectiveConfig())
    drawn = torch.cat([ddpm.sample_levels(torch.Generator().manual_seed(i), 1, 1) for i in range(3000)]) * 1000
    torch.testing.assert_close(drawn, drawn.round(), atol=1e-3, rtol=0)
    assert drawn.min() >= 1
    assert drawn.max() <= 1000.001
    assert drawn.mean().item() == pytest.approx(500.5, abs=20)
    assert 0 < flow.sample_levels(torch.Generator().manual_seed(0), 1, 1).item() < 1


def test_the_posterior_is_bayes_rule_on_the_chain():
    path = build_objective(ObjectiveConfig(name="ddpm")).path
    x, clean = torch.randn(2, 1, 1, 1, 2, 2, dtype=torch.float64)
    now, after = torch.tensor([[0.4]]), torch.tensor([[0.399]])
    mean, variance, beta = posterior(path, x, clean, now, after)
    bar, bar_before = path.alpha_bar[400], path.alpha_bar[399]
    step = 1 - bar / bar_before
    assert beta.item() == pytest.approx(step.item(), rel=1e-9)
    assert variance.item() == pytest.approx((step * (1 - bar_before) / (1 - bar)).item(), rel=1e-9)
    expected = (bar_before.sqrt() * step * clean + (1 - step).sqrt() * (1 - bar_before) * x) / (1 - bar)
    torch.testing.assert_close(mean, expected, rtol=1e-8, atol=1e-10)


def test_learned_variance_runs_from_the_posteriors_to_beta():
    small, large = torch.tensor(0.01, dtype=torch.float64), torch.tensor(0.02, dtype=torch.float64)
    ends = learned_log_variance(torch.tensor([-1.0, 1.0]), small, large).exp()
    torch.testing.assert_close(ends, torch.stack([small, large]))


def test_the_variational_bound_grows_with_a_wrong_mean_and_trains_only_the_variance():
    objective = build_objective(ObjectiveConfig(name="ddpm"))
    clean, noise, levels = torch.rand(1, 2, 1, 4, 4) * 2 - 1, torch.randn(1, 2, 1, 4, 4), torch.tensor([[0.2]])
    x = objective.noisy(clean, noise, levels)
    right = objective.estimate(torch.cat([noise, torch.zeros_like(noise)], 1), x, levels)
    wrong = objective.estimate(torch.cat([noise + 1, torch.zeros_like(noise)], 1), x, levels)
    bounds = [variational_bound(objective.path, x, clean, e, levels, 1e-3).mean() for e in (right, wrong)]
    assert 0 <= bounds[0] < bounds[1]
    output = torch.randn(1, 4, 1, 4, 4, requires_grad=True)
    bound = objective.loss(output, x, clean, noise, levels).sum() - (output[:, :2] - noise).square().mean(dim=1).sum()
    bound.backward()
    assert output.grad[:, :2].abs().max() < 1e-6
    assert output.grad[:, 2:].abs().max() > 1e-8


def test_the_last_step_is_a_likelihood_of_quantized_data():
    objective = build_objective(ObjectiveConfig(name="ddpm"))
    clean, levels = torch.zeros(1, 1, 1, 4, 4), torch.tensor([[0.001]])
    noise = torch.randn_like(clean)
    x = objective.noisy(clean, noise, levels)
    estimate = objective.estimate(torch.cat([noise, torch.zeros_like(noise)], 1), x, levels)
    bits = variational_bound(objective.path, x, clean, estimate, levels, 1e-3)
    # The bin of 2/255 under a normal of about DiT's smallest standard deviation: between 0 and 8 bits.
    assert 0 < bits.mean() < math.log2(256)


def test_a_shift_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match=r"objective.shift must be > 0, got 0.0"):
        ObjectiveConfig(shift=0.0)


def test_a_shift_of_sampling_moves_the_levels_of_sampling_and_not_those_of_training():
    plain = build_objective(ObjectiveConfig(shift=2.0))
    moved = build_objective(ObjectiveConfig(shift=2.0, sampling_shift=4.0))
    torch.testing.assert_close(moved.schedule(4, 80), shift_levels(torch.linspace(1, 0, 5), 4.0))
    assert torch.equal(moved.schedule(4, 80, shift=2.0), plain.schedule(4, 80))
    one, other = (o.sample_levels(torch.Generator().manual_seed(0), 5, 80) for o in (plain, moved))
    assert torch.equal(one, other)


def test_a_device_without_float64_computes_the_same_losses_in_float32(monkeypatch):
    from stdit import precision
    from stdit.diffusion.config import ObjectiveConfig
    from stdit.diffusion.objective import build_objective

    objective = build_objective(ObjectiveConfig(name="ddpm", learn_sigma=True))
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn((2, 4, 3, 4, 4), generator=generator) for _ in range(2))
    output = torch.randn((2, 8, 3, 4, 4), generator=generator)
    levels = torch.tensor([[0.001, 0.3, 1.0], [0.5, 0.5, 0.002]])
    noisy = objective.noisy(clean, noise, levels)

    def loss():
        return objective.loss(output, noisy, clean, noise=noise, levels=levels)

    exact = loss()
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", {"cpu"})
    assert torch.allclose(loss(), exact, rtol=2e-3)


@pytest.mark.parametrize("config", [{"shift": 4.0}, {"shift": 2.0, "shift_tokens": 20}, {"name": "ddpm"}])
def test_a_schedule_from_a_lower_level_is_the_last_part_of_one_of_more_steps(config):
    objective = build_objective(ObjectiveConfig(**config))
    whole = objective.schedule(20, 80)
    for start in (5, 10, 15):  # so many of the 20 steps are left
        part = objective.schedule(start, 80, start=float(whole[20 - start]))
        torch.testing.assert_close(part, whole[20 - start :], atol=2e-3 if config.get("name") else 1e-6, rtol=0)
    assert torch.equal(objective.schedule(7, 80, start=1.0), objective.schedule(7, 80))
    assert not objective.schedule(7, 80, start=0.0).any()


@pytest.mark.parametrize("shift", [0.3, 1.0, 2.0, 3.0, 4.7])
def test_a_schedule_begins_at_exactly_the_level_that_is_asked_for(shift):
    objective = build_objective(ObjectiveConfig(shift=shift))
    starts = torch.arange(1, 100) / 100
    schedules = torch.stack([objective.schedule(7, 80, start=float(start)) for start in starts])
    assert torch.equal(schedules[:, 0], starts)
    assert (schedules.diff() < 0).all() and not schedules[:, -1].any()

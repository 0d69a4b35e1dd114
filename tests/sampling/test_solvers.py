import math
from functools import cache

import pytest
import torch
from conftest import from_noise

from stdit.diffusion.paths import DDPMPath, FlowPath, like
from stdit.diffusion.predictions import Estimate
from stdit.sampling.schedule import Schedule, check, delayed, make_schedule
from stdit.sampling.solvers import SOLVERS, solve

SPREAD = 0.5  # data is normal with this standard deviation: the ideal network is known in closed form


def ideal(path):
    """The best prediction for data with the distribution N(0, SPREAD^2)."""

    def predict(x, levels, target=None):
        alpha, sigma = path.alpha_sigma(like(levels, x).double())
        total = alpha**2 * SPREAD**2 + sigma**2
        clean = alpha * SPREAD**2 / total * x.double()
        noise = sigma / total * x.double()
        return Estimate(clean.to(x.dtype), noise.to(x.dtype))

    return predict


@pytest.mark.parametrize("path", [FlowPath(), DDPMPath()])
@pytest.mark.parametrize("solver", sorted(set(SOLVERS) - {"ddpm"}))
def test_deterministic_solvers_follow_the_exact_flow(path, solver):
    noise = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    end = solve(from_noise(noise, path.schedule(400).double()), ideal(path), path, solver)
    torch.testing.assert_close(end, SPREAD * noise, atol=0.02, rtol=0.02)


def test_heun_is_of_second_order_and_euler_of_first():
    noise, path = torch.randn(1, 1, 1, 4, 4, dtype=torch.float64), FlowPath()
    errors = {
        (solver, n): (solve(from_noise(noise, path.schedule(n).double()), ideal(path), path, solver) - SPREAD * noise)
        .abs()
        .max()
        for solver in ("euler", "heun")
        for n in (20, 40)
    }
    assert math.log2(errors["euler", 20] / errors["euler", 40]) == pytest.approx(1, abs=0.2)
    assert math.log2(errors["heun", 20] / errors["heun", 40]) == pytest.approx(2, abs=0.4)


def correlated(path, covariance):
    """The best prediction for frames that are normal with this covariance (T, T): linear in x, at any levels of the patches."""

    def predict(x, levels, target=None):
        alpha, sigma = path.alpha_sigma(like(levels, x).double())
        frames = alpha[0, 0].movedim(0, -1)  # (h, w, T), or one for all pixels
        total = frames[..., :, None] * covariance * frames[..., None, :]
        total = total + torch.diag_embed(sigma[0, 0].movedim(0, -1) ** 2)
        weighted = torch.einsum("hwst,bcthw->bcshw", torch.linalg.inv(total), x)
        clean = torch.einsum("st,bcthw->bcshw", covariance, alpha * weighted)
        return Estimate(clean, sigma * weighted)

    return predict


COVARIANCE = torch.tensor([[1.0, 0.9, 0.4], [0.9, 1.2, 0.7], [0.4, 0.7, 0.8]], dtype=torch.float64)


class ContinuousDDPM(DDPMPath):
    """DDPM's path between its 1000 levels, as their number grows without end: a step may be of any length."""

    def alpha_sigma(self, levels):
        bar = torch.exp(-0.1 * levels - 9.95 * levels**2)  # betas of 1e-4 to 0.02 are rates of 0.1 to 20
        return bar.sqrt(), (1 - bar).sqrt()


# In 24ths of the time of a frame, by which each frame, or each patch (T, rows, columns), starts later.
DELAYS = {
    "together": [0, 0, 0],
    "pyramid": [0, 3, 6],
    "autoregressive": [0, 24, 48],
    "patches": [[[0, 2], [5, 3]], [[4, 0], [9, 6]], [[7, 12], [1, 24]]],
}


@cache
def end_of_plan(path, plan, solver, steps):
    noise = torch.randn(1, 1, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # From 0.98, where the log of alpha / sigma is finite; delays grow with the steps, so that the plan is the same.
    levels, delays = 0.98 * torch.linspace(1, 0, steps + 1, dtype=torch.float64), torch.tensor(DELAYS[plan])
    rows = delayed(levels, delays.flatten() * steps // 24).unflatten(1, delays.shape)
    return solve(Schedule(noise, rows), correlated(path, COVARIANCE), path, solver)


FLOW, DDPM = FlowPath(), ContinuousDDPM()


# Not Heun on DDPM's path, where the noise grows as the root of the level: its last step, which is Euler's, is too long there.
@pytest.mark.parametrize(
    ("path", "plan", "solver"),
    [
        *((FLOW, plan, solver) for plan in DELAYS for solver in ("ab2", "dpmpp_2m", "heun")),
        *((DDPM, plan, solver) for plan in ("pyramid", "patches") for solver in ("ab2", "dpmpp_2m")),
    ],
    ids=lambda one: getattr(one, "name", one),
)
def test_the_order_is_two_also_where_frames_and_patches_start_at_different_steps(path, plan, solver):
    exact = end_of_plan(path, plan, "ab2", 3072)
    errors = [float((end_of_plan(path, plan, solver, steps) - exact).abs().max()) for steps in (96, 192)]
    assert 1.6 < math.log2(errors[0] / errors[1]) < 2.6


def test_multistep_solvers_need_fewer_steps_than_euler():
    noise, path = torch.randn(1, 1, 3, 4, 4, dtype=torch.float64), FlowPath()

    def error(solver, steps):
        plan = path.schedule(steps).double()
        end = solve(from_noise(noise, plan), correlated(path, COVARIANCE), path, solver)
        return float((end - exact).abs().max())

    exact = solve(from_noise(noise, path.schedule(1000).double()), correlated(path, COVARIANCE), path, "heun")
    assert error("ab2", 12) < error("euler", 30)
    assert error("dpmpp_2m", 12) < error("euler", 30)


@pytest.mark.parametrize("path", [FlowPath(), DDPMPath()])
@pytest.mark.parametrize(("solver", "first_order"), [("ab2", "euler"), ("dpmpp_2m", "ddim")])
def test_least_steps_are_the_fewest_with_which_a_multistep_solver_is_of_second_order(path, solver, first_order):
    noise, least = torch.randn(1, 1, 1, 4, 4, dtype=torch.float64), SOLVERS[solver].least_steps(path)

    def differs(steps: int) -> bool:
        plan = from_noise(noise, path.schedule(steps).double())
        ends = [solve(plan, ideal(path), path, name) for name in (solver, first_order)]
        return not torch.allclose(*ends, atol=1e-9, rtol=0)

    assert differs(least) and not differs(least - 1)


def test_levels_that_rise_are_refused():
    with pytest.raises(ValueError, match="give levels that only fall"):
        solve(from_noise(torch.randn(1, 1, 1, 4, 4), torch.tensor([1.0, 0.4, 0.6, 0.0])), ideal(FlowPath()), FlowPath())


def test_ddim_and_euler_give_equal_results():
    noise = torch.randn(1, 2, 3, 4, 4, dtype=torch.float64)
    for path in (FlowPath(), DDPMPath()):
        ends = [solve(from_noise(noise, path.schedule(10).double()), ideal(path), path, s) for s in ("ddim", "euler")]
        torch.testing.assert_close(*ends, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("learned", [False, True])
def test_ancestral_sampling_ends_at_the_datas_spread(learned):
    path = DDPMPath()

    def predict(x, levels, target=None):
        estimate = ideal(path)(x, levels)
        return estimate._replace(variance=torch.zeros_like(x)) if learned else estimate

    end = solve(from_noise(torch.randn(64, 1, 1, 16, 16), path.schedule(200)), predict, path, "ddpm")
    assert end.std().item() == pytest.approx(SPREAD, rel=0.05)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("path", [FlowPath(), DDPMPath()])
def test_known_frames_never_move_by_a_bit(path, solver):
    x = torch.randn(2, 3, 5, 4, 4)
    levels = make_schedule(path.schedule(7), torch.ones(5, dtype=torch.bool)).clone()
    levels[:, [0, 3]] = 0
    end = solve(Schedule(x, levels), lambda x, t, *_: Estimate(torch.randn_like(x), torch.randn_like(x)), path, solver)
    assert torch.equal(end[:, :, [0, 3]], x[:, :, [0, 3]])
    assert torch.isfinite(end).all()
    assert not torch.equal(end[:, :, 1], x[:, :, 1])


def test_frames_at_different_levels_are_solved_as_each_alone():
    path, noise = FlowPath(), torch.randn(1, 1, 2, 4, 4, dtype=torch.float64)
    fast = torch.cat([torch.linspace(1, 0, 11), torch.zeros(5)])
    slow = torch.cat([torch.ones(5), torch.linspace(1, 0, 11)])
    both = solve(Schedule(noise, torch.stack([fast, slow], 1).double()), ideal(path), path, "euler")
    for frame, column in enumerate((fast, slow)):
        alone = solve(Schedule(noise[:, :, frame : frame + 1], column[:, None].double()), ideal(path), path, "euler")
        torch.testing.assert_close(both[:, :, frame : frame + 1], alone)


def test_a_schedule_that_rises_or_does_not_end_at_0_is_an_error():
    x = torch.zeros(1, 1, 1, 2, 2)
    check(Schedule(x, torch.tensor([[1.0], [0.5], [0.0]])))
    for column in ([1.0, 0.5], [0.5, 1.0, 0.0]):
        with pytest.raises(AssertionError):
            check(Schedule(x, torch.tensor(column)[:, None]))


def test_an_unknown_solver_names_the_nearest():
    with pytest.raises(ValueError, match="Unknown solver 'eular'. Did you mean 'euler'"):
        solve(from_noise(torch.zeros(1, 1, 1, 2, 2), torch.tensor([1.0, 0.0])), None, FlowPath(), "eular")

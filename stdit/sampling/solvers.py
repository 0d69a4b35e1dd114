"""Solvers: one step from the levels t to the levels t_next, with a level per latent frame.

A solver is a class in `SOLVERS`. An instance lives for one run, so a multistep solver can store its earlier steps.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from stdit.diffusion.paths import Path, like
from stdit.diffusion.predictions import Estimate
from stdit.diffusion.variational import learned_log_variance, posterior
from stdit.sampling.schedule import Schedule
from stdit.variants import pick

Predict = Callable[..., Estimate]  # (x, levels (B|1, T)), for a flow map also the levels where a step ends -> estimate
DrawStep = Callable[[int], Tensor]  # index of the step -> noise like x
Draw = Callable[[], Tensor]  # noise like x for this step
# (number of a step, of so many, its noisiest level, latents) -> latents to go on with, whether to stop
EndStep = Callable[[int, int, Tensor, Tensor], tuple[Tensor, bool]]


class Solver(ABC):
    """One run of a solver along a path; `solve` restores frames whose level does not change after every step."""

    def __init__(self, path: Path):
        self.path = path

    @staticmethod
    def least_steps(path: Path) -> int:
        """The fewest steps from pure noise with which it is what its name says."""
        return 1

    @abstractmethod
    def step(self, x: Tensor, t: Tensor, t_next: Tensor, predict: Predict, draw: Draw) -> Tensor:
        """Move x (B, C, T, h, w) from levels t to levels t_next; levels are (1, T) or (1, T, rows, columns)."""

    def along(self, x: Tensor, t: Tensor, t_next: Tensor, velocity: Tensor) -> Tensor:
        """Take a straight step in the coordinates in which the flow of the path is dy/dtime = velocity."""
        scale, time = self.path.ode_scale_time(like(t, x))
        scale_next, time_next = self.path.ode_scale_time(like(t_next, x))
        return scale_next * (x / scale + (time_next - time) * velocity)


class Euler(Solver):
    """Euler's method in the coordinates of the path; for flow, x + (t_next - t) * velocity."""

    def step(self, x: Tensor, t: Tensor, t_next: Tensor, predict: Predict, draw: Draw) -> Tensor:
        """Step along the velocity at the current levels."""
        estimate = predict(x, t)
        return self.along(x, t, t_next, self.path.velocity(estimate.clean, estimate.noise))


class FlowMap(Solver):
    """A step of a flow map, which predicts the mean velocity from the levels t to t_next: exact for a perfect model."""

    def step(self, x: Tensor, t: Tensor, t_next: Tensor, predict: Predict, draw: Draw) -> Tensor:
        """Step along the mean velocity."""
        estimate = predict(x, t, t_next)
        return self.along(x, t, t_next, self.path.velocity(estimate.clean, estimate.noise))


class Heun(Solver):
    """Heun's method, of second order, with two model calls per step (Karras et al., algorithm 1)."""

    def step(self, x: Tensor, t: Tensor, t_next: Tensor, predict: Predict, draw: Draw) -> Tensor:
        """Step by Euler, then again with the mean of the velocities at both ends; by Euler alone to level 0."""
        estimate = predict(x, t)
        velocity = self.path.velocity(estimate.clean, estimate.noise)
        euler = self.along(x, t, t_next, velocity)
        if not bool((t_next > 0).any()):  # the last step: training has no level 0 of generated frames
            return euler
        second = predict(euler, t_next)
        mean = 0.5 * (velocity + self.path.velocity(second.clean, second.noise))
        return torch.where(like(t_next, x) > 0, self.along(x, t, t_next, mean), euler)


class DDIM(Solver):
    """Deterministic DDIM (Song et al., equation 12 with sigma = 0)."""

    def step(self, x: Tensor, t: Tensor, t_next: Tensor, predict: Predict, draw: Draw) -> Tensor:
        """Noise the estimate of clean data to the next levels with the estimate of the noise."""
        estimate = predict(x, t)
        alpha, sigma = self.path.alpha_sigma(like(t_next, x))
        return alpha * estimate.clean + sigma * estimate.noise


class DDPM(Solver):
    """Ancestral sampling from q(x_next | x, clean), with the learned variance if the model has one (Ho et al.)."""

    def step(self, x: Tensor, t: Tensor, t_next: Tensor, predict: Predict, draw: Draw) -> Tensor:
        """Draw from the posterior of the next levels; at level 0 without noise."""
        estimate = predict(x, t)
        mean, smallest, largest = posterior(self.path, x, estimate.clean, now=t, after=t_next)
        noisy = like(t_next, x) > 0
        if estimate.variance is None:
            variance = smallest
        else:
            safe = torch.where(noisy, smallest, torch.ones_like(smallest))  # the posterior has no variance at level 0
            variance = learned_log_variance(estimate.variance, safe, torch.where(noisy, largest, 1)).exp()
        return (mean + noisy * variance.clamp(min=0).sqrt() * draw()).to(x.dtype)


class AB2(Solver):
    """Adams-Bashforth of second order: the velocity, extrapolated to the middle of the step from that of the step before.

    One model call per step. A frame or patch that did not move in the step before takes a step of Euler, as does the
    first step; so with schedules of any arrangement the order stays two.
    """

    @staticmethod
    def least_steps(path: Path) -> int:
        """Two, of which the second is of second order."""
        return 2

    def __init__(self, path: Path):
        super().__init__(path)
        self.before: tuple[Tensor, Tensor] | None = None  # velocity and length of the step before

    def step(self, x: Tensor, t: Tensor, t_next: Tensor, predict: Predict, draw: Draw) -> Tensor:
        """Step along v + length / (2 length_before) (v - v_before)."""
        estimate = predict(x, t)
        velocity = self.path.velocity(estimate.clean, estimate.noise)
        length = self.path.ode_scale_time(like(t_next, x))[1] - self.path.ode_scale_time(like(t, x))[1]
        mean = velocity
        if self.before is not None:
            mean = velocity + _half_ratio(length, self.before[1]) * (velocity - self.before[0])
        self.before = velocity, length
        return self.along(x, t, t_next, mean)


class DPMSolver2M(Solver):
    """DPM-Solver++(2M) (Lu et al., "DPM-Solver++", algorithm 2): clean data, extrapolated in the log of alpha / sigma.

    One model call per step. The first step, the last one to level 0, and those of frames or patches that did not move
    in the step before are of first order (DDIM). So is the second one of flow from pure noise, where alpha is 0: the log
    of alpha / sigma is infinite there, and so is the length of the first step.
    """

    @staticmethod
    def least_steps(path: Path) -> int:
        """The steps of first order, and one more."""
        return 3 if path.alpha_sigma(torch.ones(1))[0] > 0 else 4

    def __init__(self, path: Path):
        super().__init__(path)
        self.before: tuple[Tensor, Tensor] | None = None  # clean data and length of the step before

    def step(self, x: Tensor, t: Tensor, t_next: Tensor, predict: Predict, draw: Draw) -> Tensor:
        """Step toward clean + length / (2 length_before) (clean - clean_before)."""
        clean = predict(x, t).clean
        (alpha, sigma), (alpha_next, sigma_next) = (self.path.alpha_sigma(like(levels, x)) for levels in (t, t_next))
        length = (alpha_next.log() - sigma_next.log()) - (alpha.log() - sigma.log())
        toward = clean
        if self.before is not None:
            toward = clean + _half_ratio(length, self.before[1]) * (clean - self.before[0])
        self.before = clean, length
        kept = torch.where(sigma > 0, sigma_next / sigma, 1)
        return kept * x + (alpha_next - kept * alpha) * toward


def _half_ratio(length: Tensor, before: Tensor) -> Tensor:
    """length / (2 before); 0 where a step has no length or an infinite one, so that the step is of first order."""
    known = torch.isfinite(length) & (before.abs() > 0)
    return torch.where(known, length / (2 * before), 0)


SOLVERS: dict[str, type[Solver]] = {
    "euler": Euler, "flow_map": FlowMap, "heun": Heun, "ab2": AB2, "dpmpp_2m": DPMSolver2M, "ddim": DDIM, "ddpm": DDPM,
}  # fmt: skip


def solve(
    schedule: Schedule,
    predict: Predict,
    path: Path,
    solver: str = "euler",
    *,
    draw: DrawStep | None = None,
    end_step: EndStep | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Tensor:
    """Run a schedule to its end with a new solver; returns latents (B, C, T, h, w). ValueError if a level rises.

    Frames or patches whose level does not change in a step stay exactly the same, and so do clean ones, whatever
    `end_step` returns.
    """
    if (schedule.levels.diff(dim=0) > 0).any():
        raise ValueError("levels of a schedule rise from one row to the next; give levels that only fall, to 0.")
    run = pick(SOLVERS, solver, "solver")(path)
    x = schedule.x
    pairs = list(pairwise(schedule.levels.to(x.device)))
    for step, (t, t_next) in enumerate(progress(pairs)):
        noise = partial(draw, step) if draw else partial(torch.randn_like, x)
        moved = run.step(x, t[None], t_next[None], predict=predict, draw=noise)
        x = torch.where(like((t != t_next)[None], x), moved, x)
        if end_step is not None:
            changed, stop = end_step(step, len(pairs), t.max(), x)
            x = torch.where(like((t > 0)[None], x), changed.to(x), x)
            if stop:
                break
    return x

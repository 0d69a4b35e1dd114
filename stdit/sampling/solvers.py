"""Our own solvers: one step from the levels now to the levels after, each frame at its own."""

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

Predict = Callable[[Tensor, Tensor], Estimate]  # (x, levels (B|1, T)) -> estimate
Draw = Callable[[int], Tensor]  # step -> fresh noise like x
Solver = Callable[[Tensor, Tensor, Tensor, Predict, Path, Callable[[], Tensor]], Tensor]


def euler(x: Tensor, now: Tensor, after: Tensor, predict: Predict, path: Path, draw: Callable[[], Tensor]) -> Tensor:
    """First order in the path's own coordinates; for flow, x + (after - now) * velocity."""
    estimate = predict(x, now)
    return _along(x, now, after, path.slope(estimate.clean, estimate.noise), path)


def heun(x: Tensor, now: Tensor, after: Tensor, predict: Predict, path: Path, draw: Callable[[], Tensor]) -> Tensor:
    """Second order: Euler, then again with the mean of both slopes (Karras et al., algorithm 1). Two calls a step."""
    estimate = predict(x, now)
    slope = path.slope(estimate.clean, estimate.noise)
    ahead = _along(x, now, after, slope, path)
    if not bool((after > 0).any()):  # the last step: a network is never asked about clean data
        return ahead
    second = predict(ahead, after)
    mean = 0.5 * (slope + path.slope(second.clean, second.noise))
    return torch.where(like(after, x) > 0, _along(x, now, after, mean, path), ahead)


def ddim(x: Tensor, now: Tensor, after: Tensor, predict: Predict, path: Path, draw: Callable[[], Tensor]) -> Tensor:
    """Deterministic DDIM (Song et al., equation 12 with sigma = 0)."""
    estimate = predict(x, now)
    alpha, sigma = path.alpha_sigma(like(after, x))
    return alpha * estimate.clean + sigma * estimate.noise


def ddpm(x: Tensor, now: Tensor, after: Tensor, predict: Predict, path: Path, draw: Callable[[], Tensor]) -> Tensor:
    """Ancestral step: draw from q(x_after | x_now, clean), with the learned variance where there is one."""
    estimate = predict(x, now)
    mean, smallest, largest = posterior(path, x, estimate.clean, now, after)
    moves = like(after, x) > 0
    if estimate.variance is None:
        variance = smallest
    else:
        safe = torch.where(moves, smallest, torch.ones_like(smallest))
        variance = learned_log_variance(estimate.variance, safe, torch.where(moves, largest, 1)).exp()
    return (mean + moves * variance.clamp(min=0).sqrt() * draw()).to(x.dtype)


def _along(x: Tensor, now: Tensor, after: Tensor, slope: Tensor, path: Path) -> Tensor:
    scale, time = path.coordinates(like(now, x))
    scale_after, time_after = path.coordinates(like(after, x))
    return scale_after * (x / scale + (time_after - time) * slope)


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun, "ddim": ddim, "ddpm": ddpm}


def solve(
    plan: Schedule,
    predict: Predict,
    path: Path,
    solver: str = "euler",
    draw: Draw | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Tensor:
    """Run a plan to the end: (B, C, T, h, w). Frames whose level does not change do not change by a bit."""
    step_with = pick(SOLVERS, solver, "solver")
    x = plan.x
    for step, (now, after) in enumerate(progress(list(pairwise(plan.levels.to(x.device))))):
        noise = partial(draw, step) if draw else partial(torch.randn_like, x)
        moved = step_with(x, now[None], after[None], predict, path, noise)
        x = torch.where(like((now != after)[None], x), moved, x)
    return x

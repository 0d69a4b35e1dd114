"""Paths from clean data to noise, x_t = alpha(t) data + sigma(t) noise, and conversion of levels to timesteps.

Levels are t in [0, 1], where 0 is clean, of shape (B,), (B, T) or, per patch, (B, T, rows, columns); `like` makes them
broadcast over (B, C, T, h, w).
"""

from functools import cached_property

import torch
from torch import Tensor

from stdit.precision import wide
from stdit.variants import pick


def like(levels: Tensor, x: Tensor) -> Tensor:
    """Reshape levels (B,), (B, T|1) or (B, T|1, rows, columns) to broadcast over x (B, C, T, h, w).

    rows and columns must divide h and w.
    """
    while levels.ndim < 4:
        levels = levels.unsqueeze(-1)
    for axis in (-2, -1):
        if 1 < levels.shape[axis] < x.shape[axis]:
            levels = levels.repeat_interleave(x.shape[axis] // levels.shape[axis], axis)
    return levels.unsqueeze(1).to(x.device)


class FlowPath:
    """Rectified flow: alpha = 1 - t, sigma = t. The model's timestep is 1000 t."""

    name = "flow"

    def alpha_sigma(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of data and noise at these levels: 1 - t and t."""
        return 1 - levels, levels

    def timestep(self, levels: Tensor) -> Tensor:
        """Convert levels to the model's timesteps, float32 on 0..1000."""
        return 1000 * levels.float()

    def levels(self, timestep: Tensor) -> Tensor:
        """Convert the model's timesteps to levels."""
        return timestep.float() / 1000

    def quantize(self, levels: Tensor) -> Tensor:
        """Return the levels unchanged, since every level in [0, 1] is valid."""
        return levels

    def schedule(self, steps: int | str) -> Tensor:
        """Evenly spaced levels (steps + 1,) from 1 to 0."""
        if not str(steps).isdecimal():
            raise ValueError(f"num_inference_steps={steps!r} selects steps of DDPM; flow takes a number.")
        steps = int(steps)
        return torch.linspace(1, 0, steps + 1)

    def ode_scale_time(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and time of the probability flow ODE in the form dy/dtime = velocity, where x = scale * y."""
        return torch.ones_like(levels), levels

    def velocity(self, clean: Tensor, noise: Tensor) -> Tensor:
        """The derivative of x by time: noise - clean."""
        return noise - clean


# First beta, last beta and p: the p-th roots of the betas are evenly spaced.
BETAS = {"linear": (1e-4, 0.02, 1), "scaled_linear": (0.00085, 0.012, 2)}


class DDPMPath:
    """The Markov chain of DDPM with 1000 steps.

    The betas are DiT's, linear from 1e-4 to 0.02, or Stable Diffusion's, whose square roots are linear. Step i (0..999)
    is timestep i and level (i + 1) / 1000. Levels between steps are rounded to the nearest; a clean frame (level 0) has
    timestep 0.
    """

    name = "ddpm"
    num_steps = 1000

    def __init__(self, betas: str = "linear"):
        self.betas = pick(BETAS, betas, "objective.betas")

    @cached_property
    def alpha_bar(self) -> Tensor:
        """Cumulative products (1001,) of 1 - beta in float64, indexed by level times 1000; 1 at level 0."""
        first, last, power = self.betas
        betas = torch.linspace(first ** (1 / power), last ** (1 / power), self.num_steps, dtype=torch.float64) ** power
        return torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])

    def index(self, levels: Tensor) -> Tensor:
        """Index into `alpha_bar`: the level times 1000, rounded."""
        return (wide(levels) * self.num_steps).round().long()

    def alpha_sigma(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of data and noise at these levels: the roots of alpha_bar and 1 - alpha_bar."""
        bar = self.alpha_bar[self.index(levels).cpu()]
        return tuple(factor.sqrt().to(levels.dtype).to(levels.device) for factor in (bar, 1 - bar))  # type: ignore[return-value]

    def timestep(self, levels: Tensor) -> Tensor:
        """Convert levels to the model's timesteps, 0..999."""
        return (self.index(levels) - 1).clamp(min=0).float()

    def levels(self, timestep: Tensor) -> Tensor:
        """Convert the model's timesteps to levels."""
        return (timestep.float() + 1) / self.num_steps

    def quantize(self, levels: Tensor) -> Tensor:
        """Round levels to the nearest level of the chain."""
        return self.index(levels).float() / self.num_steps

    def schedule(self, steps: int | str) -> Tensor:
        """Levels (steps + 1,) of evenly spaced steps of the chain, from last to first, then 0.

        steps: a number, also as text ("250"); or "ddim50", which strides by an integer from step 0 (DiT's
        `space_timesteps`).
        """
        kept = torch.tensor(self.respaced_steps(steps), dtype=torch.float64)
        return torch.cat([(kept.flip(0) + 1) / self.num_steps, torch.zeros(1, dtype=torch.float64)]).float()

    def respaced_steps(self, steps: int | str) -> list[int]:
        """Steps in 0..999 that a schedule visits, in rising order."""
        strided = isinstance(steps, str) and steps.startswith("ddim")
        digits = str(steps).removeprefix("ddim")
        count = int(digits) if digits.isdecimal() else 0
        if not 1 <= count <= self.num_steps:
            raise ValueError(
                f"num_inference_steps={steps!r} does not fit DDPM's {self.num_steps} steps. Use 1 to 1000, or ddim50."
            )
        if strided:
            for stride in range(1, self.num_steps + 1):
                if len(kept := range(0, self.num_steps, stride)) == count:
                    return list(kept)
            near = len(range(0, self.num_steps, round(self.num_steps / count)))
            raise ValueError(f"num_inference_steps={steps!r}: no whole stride visits {count} steps. Use ddim{near}.")
        if count == 1:  # the last step, since only it can start from noise; DiT's rule would take the first
            return [self.num_steps - 1]
        gap, at = (self.num_steps - 1) / (count - 1), 0.0
        steps_kept: list[int] = []
        for _ in range(count):  # summed up as in DiT, whose rounding at halves depends on these sums
            steps_kept.append(round(at))
            at += gap
        return steps_kept

    def ode_scale_time(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Scale alpha and time sigma / alpha of the probability flow ODE, as for `FlowPath`."""
        alpha, sigma = self.alpha_sigma(wide(levels))
        return alpha.to(levels.dtype), (sigma / alpha).to(levels.dtype)

    def velocity(self, clean: Tensor, noise: Tensor) -> Tensor:
        """The derivative of y by time: the noise."""
        return noise


Path = FlowPath | DDPMPath

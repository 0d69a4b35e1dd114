"""From clean to noise: x_t = alpha(t) data + sigma(t) noise. The only file that converts between levels and timesteps.

Levels are t in [0, 1], 0 = clean, of shape (B,), (B, T) or, by patches, (B, T, rows, columns); `like` spreads them over
(B, C, T, h, w).
"""

from functools import cached_property

import torch
from torch import Tensor

from stdit.variants import pick


def like(levels: Tensor, x: Tensor) -> Tensor:
    """(B,), (B, T|1) or (B, T|1, rows, columns) that divide h and w -> broadcastable to x (B, C, T, h, w)."""
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
        return 1 - levels, levels

    def timestep(self, levels: Tensor) -> Tensor:
        """Levels to the model's timesteps, float32 on 0..1000."""
        return 1000 * levels.float()

    def levels(self, timestep: Tensor) -> Tensor:
        """The model's timesteps to levels."""
        return timestep.float() / 1000

    def quantize(self, levels: Tensor) -> Tensor:
        """The nearest levels that the chain has: all of them."""
        return levels

    def schedule(self, steps: int | str) -> Tensor:
        """(steps + 1,) levels from 1 to 0, evenly spaced."""
        if not str(steps).isdecimal():
            raise ValueError(f"num_inference_steps={steps!r} is a choice among DDPM's steps; flow takes a number.")
        steps = int(steps)
        return torch.linspace(1, 0, steps + 1)

    def ode_scale_time(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, time) in which the flow is dy/dtime = velocity, x = scale * y."""
        return torch.ones_like(levels), levels

    def velocity(self, clean: Tensor, noise: Tensor) -> Tensor:
        return noise - clean


# First and last beta, and of which power's root they are evenly spaced.
BETAS = {"linear": (1e-4, 0.02, 1), "scaled_linear": (0.00085, 0.012, 2)}


class DDPMPath:
    """DiT's chain: 1000 steps, betas linear from 1e-4 to 0.02; or Stable Diffusion's, whose roots are linear. Step i in 0..999 is timestep i and level (i + 1) / 1000.

    Levels between steps are rounded to the nearest; a clean frame (level 0) is timestep 0.
    """

    name = "ddpm"
    num_steps = 1000

    def __init__(self, betas: str = "linear"):
        self.betas = pick(BETAS, betas, "objective.betas")

    @cached_property
    def alpha_bar(self) -> Tensor:
        """(1001,) float64, by level times 1000: the product of 1 - beta, 1 at level 0."""
        first, last, power = self.betas
        betas = torch.linspace(first ** (1 / power), last ** (1 / power), self.num_steps, dtype=torch.float64) ** power
        return torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])

    def index(self, levels: Tensor) -> Tensor:
        """Level times 1000, rounded, as an integer."""
        return (levels.double() * self.num_steps).round().long()

    def alpha_sigma(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        bar = self.alpha_bar[self.index(levels).cpu()].to(levels.device)
        return bar.sqrt().to(levels.dtype), (1 - bar).sqrt().to(levels.dtype)

    def timestep(self, levels: Tensor) -> Tensor:
        """Levels to the model's timesteps: i in 0..999."""
        return (self.index(levels) - 1).clamp(min=0).float()

    def levels(self, timestep: Tensor) -> Tensor:
        return (timestep.float() + 1) / self.num_steps

    def quantize(self, levels: Tensor) -> Tensor:
        return self.index(levels).float() / self.num_steps

    def schedule(self, steps: int | str) -> Tensor:
        """(steps + 1,) levels: `steps` of the thousand, evenly spaced from last to first, then 0.

        As a text, "250" is the same and "ddim50" strides by a whole number from step 0 (DiT's `space_timesteps`).
        """
        kept = torch.tensor(self.respaced_steps(steps), dtype=torch.float64)
        return torch.cat([(kept.flip(0) + 1) / self.num_steps, torch.zeros(1, dtype=torch.float64)]).float()

    def respaced_steps(self, steps: int | str) -> list[int]:
        """The steps in 0..999 that a schedule visits, rising."""
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
        if count == 1:  # the last, which alone can start from noise; DiT's rule would take the first
            return [self.num_steps - 1]
        gap, at = (self.num_steps - 1) / (count - 1), 0.0
        steps_kept: list[int] = []
        for _ in range(count):  # added up, as DiT does: its rounding at halves comes from these sums
            steps_kept.append(round(at))
            at += gap
        return steps_kept

    def ode_scale_time(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha_sigma(levels.double())
        return alpha.to(levels.dtype), (sigma / alpha).to(levels.dtype)

    def velocity(self, clean: Tensor, noise: Tensor) -> Tensor:
        return noise


Path = FlowPath | DDPMPath

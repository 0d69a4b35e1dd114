"""Training objectives: DDPM and rectified flow behind one interface."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from stdit.diffusion.config import ObjectiveConfig
from stdit.diffusion.levels import LevelSample, sample_levels, shift_levels, size_shift
from stdit.diffusion.masks import MASK_STRATEGIES, Grid
from stdit.diffusion.paths import DDPMPath, FlowPath, Path, like
from stdit.diffusion.predictions import Estimate, from_epsilon, from_velocity
from stdit.diffusion.segments import VELOCITY_SHARE, Order, draw_segment
from stdit.diffusion.variational import variational_bound
from stdit.variants import pick

__all__ = ["OBJECTIVES", "DDPMObjective", "FlowObjective", "Objective", "ObjectiveConfig", "build_objective"]


class Objective(ABC):
    """Interface of a training objective: noise levels, the loss, and how to read the network's output."""

    path: Path
    learns_sigma: bool = False

    def __init__(self, config: ObjectiveConfig):
        self.config = config

    def sample(
        self, generator: torch.Generator, strategy: str, grid: Grid, tokens: int, level: float | None = None
    ) -> LevelSample:
        """Draw levels and generation mask of one clip of `tokens` latent positions: (T,), or per patch of `grid`.

        level: a fixed level of the generated frames, in place of a random one (for held-out losses).
        """
        frames, kind = grid[0], MASK_STRATEGIES[strategy]
        levels = self.sample_levels(generator, frames if kind.level_per_frame else 1, tokens).expand(frames)
        mask = kind.draw_mask(generator, grid)
        if not bool(mask.all()) or kind.teacher_forcing:
            levels = self.path.quantize(shift_levels(levels, self.config.cond_timestep_shift))
        if level is not None:
            levels = self.path.quantize(torch.full((frames,), level))
        clean = self.path.quantize(self.config.cond_noise_max * torch.rand((), generator=generator))
        levels = torch.where(mask, levels.view(-1, *[1] * (mask.ndim - 1)), clean)
        return LevelSample(levels, mask, clean if kind.teacher_forcing else None)

    @abstractmethod
    def sample_levels(self, generator: torch.Generator, count: int, tokens: int) -> Tensor:
        """Draw (count,) independent levels for a clip of `tokens` latent positions."""

    @abstractmethod
    def estimate(self, output: Tensor, x: Tensor, levels: Tensor) -> Estimate:
        """Convert the network's output (B, C_out, T, h, w) for noisy x to estimates of clean data and noise.

        levels: (B, T|1) or (B, T, rows, columns).
        """

    @abstractmethod
    def loss(self, output: Tensor, x: Tensor, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Training loss (B, T, h, w), the mean over channels."""

    def noisy(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Add noise to clean data: x_t (B, C, T, h, w) at levels (B, T|1) or (B, T, rows, columns)."""
        alpha, sigma = self.path.alpha_sigma(like(levels, clean))
        return alpha * clean + sigma * noise

    def timestep(self, levels: Tensor) -> Tensor:
        """Convert levels to the model's timesteps, of the same shape."""
        return self.path.timestep(levels)

    def sampling_shift(self, shift: float | None = None) -> float | None:
        """How far sampling shifts levels toward noise: as a call or the config says; None where levels are not shifted."""
        return None

    @abstractmethod
    def schedule(self, steps: int | str, tokens: int, shift: float | None = None, *, start: float = 1.0) -> Tensor:
        """Levels (steps + 1,) from `start` to 0 for sampling a clip of `tokens` latent positions.

        shift: flow: how far levels are shifted toward noise; None: as the config says.
        """


class FlowObjective(Objective):
    """Rectified flow: the network predicts the velocity noise - clean, with a squared error."""

    def __init__(self, config: ObjectiveConfig):
        super().__init__(config)
        self.path = FlowPath()

    def sample_levels(self, generator: torch.Generator, count: int, tokens: int) -> Tensor:
        """Draw levels from `config.distribution` and shift them for the clip's size."""
        shift = size_shift(self.config.shift, tokens, self.config.shift_tokens)
        return shift_levels(sample_levels(generator, count, self.config.distribution), shift)

    def estimate(self, output: Tensor, x: Tensor, levels: Tensor) -> Estimate:
        """Read the output as velocity."""
        return from_velocity(output.to(x.dtype), x, levels)

    def loss(self, output: Tensor, x: Tensor, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Squared error of the velocity."""
        return (output.float() - (noise - clean)).square().mean(dim=1)

    def sampling_shift(self, shift: float | None = None) -> float:
        """A shift of the call, of the config's sampling, or of its training; before it grows with the clip's size."""
        return shift or self.config.sampling_shift or self.config.shift

    def schedule(self, steps: int | str, tokens: int, shift: float | None = None, *, start: float = 1.0) -> Tensor:
        """Evenly spaced levels, shifted for the clip's size: from 1, or the last part of the way, which begins at `start`."""
        levels, moved = self.path.schedule(steps), self._steps_shift(tokens, shift)
        if start == 1:
            return shift_levels(levels, moved)
        # The inverse of a shift is that by its reciprocal, up to rounding, which the first level must not have.
        levels = shift_levels(levels * shift_levels(torch.tensor(start), 1 / moved), moved)
        levels[0] = start
        return levels

    def _steps_shift(self, tokens: int, shift: float | None = None) -> float:
        """The shift of the levels between which sampling steps."""
        return size_shift(self.sampling_shift(shift), tokens, self.config.shift_tokens)


class FlowMapObjective(FlowObjective):
    """Rectified flow whose network also learns mean velocities, for sampling in few steps (`diffusion.flow_map`)."""

    def sample(
        self, generator: torch.Generator, strategy: str, grid: Grid, tokens: int, level: float | None = None
    ) -> LevelSample:
        """As for flow, with the levels where a step ends; frames that do not move while others do are left out."""
        found = super().sample(generator, strategy, grid, tokens=tokens, level=level)
        if level is not None or float(torch.rand((), generator=generator)) < VELOCITY_SHARE:
            return found._replace(target=found.levels)
        kind = MASK_STRATEGIES[strategy]
        order: Order = "alone" if kind.teacher_forcing else "delayed" if kind.level_per_frame else "together"
        drawn = draw_segment(
            generator, found.mask, lambda levels: shift_levels(levels, self._steps_shift(tokens)), order
        )
        t, r = (part.view(-1, *[1] * (found.mask.ndim - 1)) for part in drawn)
        levels, target = (torch.where(found.mask, part, found.levels) for part in (t, r))
        return found._replace(levels=levels, target=target)


class DDPMObjective(Objective):
    """DDPM as in DiT: the network predicts epsilon, and the variance if it is learned.

    The loss is the squared error of epsilon, plus the variational bound in bits if the variance is learned.
    """

    def __init__(self, config: ObjectiveConfig):
        super().__init__(config)
        self.path = self.chain = DDPMPath(config.betas)
        self.learns_sigma = config.learn_sigma

    def sample_levels(self, generator: torch.Generator, count: int, tokens: int) -> Tensor:
        """Draw levels uniformly from the 1000 steps."""
        return ((sample_levels(generator, count, "uniform") * self.chain.num_steps).floor() + 1) / self.chain.num_steps

    def estimate(self, output: Tensor, x: Tensor, levels: Tensor) -> Estimate:
        """Read the output as epsilon, followed by the interpolation between the variances if they are learned."""
        if not self.learns_sigma:
            return from_epsilon(output.to(x.dtype), x, levels, self.path)
        epsilon, variance = output.to(x.dtype).chunk(2, dim=1)
        return from_epsilon(epsilon, x, levels, self.path)._replace(variance=variance)

    def loss(self, output: Tensor, x: Tensor, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Squared error of epsilon, plus the variational bound if the variance is learned."""
        if not self.learns_sigma:
            return (output.float() - noise).square().mean(dim=1)
        epsilon, variance = output.float().chunk(2, dim=1)
        simple = (epsilon - noise).square().mean(dim=1)
        # The bound trains only the variance, so no gradient flows through the mean.
        frozen = from_epsilon(epsilon.detach(), x, levels, self.path)._replace(variance=variance)
        bound = variational_bound(self.path, x, clean, frozen, levels=levels, one_step=1 / self.chain.num_steps)
        return simple + bound.mean(dim=1).to(simple.dtype)

    def schedule(self, steps: int | str, tokens: int, shift: float | None = None, *, start: float = 1.0) -> Tensor:
        """Levels of the chain's steps that `steps` selects; the clip's size and a shift have no influence."""
        levels = self.path.schedule(steps)
        return levels if start == 1 else self.path.quantize(levels / levels[0] * start)


OBJECTIVES: dict[str, type[Objective]] = {"flow": FlowObjective, "ddpm": DDPMObjective}


def build_objective(config: ObjectiveConfig) -> Objective:
    """Make the objective that a config names."""
    return FlowMapObjective(config) if config.flow_map else pick(OBJECTIVES, config.name, "objective")(config)

"""What a network is asked for, and how well it answered. DDPM and rectified flow behind one face."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from stdit.diffusion.levels import (
    DEFAULT_MASK_PROBS,
    MASK_STRATEGIES,
    Distribution,
    Grid,
    LevelSample,
    draw_levels,
    shift_levels,
    size_shift,
)
from stdit.diffusion.paths import BETAS, DDPMPath, FlowPath, Path, like
from stdit.diffusion.predictions import Estimate, from_epsilon, from_velocity
from stdit.diffusion.variational import variational_bound
from stdit.variants import pick


@dataclass
class ObjectiveConfig:
    """`shift` moves flow's levels toward noise; with `shift_tokens` it holds there and grows with the root of size.

    mask_strategy: what is known and who shares a level: one of `MASK_STRATEGIES`, or "mixed", where each clip takes one of them by its
    share in `shares`. cond_noise_max: known frames stand at a level drawn from 0 to this one, and the model is told.
    mask_ratio: a second pass in which the encoder of a masked trunk does not see this share of patches, or up to 0.2 more.
    betas: DDPM's schedule, linear (DiT) or scaled_linear (Stable Diffusion, U-ViT). learn_sigma: DDPM's variance is learned.
    mask_warmup_steps: the step at which "mixed" begins; before it all frames share a level. cond_timestep_shift: flow's levels beside known frames are shifted by this factor more, since what is known has been followed
    where noise is high, and at low noise shows itself.
    """

    name: Literal["flow", "ddpm"] = "flow"
    mask_strategy: str = "shared"
    mask_probs: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_MASK_PROBS))
    mask_warmup_steps: int = 0
    cond_noise_max: float = 0.0
    cond_timestep_shift: float = 1.0
    mask_ratio: float = 0.0
    betas: str = "linear"
    learn_sigma: bool = True
    distribution: Distribution = "logit_normal"
    shift: float = 1.0
    shift_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("shift", "cond_timestep_shift"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"objective.{name}={getattr(self, name)} is not positive; 1 leaves the levels as they are."
                )
        if self.mask_strategy != "mixed":
            pick({**MASK_STRATEGIES, "mixed": None}, self.mask_strategy, "objective.mask_strategy")
        pick(BETAS, self.betas, "objective.betas")
        for name, share in self.mask_probs.items():
            pick(MASK_STRATEGIES, name, "scheme in objective.mask_probs")
            if not 0 <= share < float("inf"):
                raise ValueError(f"objective.mask_probs.{name}={share} is no share; use 0 or more.")
        if not any(self.mask_probs.values()):
            raise ValueError("objective.mask_probs are all 0; give at least one scheme a share.")
        taught = [name for name, share in self.active_mask_probs.items() if MASK_STRATEGIES[name].taught]
        if taught and len(self.active_mask_probs) > 1:
            raise ValueError(
                f"objective.mask_probs.{taught[0]} shows clips a history of their own and mixes with no other scheme; set it to 0, "
                f"or use objective.mask_strategy={taught[0]}."
            )
        if self.mask_warmup_steps < 0:
            raise ValueError(f"objective.mask_warmup_steps={self.mask_warmup_steps} is no step; use 0 or more.")
        if not 0 <= self.mask_ratio <= 0.75:
            raise ValueError(f"objective.mask_ratio={self.mask_ratio} lies in 0 to 0.75; MDT v2 uses 0.3.")
        if not 0 <= self.cond_noise_max < 1:
            raise ValueError(
                f"objective.cond_noise_max={self.cond_noise_max} lies in [0, 1); 0 keeps known frames clean."
            )

    def mask_probs_at(self, step: int) -> dict[str, float]:
        """The schemes that clips of one training step draw from, with their shares."""
        return (
            {"shared": 1.0}
            if self.mask_strategy == "mixed" and step < self.mask_warmup_steps
            else self.active_mask_probs
        )

    @property
    def active_mask_probs(self) -> dict[str, float]:
        """The schemes that training takes, with their shares of the clips."""
        if self.mask_strategy != "mixed":
            return {self.mask_strategy: 1.0}
        total = sum(self.mask_probs.values())
        return {name: share / total for name, share in self.mask_probs.items() if share}


class Objective(ABC):
    """Noise for training, a loss per frame, and what the output means for a solver."""

    path: Path
    learns_sigma: bool = False

    def __init__(self, config: ObjectiveConfig):
        self.config = config

    def draw(self, generator: torch.Generator, scheme: str, grid: Grid, tokens: int) -> LevelSample:
        """Levels for one clip of `tokens` latent positions, (T,) or per patch of `grid`, and what of it is known."""
        frames = grid[0]
        kind = MASK_STRATEGIES[scheme]
        levels = self.draw_levels(generator, frames if kind.independent else 1, tokens).expand(frames)
        known = kind.known(generator, grid)
        if known.any() or kind.taught:
            levels = self.path.quantize(shift_levels(levels, self.config.cond_timestep_shift))
        clean = self.path.quantize(self.config.cond_noise_max * torch.rand((), generator=generator))
        levels = torch.where(known, clean, levels.view(-1, *[1] * (known.ndim - 1)))
        return LevelSample(levels, known, clean if kind.taught else None)

    @abstractmethod
    def draw_levels(self, generator: torch.Generator, count: int, tokens: int) -> Tensor:
        """(count,) independent levels for a clip of `tokens` latent positions."""

    @abstractmethod
    def estimate(self, output: Tensor, x: Tensor, levels: Tensor) -> Estimate:
        """What the network's output (B, C_out, T, h, w) at noisy x and levels (B, T|1) or (B, T, rows, columns) says."""

    @abstractmethod
    def loss(self, output: Tensor, x: Tensor, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """(B, T, h, w): the mean over channels."""

    def noisy(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """x_t (B, C, T, h, w) at levels (B, T|1) or (B, T, rows, columns)."""
        alpha, sigma = self.path.alpha_sigma(like(levels, clean))
        return alpha * clean + sigma * noise

    def timestep(self, levels: Tensor) -> Tensor:
        """Levels to the model's clock, same shape."""
        return self.path.timestep(levels)

    @abstractmethod
    def schedule(self, steps: int | str, tokens: int) -> Tensor:
        """(steps + 1,) levels from noise to 0 for sampling a clip of `tokens` latent positions."""


class FlowObjective(Objective):
    """Rectified flow: the velocity noise - clean, squared error."""

    def __init__(self, config: ObjectiveConfig):
        super().__init__(config)
        self.path = FlowPath()

    def _shift(self, levels: Tensor, tokens: int) -> Tensor:
        return shift_levels(levels, size_shift(self.config.shift, tokens, self.config.shift_tokens))

    def draw_levels(self, generator: torch.Generator, count: int, tokens: int) -> Tensor:
        return self._shift(draw_levels(generator, count, self.config.distribution), tokens)

    def estimate(self, output: Tensor, x: Tensor, levels: Tensor) -> Estimate:
        return from_velocity(output.to(x.dtype), x, levels)

    def loss(self, output: Tensor, x: Tensor, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        return (output.float() - (noise - clean)).square().mean(dim=1)

    def schedule(self, steps: int | str, tokens: int) -> Tensor:
        return self._shift(self.path.schedule(steps), tokens)


class DDPMObjective(Objective):
    """DiT's: epsilon with learned range variance; simple loss plus variational bound in bits. Or epsilon alone."""

    def __init__(self, config: ObjectiveConfig):
        super().__init__(config)
        self.path = DDPMPath(config.betas)
        self.learns_sigma = config.learn_sigma

    def draw_levels(self, generator: torch.Generator, count: int, tokens: int) -> Tensor:
        return ((draw_levels(generator, count, "uniform") * self.path.num_steps).floor() + 1) / self.path.num_steps

    def estimate(self, output: Tensor, x: Tensor, levels: Tensor) -> Estimate:
        if not self.learns_sigma:
            return from_epsilon(output.to(x.dtype), x, levels, self.path)
        epsilon, variance = output.to(x.dtype).chunk(2, dim=1)
        return from_epsilon(epsilon, x, levels, self.path)._replace(variance=variance)

    def loss(self, output: Tensor, x: Tensor, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        if not self.learns_sigma:
            return (output.float() - noise).square().mean(dim=1)
        epsilon, variance = output.float().chunk(2, dim=1)
        simple = (epsilon - noise).square().mean(dim=1)
        # The bound teaches the variance only: the mean is taken as it is.
        frozen = from_epsilon(epsilon.detach(), x, levels, self.path)._replace(variance=variance)
        bound = variational_bound(self.path, x, clean, frozen, levels, 1 / self.path.num_steps)
        return simple + bound.mean(dim=1).to(simple.dtype)

    def schedule(self, steps: int | str, tokens: int) -> Tensor:
        return self.path.schedule(steps)


OBJECTIVES: dict[str, type[Objective]] = {"flow": FlowObjective, "ddpm": DDPMObjective}


def build_objective(config: ObjectiveConfig) -> Objective:
    return pick(OBJECTIVES, config.name, "objective")(config)

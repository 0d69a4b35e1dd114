"""What a network is asked for, and how well it answered. DDPM and rectified flow behind one face."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stdit.diffusion.levels import Distribution, Scheme, draw_levels, shift_levels, size_shift
from stdit.diffusion.paths import DDPMPath, FlowPath, Path, like
from stdit.diffusion.predictions import Estimate, from_epsilon, from_velocity
from stdit.diffusion.variational import variational_bound
from stdit.variants import pick


@dataclass
class ObjectiveConfig:
    """`shift` moves flow's levels toward noise; with `shift_tokens` it holds there and grows with the root of size."""

    name: Literal["flow", "ddpm"] = "flow"
    scheme: Scheme = "shared"
    distribution: Distribution = "logit_normal"
    shift: float = 1.0
    shift_tokens: int = 0

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ValueError(f"objective.shift={self.shift} is not positive; 1 leaves the levels as they are.")


class Objective(ABC):
    """Noise for training, a loss per frame, and what the output means for a solver."""

    path: Path
    learns_sigma: bool = False

    def __init__(self, config: ObjectiveConfig):
        self.config = config

    @abstractmethod
    def draw(self, generator: torch.Generator, frames: int, tokens: int) -> Tensor:
        """(T,) levels for one clip of `tokens` latent positions."""

    @abstractmethod
    def estimate(self, output: Tensor, x: Tensor, levels: Tensor) -> Estimate:
        """What the network's output (B, C_out, T, h, w) at noisy x and levels (B, T|1) says."""

    @abstractmethod
    def loss(self, output: Tensor, x: Tensor, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """(B, T): the mean over channels and positions of every frame."""

    def noisy(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """x_t (B, C, T, h, w) at levels (B, T|1)."""
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

    def draw(self, generator: torch.Generator, frames: int, tokens: int) -> Tensor:
        return self._shift(draw_levels(generator, frames, self.config.distribution, self.config.scheme), tokens)

    def estimate(self, output: Tensor, x: Tensor, levels: Tensor) -> Estimate:
        return from_velocity(output.to(x.dtype), x, levels)

    def loss(self, output: Tensor, x: Tensor, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        return (output.float() - (noise - clean)).square().mean(dim=(1, 3, 4))

    def schedule(self, steps: int | str, tokens: int) -> Tensor:
        return self._shift(self.path.schedule(steps), tokens)


class DDPMObjective(Objective):
    """DiT's: epsilon with learned range variance; simple loss plus variational bound in bits."""

    learns_sigma = True

    def __init__(self, config: ObjectiveConfig):
        super().__init__(config)
        self.path = DDPMPath()

    def draw(self, generator: torch.Generator, frames: int, tokens: int) -> Tensor:
        uniform = draw_levels(generator, frames, "uniform", self.config.scheme)
        return ((uniform * self.path.num_steps).floor() + 1) / self.path.num_steps

    def estimate(self, output: Tensor, x: Tensor, levels: Tensor) -> Estimate:
        epsilon, variance = output.to(x.dtype).chunk(2, dim=1)
        return from_epsilon(epsilon, x, levels, self.path)._replace(variance=variance)

    def loss(self, output: Tensor, x: Tensor, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        epsilon, variance = output.float().chunk(2, dim=1)
        simple = (epsilon - noise).square().mean(dim=(1, 3, 4))
        # The bound teaches the variance only: the mean is taken as it is.
        frozen = from_epsilon(epsilon.detach(), x, levels, self.path)._replace(variance=variance)
        bound = variational_bound(self.path, x, clean, frozen, levels, 1 / self.path.num_steps)
        return simple + bound.mean(dim=(1, 3, 4)).to(simple.dtype)

    def schedule(self, steps: int | str, tokens: int) -> Tensor:
        return self.path.schedule(steps)


OBJECTIVES: dict[str, type[Objective]] = {"flow": FlowObjective, "ddpm": DDPMObjective}


def build_objective(config: ObjectiveConfig) -> Objective:
    return pick(OBJECTIVES, config.name, "objective")(config)

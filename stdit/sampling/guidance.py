"""Classifier-free guidance (Ho and Salimans) as a wrapper around a model."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from stdit.diffusion.objective import Objective


def guided(
    model: Callable[..., Tensor],
    objective: Objective,
    labels: Tensor | None,
    null_label: int,
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function (x, levels (B|1, T)) -> the model's output, guided on all latent channels, or on the first `channels`.

    Guidance acts while the noisiest frame's level lies in `interval` (Kynkaanniemi et al.); outside it, and at
    scale 1, the model runs once. A learned variance is the conditional one's. DiT's published samples were guided on
    three channels of four.
    """

    def run(x: Tensor, levels: Tensor, of: Tensor | None, context: str) -> Tensor:
        timestep = objective.timestep(levels).expand(len(x), -1)
        named = model.cache_context(context) if hasattr(model, "cache_context") else nullcontext()
        with named:
            hidden_states = x.to(getattr(model, "dtype", x.dtype))
            return model(hidden_states=hidden_states, timestep=timestep, class_labels=of).float()

    def output(x: Tensor, levels: Tensor) -> Tensor:
        noisiest = float(levels.max())
        if labels is None or scale == 1.0 or not interval[0] <= noisiest <= interval[1]:
            return run(x, levels, labels, "cond")
        null = torch.full_like(labels, null_label)
        # By name, and the unconditional half first: what FasterCache expects.
        both = run(torch.cat([x, x]), levels.expand(len(x), -1).repeat(2, 1), torch.cat([null, labels]), "cond_uncond")
        unconditional, conditional = both.chunk(2)
        some = channels or x.shape[1]
        mean = unconditional[:, :some] + scale * (conditional[:, :some] - unconditional[:, :some])
        return torch.cat([mean, conditional[:, some:]], dim=1)

    return output

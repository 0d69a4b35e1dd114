"""Classifier-free guidance (Ho and Salimans) as a wrapper around a model."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from stdit.diffusion.objective import Objective
from stdit.diffusion.paths import like
from stdit.prompt import Prompt


class Guidance(NamedTuple):
    """scale: toward the label (1: none), while the noisiest frame's level lies in `interval` (Kynkaanniemi et al.), on the
    first `channels` latent channels (None: all; DiT's published samples: three of four). history: toward what is known,
    by so much (Song et al., "History-Guided Video Diffusion"; 1: none)."""

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    channels: int | None = None
    history: float = 1.0


def guided(
    model: Callable[..., Tensor],
    objective: Objective,
    prompt: Prompt,
    guidance: Guidance = Guidance(),  # noqa: B008 (a tuple: nothing can change it)
    forgotten: Tensor | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function (x, levels (B|1, T) or by patches (B|1, T, rows, columns)) -> the model's output, guided.

    Outside the interval, and at scale 1, the model runs once. A learned variance is the conditional one's. forgotten:
    noise like x, seen in place of what is known (level 0) by the output that history guidance leads away from.
    """
    scale, interval, channels, history = guidance

    def run(x: Tensor, levels: Tensor, of: Prompt, context: str) -> Tensor:
        timestep = objective.timestep(levels)
        timestep = (timestep.flatten(2) if timestep.ndim > 2 else timestep).expand(
            len(x), *[-1] * (min(levels.ndim, 3) - 1)
        )
        network = getattr(model, "func", model)  # inside a partial, one that brings a cache
        named = network.cache_context(context) if hasattr(network, "cache_context") else nullcontext()
        with named:
            hidden_states = x.to(getattr(network, "dtype", x.dtype))
            return model(hidden_states=hidden_states, timestep=timestep, **of.named()).float()

    def output(x: Tensor, levels: Tensor) -> Tensor:
        noisiest = float(levels.max())
        if prompt.null is None or prompt.silent or scale == 1.0 or not interval[0] <= noisiest <= interval[1]:
            conditional = mean = run(x, levels, prompt, "cond")
        else:
            spread = levels.expand(len(x), *[-1] * (levels.ndim - 1))
            # By name, and the unconditional half first: what FasterCache expects.
            both = run(torch.cat([x, x]), torch.cat([spread, spread]), prompt.behind(prompt.null), "cond_uncond")
            unconditional, conditional = both.chunk(2)
            mean = unconditional + scale * (conditional - unconditional)
        known = levels == 0
        if history != 1.0 and forgotten is not None and bool(known.any()) and not bool(known.all()):
            blind = torch.where(like(known, x), forgotten, x)
            mean = mean + (history - 1) * (conditional - run(blind, torch.where(known, 1.0, levels), prompt, "blind"))
        some = channels or x.shape[1]
        return torch.cat([mean[:, :some], conditional[:, some:]], dim=1)

    return output

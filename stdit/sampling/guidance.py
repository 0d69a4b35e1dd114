"""Guidance around a model: classifier-free (Ho and Salimans), by a weaker model (Karras et al.), toward history (Song et al.)."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from stdit.conditions import Conditions, Guided
from stdit.conditions.values import concatenate
from stdit.diffusion.objective import Objective
from stdit.diffusion.paths import like
from stdit.nn.cache import FrameCache
from stdit.sampling.options import SamplingOptions


class Denoiser(Protocol):
    """A guided model: (x, levels) -> its output. target: for a flow map, the levels where the step ends."""

    def __call__(self, x: Tensor, levels: Tensor, target: Tensor | None = None) -> Tensor:
        """The model's output for x (B, C, T, h, w)."""


class Guidance(NamedTuple):
    """The strength of guidance, and the levels and channels at which it is applied.

    scale: 1 is none. interval: levels of the noisiest frame at which it is applied (Kynkaanniemi et al.). channels: the
    number of latent channels that are guided, from the first (DiT's published samples: three of four), None is all.
    history: guidance toward known frames (Song et al., "History-Guided Video Diffusion"), 1 is none. guider: a row of
    `GUIDERS`, what it leads away from. learnt: the model takes the scale as a condition.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    channels: int | None = None
    history: float = 1.0
    guider: str = "cfg"
    learnt: bool = False

    @classmethod
    def of(cls, options: SamplingOptions, default: float, guider: str = "cfg") -> Self:
        """The guidance of sampling options; `default`, `guider`: if they give none."""
        return cls(
            scale=default if options.guidance_scale is None else options.guidance_scale,
            guider=options.guider or guider,
            interval=options.guidance_interval or (0.0, 1.0),
            channels=options.guidance_channels,
            history=options.history_guidance,
        )

    @property
    def branches(self) -> int:
        """How often the network runs in a step: once where there is no guidance, or where it is learnt."""
        return 1 if self.scale == 1 or self.learnt else 2


_RESTORED = 0.7  # of the spread of a frame's numbers, which guidance away from a weaker model widens


def away_from_null(conditional: Tensor, null: Tensor, scale: float | Tensor, levels: Tensor) -> Tensor:
    """Classifier-free guidance: away from the output without conditions (Ho and Salimans, equation 6)."""
    return null + scale * (conditional - null)


def away_from_scaled_null(conditional: Tensor, null: Tensor, scale: float | Tensor, levels: Tensor) -> Tensor:
    """CFG-Zero* (Fan et al., equation 9): the output without conditions, scaled to be nearest to that with them."""
    over = tuple(range(1, null.ndim))
    share = (conditional * null).sum(over, keepdim=True) / null.square().sum(over, keepdim=True).clamp(min=1e-8)
    return away_from_null(conditional, share * null, scale, levels)


def away_from_weaker(conditional: Tensor, weaker: Tensor, scale: float | Tensor, levels: Tensor) -> Tensor:
    """Away from a weaker model's output (Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself").

    The mean of every channel over a frame, which a ground has its colour from, is left as it is: it is the lowest of the
    frequencies, which need less guidance than the others (Sadat et al., "Guidance in the Frequency Domain Enables
    High-Fidelity Sampling at Low CFG Scales"). The spread of every frame is brought back most of the way to that without
    guidance (Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4). Known patches of a
    frame, whose level is 0, count for neither.
    """
    generated = like(levels > 0, conditional).to(conditional).expand_as(conditional)
    count = generated.sum((3, 4), keepdim=True).clamp(min=1)
    mean, other_mean = ((x * generated).sum((3, 4), keepdim=True) / count for x in (conditional, weaker))
    own, others = (conditional - mean) * generated, (weaker - other_mean) * generated
    guided = others + scale * (own - others)
    before, after = (x.square().sum((1, 3, 4), keepdim=True).sqrt() for x in (own, guided))
    ratio = torch.where(after > 1e-8, before / after.clamp(min=1e-8), 1.0)  # of equal numbers there is no spread
    return conditional + (guided * (1 + _RESTORED * (ratio - 1)) - own)


# How outputs with conditions are led away from others: (outputs, others, scale, levels) -> outputs. The others are the
# outputs without conditions; of `auto` those of a weaker model, an earlier state of the same run.
GUIDERS: dict[str, Callable[[Tensor, Tensor, float | Tensor, Tensor], Tensor]] = {
    "cfg": away_from_null,
    "cfg_zero": away_from_scaled_null,
    "auto": away_from_weaker,
}


def guided(
    model: Callable[..., Tensor],
    objective: Objective,
    given: Guided,
    guidance: Guidance = Guidance(),  # noqa: B008 (a tuple: nothing can change it)
    *,
    weaker: Callable[..., Tensor] | None = None,
    noised_context: Tensor | None = None,
    cache: FrameCache | None = None,
    both: bool = False,
) -> Denoiser:
    """Make a function (x, levels, target) -> the model's output, guided.

    weaker: the model that the guider `auto` leads away from.

    levels: (B|1, T), or per patch (B|1, T, rows, columns). Outside the interval, and at scale 1, the model runs once. A
    learned variance is the conditional branch's. noised_context: noise like x; in the branch that history guidance
    leads away from, it replaces the known frames. cache: keys and values of earlier frames, for a causal model. both: run
    both branches also at scale 1, since the cache has keys and values of both.
    """
    extra: dict[str, Any] = {} if cache is None else {"cache": cache}
    alone = cache is None and given.unconditional  # with a cache, every frame runs the same branches
    null = None if (guidance.scale == 1.0 and not both) or alone or guidance.guider == "auto" else given.null
    weaker = weaker if guidance.scale != 1.0 and guidance.guider == "auto" else None
    combine = GUIDERS[guidance.guider]
    throughout = guidance.interval[0] <= 0 and guidance.interval[1] >= 1
    # Asking a model of diffusers for its type goes through all its modules, which takes longer than some steps.
    types = {one: getattr(one, "dtype", None) for one in (model, weaker)}

    def timestep(levels: Tensor, count: int) -> Tensor:
        found = objective.timestep(levels)
        return (found.flatten(2) if found.ndim > 2 else found).expand(count, *[-1] * (min(levels.ndim, 3) - 1))

    def run(
        x: Tensor,
        levels: Tensor,
        conditions: Conditions,
        target: Tensor | None,
        *,
        context: str,
        model: Callable[..., Tensor] = model,
    ) -> Tensor:
        ends = {} if target is None else {"target_timestep": timestep(target, len(x))}
        with model.cache_context(context) if hasattr(model, "cache_context") else nullcontext():
            hidden_states = x.to(types[model] or x.dtype)
            given = _arguments(model, conditions)
            return model(
                hidden_states=hidden_states, timestep=timestep(levels, len(x)), **given, **extra, **ends
            ).float()

    def twice(levels: Tensor, count: int) -> Tensor:
        return torch.cat([levels.expand(count, *[-1] * (levels.ndim - 1))] * 2)

    def output(x: Tensor, levels: Tensor, target: Tensor | None = None) -> Tensor:
        # Reading a level would wait until the device has done all steps before.
        inside = throughout or guidance.interval[0] <= float(levels.max()) <= guidance.interval[1]
        channels = guidance.channels or x.shape[1]
        other = None
        if null is None or not inside:
            conditional = run(x, levels, given.conditions, target, context="cond")
            if weaker is not None and inside:
                other = run(x, levels, given.conditions, target, context="cond", model=weaker)
        else:
            both_levels = twice(levels, len(x))
            both_targets = None if target is None else twice(target, len(x))
            # By keyword and with the unconditional half first, as diffusers' FasterCache expects.
            both = run(
                torch.cat([x, x]), both_levels, concatenate(null, given.conditions), both_targets, context="cond_uncond"
            )
            other, conditional = both.chunk(2)
        mean = conditional[:, :channels]
        if other is not None:
            mean = combine(mean, other[:, :channels], guidance.scale, levels)
        known = levels == 0
        if guidance.history != 1.0 and noised_context is not None and bool(known.any()) and not bool(known.all()):
            x_without = torch.where(like(known, x), noised_context, x)
            ends = None if target is None else torch.where(known, 1.0, target)
            uncond_history = run(
                x_without, torch.where(known, 1.0, levels), given.conditions, ends, context="uncond_history"
            )
            mean = mean + (guidance.history - 1) * (conditional - uncond_history)[:, :channels]
        return torch.cat([mean, conditional[:, channels:]], dim=1)

    return output


def _arguments(model: Callable[..., Tensor], conditions: Conditions) -> dict[str, Any]:
    """Conditions as arguments of the model: each by its keyword, because FasterCache splits batches by the names of tensors."""
    conditioners = getattr(model, "conditioners", None)
    if conditioners is None:
        return {"conditions": conditions}
    found: dict[str, Any] = {}
    for name, value in conditions.items():
        parts = (value,) if isinstance(value, Tensor) else value
        found |= {key: part for key, part in zip(conditioners[name].keywords, parts, strict=False) if part is not None}
    return found

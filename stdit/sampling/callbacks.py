"""diffusers' `callback_on_step_end`, and the properties of a pipeline that such callbacks read and set."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stdit.conditions import Caption, Conditions, Guided
from stdit.conditions.values import Tokens
from stdit.sampling.steps import OnStep, StepEnd

# (pipeline, step, timestep, tensors by name) -> tensors by name, those to be replaced
Callback = Callable[[Any, int, Any, dict[str, Tensor]], dict[str, Tensor] | None]
_EMBEDS = ("prompt_embeds", "negative_prompt_embeds")
TENSOR_INPUTS = ("latents", *_EMBEDS)


class CallbackState:
    """The state of a call that diffusers' pipelines have.

    A callback sets `_interrupt` to leave out the steps that follow, and `_guidance_scale` to change guidance from the next
    step on (at most 1: none). Both hold for the window, streamed frame or batch in which they are set.
    """

    _callback_tensor_inputs = list(TENSOR_INPUTS)
    _guidance_scale = 1.0
    _num_timesteps = 0
    _current_timestep: Any = None
    _interrupt = False

    @property
    def guidance_scale(self) -> float:
        """The scale of guidance now."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the scale is above 1."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """The number of steps of a window or streamed frame."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Any:
        """The timestep of the step that has ended; None when no call runs."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Whether the steps that follow are left out."""
        return self._interrupt

    def _step_function(self, callback: Callback | None, inputs: Sequence[str]) -> OnStep | None:
        """What samplers call after every step, for a callback of diffusers."""
        if callback is None:
            return None

        def on_step(end: StepEnd) -> StepEnd:
            scale = self._guidance_scale = end.guidance.scale
            self._num_timesteps, self._current_timestep, self._interrupt = end.steps, end.timestep, False
            held = {"latents": end.latents, **_embeds(end.given)}
            # Copies, since a callback may change them in place; without captions, tokens of no length for diffusers' callbacks.
            copies = {name: held[name].clone() if name in held else end.latents.new_zeros(0, 0, 0) for name in inputs}
            result = callback(self, end.step, end.timestep, dict(copies))
            guidance, cut_off = end.guidance, False
            if self._guidance_scale != scale:
                cut_off = _checked_scale(self._guidance_scale) <= 1
                guidance = guidance._replace(scale=max(1.0, self._guidance_scale))
            changed = _changed(held, copies, result, cut_off=cut_off)
            given = end.given
            for name, part in zip(_EMBEDS, ("conditions", "null"), strict=True):
                if name in changed:
                    given = given._replace(**{part: _with_tokens(getattr(given, part), changed[name])})
            latents = changed.get("latents", end.latents)
            return end._replace(latents=latents, given=given, guidance=guidance, stop=self._interrupt)

        return on_step


def _embeds(given: Guided) -> dict[str, Tensor]:
    """Tokens (B, L, C) of the captions and of what guidance leads away from, by diffusers' names."""
    branches = zip(_EMBEDS, (given.conditions, given.null), strict=True)
    values = {name: (conditions or {}).get(Caption.name) for name, conditions in branches}
    return {name: value.tokens[:, 0] for name, value in values.items() if isinstance(value, Tokens)}


def _changed(
    held: Mapping[str, Tensor], copies: Mapping[str, Tensor], result: Any, *, cut_off: bool
) -> dict[str, Tensor]:
    """The tensors by name that a callback has changed, in place or by returning others.

    held: those that a call goes on with. copies: the copies that the callback was given. cut_off: whether the callback turned
    guidance off. ValueError for a result that is no dict, an unknown name, or anything but a tensor of the shape that is held
    (tokens may have another length).
    """
    if result is not None and not isinstance(result, Mapping):
        raise ValueError(
            f"callback_on_step_end returned a {type(result).__name__}; return a dict of tensors by name, or nothing."
        )
    found: dict[str, Tensor] = {}
    for name, value in {**copies, **(result or {})}.items():
        if name not in held and name not in copies:
            raise ValueError(f"callback_on_step_end returned {name!r}; this call has {', '.join(held)}.")
        if not isinstance(value, Tensor):
            raise ValueError(f"callback_on_step_end returned a {type(value).__name__} as {name}; return a tensor.")
        before = held.get(name, copies.get(name))
        assert before is not None
        if value.shape == before.shape and (value is before or torch.equal(value.to(before), before)):
            continue
        # diffusers' callbacks that turn guidance off keep the last of the texts, which in its pipelines are the ones with a
        # condition, after those without; here there are none but these.
        if cut_off and name in _EMBEDS and torch.equal(value.to(before), copies.get(name, before)[-1:]):
            continue
        fixed = slice(None) if name == "latents" else slice(0, None, 2)
        if value.ndim != before.ndim or value.shape[fixed] != before.shape[fixed]:
            raise ValueError(
                f"callback_on_step_end returned {name} of shape {tuple(value.shape)}; this call goes on with {tuple(before.shape)}."
            )
        found[name] = value
    return found


def _checked_scale(scale: Any) -> float:
    """The scale that a callback has set; ValueError unless it is a finite number."""
    try:
        if not isinstance(scale, str | bool) and math.isfinite(scale):
            return scale
    except (TypeError, ValueError):
        pass
    raise ValueError(f"a callback set _guidance_scale to {scale!r}; set a number, 1 for no guidance.")


def _with_tokens(conditions: Conditions, tokens: Tensor) -> Conditions:
    """Conditions with other caption tokens (B, L, C); the mask stays if the length does."""
    before = conditions[Caption.name]
    assert isinstance(before, Tokens)
    mask = before.mask if before.mask is not None and before.mask.shape[-1] == tokens.shape[1] else None
    return {**conditions, Caption.name: Tokens(tokens[:, None].to(before.tokens), mask)}

"""diffusers' `callback_on_step_end`, and the properties of a pipeline that such callbacks read and set."""

from collections.abc import Callable, Sequence
from typing import Any

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
            tensors = {"latents": end.latents, **_embeds(end.given)}
            changed = callback(self, end.step, end.timestep, {name: tensors[name] for name in inputs}) or {}
            given = end.given
            for name, part in zip(_EMBEDS, ("conditions", "null"), strict=True):
                if (tokens := changed.get(name)) is not None and tokens is not tensors.get(name):
                    given = given._replace(**{part: _with_tokens(getattr(given, part), tokens)})
            guidance = end.guidance
            if self._guidance_scale != scale:
                guidance = guidance._replace(scale=max(1.0, self._guidance_scale))
            latents = changed.get("latents", end.latents)
            return end._replace(latents=latents, given=given, guidance=guidance, stop=self._interrupt)

        return on_step


def _embeds(given: Guided) -> dict[str, Tensor]:
    """Tokens (B, L, C) of the captions and of what guidance leads away from, by diffusers' names."""
    branches = zip(_EMBEDS, (given.conditions, given.null), strict=True)
    values = {name: (conditions or {}).get(Caption.name) for name, conditions in branches}
    return {name: value.tokens[:, 0] for name, value in values.items() if isinstance(value, Tokens)}


def _with_tokens(conditions: Conditions, tokens: Tensor) -> Conditions:
    """Conditions with other caption tokens (B, L, C); the mask stays if the length does."""
    before = conditions[Caption.name]
    assert isinstance(before, Tokens)
    mask = before.mask if before.mask is not None and before.mask.shape[-1] == tokens.shape[1] else None
    return {**conditions, Caption.name: Tokens(tokens[:, None].to(before.tokens), mask)}

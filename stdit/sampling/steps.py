"""What a caller sees after every step of a solver, and may change for the steps that follow."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from stdit.conditions import Guided
from stdit.sampling.guidance import Denoiser, Guidance


class StepEnd(NamedTuple):
    """The end of a step, of one window or streamed frame of a batch of clips.

    step: its number, from 0, of `steps`. timestep: where the noisiest frame began it, on the model's 0 to 1000. latents:
    (B, C, T, h, w). stop: leave out the steps that follow.
    """

    step: int
    steps: int
    timestep: Tensor
    latents: Tensor
    given: Guided
    guidance: Guidance
    stop: bool = False


OnStep = Callable[[StepEnd], StepEnd]


class SteeredDenoiser:
    """A guided model whose conditions and guidance a function may change after every step.

    make: makes the guided model. on_step: None changes nothing.
    """

    def __init__(
        self,
        make: Callable[[Guided, Guidance], Denoiser],
        given: Guided,
        guidance: Guidance,
        on_step: OnStep | None = None,
    ):
        self.make, self.given, self.guidance, self.on_step = make, given, guidance, on_step
        self.output = make(given, guidance)

    def __call__(self, x: Tensor, levels: Tensor, target: Tensor | None = None) -> Tensor:
        """The output of the model as it is guided now."""
        return self.output(x, levels, target)

    def end_step(self, step: int, steps: int, timestep: Tensor, latents: Tensor) -> tuple[Tensor, bool]:
        """The latents to go on with, and whether to stop here."""
        if self.on_step is None:
            return latents, False
        end = self.on_step(StepEnd(step, steps, timestep, latents, given=self.given, guidance=self.guidance))
        if end.given is not self.given or end.guidance != self.guidance:
            self.given, self.guidance = end.given, end.guidance
            self.output = self.make(end.given, end.guidance)
        return end.latents, end.stop

"""Fills a canvas: window by window, known pixels to latents, a plan, a solver, pixels again."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from stdit.conditions import ClipFacts
from stdit.diffusion.predictions import Estimate
from stdit.prompt import Prompt
from stdit.rng import keyed_normal
from stdit.sampling.autoregressive import stream
from stdit.sampling.conditioning import clamp_to_bounds, encode_known, latent_masks, paste, pixel_guided, start
from stdit.sampling.guidance import Guidance, guided
from stdit.sampling.schedule import make_schedule
from stdit.sampling.scheduler import STDiTScheduler
from stdit.sampling.solvers import solve
from stdit.sampling.tasks import Canvas
from stdit.sampling.windows import next_window

if TYPE_CHECKING:
    from stdit.sampling.pipeline import STDiTPipeline

_FORGOTTEN = 2**31  # the noise that stands for history, beside that of the steps


class Sampler(NamedTuple):
    """One call's choices: how a canvas is filled by a pipeline's model."""

    pipe: "STDiTPipeline"
    steps: int | str
    guidance: Guidance
    solver: str | None
    arrangement: str = "together"
    every: int = 1
    blend: int | None = 0  # None: known pixels are not put back
    tile: int | None = None
    fps: float | None = None

    @property
    def own(self) -> STDiTScheduler:
        """The pipeline's scheduler if it is ours, else ours for its objective."""
        scheduler = self.pipe.scheduler
        return scheduler if isinstance(scheduler, STDiTScheduler) else STDiTScheduler(self.pipe.config.objective)

    @property
    def foreign(self) -> bool:
        """Whether a diffusers scheduler steps; a solver asked for by name is one of ours."""
        return self.own is not self.pipe.scheduler and self.solver is None

    def network(self, frames: int, height: int, width: int) -> Callable[..., Tensor]:
        """The model, told what it was made to be told of a clip."""
        model, config = self.pipe.transformer, self.pipe.config
        if not model.config.micro_conditions:
            return model
        facts = ClipFacts((frames, height, width), self.fps or config.fps)
        value = model.conditioners["micro"].of_clip(facts).to(self.pipe.device)
        return partial(model, conditions={"micro": value})

    def fill(self, canvas: Canvas, prompt: Prompt, keys: list[tuple[int, ...]], length: int, overlap: int) -> Tensor:
        """Every window in turn; what one made is known to the next. A causal model goes on frame by frame."""
        stride = self.pipe.video_vae.stride[0]
        if self.pipe.transformer.config.causal and self.goes_forward(canvas):
            known = canvas.pixels[:, :, : int((~canvas.made).sum())]
            _, _, frames, height, width = canvas.pixels.shape
            size = (frames, height, width)
            return torch.cat([known, *stream(self, known, size, prompt, keys)], dim=2)
        frames, number = canvas.pixels.shape[2], 0
        canvas = canvas.lengthened(length)
        pixels, made = canvas.pixels.clone(), canvas.made.clone()
        while (window := next_window(made.flatten(1).any(1), length, overlap, stride)) is not None:
            view = slice(window.begin, window.end)
            between = None if canvas.between is None else canvas.between[:, :, :, view]
            part = canvas._replace(pixels=pixels[:, :, view], made=made[view], between=between)
            # The first window's keys are those of a canvas that needs only one.
            done = self._window(part, prompt, [(*key, number) for key in keys] if number else keys)
            kept = slice(window.keep_from, window.keep_to)
            pixels[:, :, kept] = done[:, :, kept.start - window.begin : kept.stop - window.begin]
            made[kept] = False
            number += 1
        return pixels[:, :, :frames]

    def goes_forward(self, canvas: Canvas) -> bool:
        """Whether nothing or whole groups of first frames are known, and all after them is to be made from noise."""
        made, begin = canvas.made, int((~canvas.made[:, 0, 0]).sum())
        whole = begin == 0 or (begin - 1) % self.pipe.video_vae.stride[0] == 0
        return made.shape[1] == 1 and whole and bool(made[begin:].all()) and canvas.strength == 1 and self.blend == 0

    def _window(self, canvas: Canvas, prompt: Prompt, keys: list[tuple[int, ...]]) -> Tensor:
        pipe, vae = self.pipe, self.pipe.video_vae
        objective, device = self.own.objective, pipe.device
        pixels, made = canvas.pixels.to(device), canvas.made.to(device)
        _, _, frames, height, width = pixels.shape
        shape = vae.latent_shape(frames, height, width, pipe.transformer.patch_size)

        def draw(step: int) -> Tensor:
            return keyed_normal("noise", [(*key, step) for key in keys], (vae.channels, *shape)).to(device)

        todo, partly = latent_masks(made, vae, pipe.transformer.patch_size)
        noise = draw(0)
        forgotten = draw(_FORGOTTEN) if self.guidance.history != 1 else None
        output = guided(
            self.network(frames, height, width),
            objective,
            prompt,
            self.guidance,
            forgotten,
        )
        if self.foreign:
            return pipe.decode(self._diffusers(output, noise), self.tile)
        schedule = objective.schedule(self.steps, shape[0] * shape[1] * shape[2])
        base = None
        if canvas.strength < 1:
            schedule = objective.path.quantize(schedule / schedule[0] * canvas.strength)
            base = vae.encode(pixels.to(vae.dtype)).float()
        plan = start(
            encode_known(pixels, made, todo, vae).float(), base, noise, todo,
            make_schedule(schedule.to(device), todo, self.arrangement, self.every), objective.path,
        )  # fmt: skip

        def predict(x: Tensor, levels: Tensor) -> Estimate:
            return objective.estimate(output(x, levels), x, levels)

        helped = (
            pixel_guided(
                predict, pixels, made, partly, canvas.between, vae, objective.path, partial(pipe.decode, tile=self.tile)
            )
            if partly.any()
            else predict
        )
        solver = self.solver or self.own.solver
        latents = solve(plan, helped, objective.path, solver, lambda step: draw(step + 1), pipe.progress_bar)
        decoded = clamp_to_bounds(pipe.decode(latents, self.tile), canvas.between)
        return decoded if self.blend is None else paste(decoded, canvas.pixels.cpu(), canvas.made.cpu(), self.blend)

    def _diffusers(self, output: Callable, x: Tensor) -> Tensor:
        """The same with a diffusers scheduler: one level for all frames."""
        scheduler, objective = self.pipe.scheduler, self.own.objective
        scheduler.set_timesteps(self.steps, device=self.pipe.device)
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
        learned = scheduler.config.get("variance_type") in ("learned", "learned_range")
        for t in self.pipe.progress_bar(scheduler.timesteps):
            levels = objective.path.levels(t).expand(1, x.shape[2])
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            predicted = output(scaled, levels)
            if not learned:
                predicted = predicted[:, : x.shape[1]]
            x = scheduler.step(predicted, t, x, return_dict=False)[0]
        return x

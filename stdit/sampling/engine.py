"""A trained model ready to sample: the network, its VAE, objective and scheduler, and the clips of its training."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from stdit.conditions import ClipFacts, Conditions, Guided, LearntGuidance
from stdit.diffusion.levels import GUIDE_INTERVAL
from stdit.diffusion.objective import Objective
from stdit.diffusion.predictions import Estimate
from stdit.model.stdit import STDiT
from stdit.model.unet import UNet
from stdit.nn.cache import FrameCache
from stdit.progress import Progress
from stdit.rng import keyed_normal
from stdit.sampling.guidance import Denoiser, Guidance, guided
from stdit.sampling.options import SamplingOptions
from stdit.sampling.scheduler import STDiTScheduler
from stdit.sampling.solvers import EndStep, Predict
from stdit.sampling.steps import SteeredDenoiser
from stdit.vae import VideoVAE
from stdit.vae.tiling import decode

Keys = Sequence[tuple[int, ...]]  # (seed, clip, ...) of every clip of a batch, which decides its noise
Size = tuple[int, int, int]  # frames, height, width


def check_latents(latents: Tensor) -> None:
    """Raise ValueError if sampled latents are not finite: their pixels would be black or noise."""
    if not torch.isfinite(latents).all():
        raise ValueError(
            "the sampled latents have numbers that are not finite, so nothing is written; lower the guidance, use "
            "precision='fp32', or take an earlier checkpoint."
        )


class TrainedOn(NamedTuple):
    """Size and rate of the clips of training, and the names of the mask strategies that chose known frames."""

    num_frames: int
    height: int
    width: int
    fps: float
    mask_strategies: tuple[str, ...]


@dataclass(frozen=True)
class Engine:
    """A trained model ready to sample, for the samplers in `windowed` and `autoregressive`.

    scheduler: stdit's, or one of diffusers. objective: that of training, whatever the scheduler. guide: a weaker model to
    lead away from, an earlier state of the same run. history_noise, tile: of calls that give none. progress_bar: arguments of
    tqdm.
    """

    model: STDiT | UNet
    vae: VideoVAE
    objective: Objective
    scheduler: SchedulerMixin
    trained_on: TrainedOn
    device: torch.device
    guide: STDiT | UNet | None = None
    history_noise: float = 0.0
    tile: int | None = None
    progress_bar: Mapping[str, Any] = field(default_factory=dict)

    def uses_diffusers(self, solver: str | None) -> bool:
        """Whether a diffusers scheduler takes the steps; a solver given by name is one of stdit's."""
        return solver is None and not isinstance(self.scheduler, STDiTScheduler)

    @property
    def default_solver(self) -> str:
        """The solver of stdit's scheduler, or the objective's default in place of a diffusers scheduler."""
        scheduler = self.scheduler
        ours = scheduler if isinstance(scheduler, STDiTScheduler) else STDiTScheduler(self.objective.config.name)
        return ours.solver

    @property
    def distilled_guidance(self) -> float:
        """The guidance scale that the model has learnt; 1: none."""
        return getattr(self.model.config, "distilled_guidance", 1.0)

    @property
    def learnt_guidance(self) -> LearntGuidance | None:
        """The condition on guidance scales of a model that has learnt many; None: it has none."""
        found = self.model.conditioners.get("guidance")
        return found if isinstance(found, LearntGuidance) else None

    @property
    def default_guidance(self) -> float:
        """The guidance scale of calls that give none.

        2, or the largest if the model has learnt scales below; 1 if it has learnt a single one, or takes actions alone.
        """
        return self._default_guidance(self.default_guider)

    def _default_guidance(self, guider: str) -> float:
        if self.learnt_guidance is not None:
            return min(2.0, self.learnt_guidance.scales.get(guider, 2.0))
        conditioners = self.model.conditioners.values()
        unguided = bool(conditioners) and not any(conditioner.guided_by_default for conditioner in conditioners)
        return 1.0 if unguided or self.distilled_guidance != 1 else 2.0

    @property
    def default_guider(self) -> str:
        """The guider of calls that give none."""
        learnt = self.learnt_guidance
        by_guide = self.guide is not None if learnt is None else "auto" in learnt.scales
        return "auto" if by_guide else "cfg"

    def guidance(self, options: SamplingOptions) -> Guidance:
        """The guidance of a call, with the model's defaults for what it does not say."""
        guider = options.guider or self.default_guider
        found = Guidance.of(options, self._default_guidance(guider), guider)
        learnt = self.learnt_guidance is not None
        if (
            options.guidance_interval is None
            and guider == "auto"
            and self.objective.config.name == "flow"
            and not learnt
        ):
            found = found._replace(interval=GUIDE_INTERVAL)
        return found._replace(learnt=learnt)

    def resolved(self, options: SamplingOptions) -> dict[str, Any]:
        """What a call takes for the options that are the model's where they are not given.

        null: what has no influence; the guider of a causal model, which depends on whether the clip is streamed; the shift
        of a diffusers scheduler, which has its own.
        """
        guidance, causal = self.guidance(options), bool(self.model.config.causal)
        theirs = self.uses_diffusers(options.solver)
        leads = guidance.guider == "auto" or any(one.guided for one in self.model.conditioners.values())
        guided = guidance.scale != 1 and (leads or guidance.learnt)
        known = guided and (guidance.learnt or not causal or options.guider is not None)
        noise = self.history_noise if options.history_noise is None else options.history_noise
        return {
            "shift": None if theirs else self.objective.sampling_shift(options.shift),
            "guidance_scale": guidance.scale if guided else options.guidance_scale or 1.0,
            "guider": guidance.guider if known else None,
            "guidance_interval": guidance.interval if known and not guidance.learnt else options.guidance_interval,
            "history_noise": noise if causal else None,
            "solver": type(self.scheduler).__name__ if theirs else options.solver or self.default_solver,
        }

    def latent_shape(self, size: Size) -> Size:
        """The shape (T, h, w) of a clip's latents; ValueError if the clip does not fit the VAE or the patches."""
        return self.vae.latent_shape(*size, self.model.patch_size)

    def schedule(self, options: SamplingOptions, latent_shape: Size, start: float = 1.0) -> Tensor:
        """The noise levels (steps + 1,), from `start` to 0, of a call for a clip of this latent shape."""
        tokens = math.prod(latent_shape)
        levels = self.objective.schedule(options.num_inference_steps, tokens, options.shift, start=start)
        if options.shift is not None and start and not bool(levels.isfinite().all() & (levels.diff() < 0).all()):
            raise ValueError(
                f"shift={options.shift} (--shift) puts several of {len(levels) - 1} steps at one noise level; give one between 0.01 "
                "and 100, where 1 is no shift."
            )
        return levels

    def draw(self, keys: Keys, step: int, latent_shape: Size) -> Tensor:
        """Draw noise (B, C, T, h, w) that is a function of each clip's key and `step` alone."""
        shape = (self.vae.channels, *latent_shape)
        return keyed_normal("noise", [(*key, step) for key in keys], shape).to(self.device)

    def with_clip_facts(self, given: Guided, size: Size, fps: float | None) -> Guided:
        """Add the conditions that follow from the clip (rate, duration, size) to both branches of guidance."""
        clip = ClipFacts(size, fps or self.trained_on.fps)
        found: Conditions = {}
        for name, conditioner in self.model.conditioners.items():
            value = conditioner.of_clip(clip)
            if isinstance(value, Tensor):
                found[name] = value.to(self.device)
        return given.change(lambda conditions: {**conditions, **found})

    def conditions_at(self, given: Guided, frames: Sequence[int], total: int, *, starts: bool) -> Guided:
        """The conditions of latent frames that end at pixel frames `frames` of an output of `total` frames.

        starts: whether the first of them is encoded alone, as the start of a clip.
        """
        conditioners, stride = self.model.conditioners, self.vae.stride[0]

        def at(conditions: Conditions) -> Conditions:
            return {
                name: conditioners[name].at(value, frames, total, stride=stride, starts=starts)
                for name, value in conditions.items()
            }

        return given.change(at)

    def denoiser(
        self,
        given: Guided,
        guidance: Guidance,
        *,
        noised_context: Tensor | None = None,
        cache: FrameCache | None = None,
        both: bool = False,
    ) -> Denoiser:
        """Make a function (x, levels, target) -> output of the guided model; arguments: those of `guided`."""
        if guidance.learnt:
            assert self.learnt_guidance is not None
            scales = self.learnt_guidance.at_scale(guidance.guider, guidance.scale).to(self.device)
            given = given.change(lambda conditions: {**conditions, "guidance": scales})
            guidance = guidance._replace(scale=1.0, guider="cfg")
        return guided(
            self.model, self.objective, given, guidance,
            weaker=self.guide, noised_context=noised_context, cache=cache, both=both,
        )  # fmt: skip

    def predictor(self, output: Denoiser) -> Predict:
        """Make a function (x, levels, target) -> estimate of clean data and noise, from a denoiser."""

        def predict(x: Tensor, levels: Tensor, target: Tensor | None = None) -> Estimate:
            return self.objective.estimate(output(x, levels, target), x, levels)

        return predict

    def step_ends(self, output: SteeredDenoiser) -> EndStep | None:
        """What a solver calls after every step; None if nothing is to be called."""
        if output.on_step is None:
            return None

        def end_step(step: int, steps: int, level: Tensor, latents: Tensor) -> tuple[Tensor, bool]:
            return output.end_step(step, steps, self.objective.timestep(level), latents)

        return end_step

    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """Decode latents to pixels on the CPU, a few clips at a time; `tile`: the side of tiles in latents."""
        check_latents(latents)
        return decode(self.vae, latents, tile or self.tile)

    def progress(self, iterable: Iterable, show: bool | Callable[..., Iterable] = True, **bar: Any) -> Iterable:
        """Wrap an iterable with a progress bar, or as the function `show` does. bar: arguments of tqdm, such as `total`."""
        if callable(show):
            return show(iterable, **bar)
        bar = {"leave": False, **self.progress_bar, **bar}
        return Progress(iterable, **{**bar, "disable": not show or bar.get("disable", False)})

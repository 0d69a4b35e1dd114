"""Generate frame by frame with a causal model, whose cache holds keys and values of the finished frames."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stdit.conditions import Guided
from stdit.nn.cache import FrameCache
from stdit.sampling.canvas import Canvas
from stdit.sampling.engine import Engine, Keys, Size, check_latents
from stdit.sampling.guidance import Denoiser, Guidance
from stdit.sampling.options import SamplingOptions
from stdit.sampling.schedule import Schedule
from stdit.sampling.solvers import solve
from stdit.sampling.steps import OnStep, SteeredDenoiser

# Key of the noise with which finished frames are remembered; smaller keys are those of solver steps.
_HISTORY = 2**31


class Rollout:
    """Clips that grow by one latent frame at a time: the cache of the finished frames, and what comes next.

    size: height and width in pixels. keys: of the clips, which decide their noise. guided: whether any frame has conditions
    that guidance leads toward. noise: what all frames start from, (B, C, T, h, w); None: drawn by key. on_step: called
    after every step.
    """

    def __init__(
        self,
        engine: Engine,
        options: SamplingOptions,
        size: tuple[int, int],
        keys: Keys,
        *,
        guided: bool = True,
        noise: Tensor | None = None,
        on_step: OnStep | None = None,
    ):
        self.engine, self.keys, self.noise, self.on_step = engine, keys, noise, on_step
        self.cache = FrameCache(engine.model.config.window, engine.model.config.sink)
        self.solver = options.solver or engine.default_solver
        # Every call must run the same branches of guidance, since each branch has its own keys and values in the cache.
        guidance = engine.guidance(options)._replace(interval=(0.0, 1.0), history=1.0)
        if guidance.guider == "auto" and not guidance.learnt:  # the cache has the keys and values of one model
            guidance = guidance._replace(guider="cfg")
        self.guidance = guidance if guided else guidance._replace(scale=1.0)
        trained_frames = engine.trained_on.num_frames  # the duration that a model conditioned on it saw in training
        shape = engine.latent_shape((trained_frames, *size))
        self.levels = engine.schedule(options, shape)[:, None].to(engine.device)
        self._frame_shape = (1, *shape[1:])
        asked = engine.history_noise if options.history_noise is None else options.history_noise
        self.history_noise = engine.objective.path.quantize(torch.tensor(asked))

    @property
    def frames(self) -> int:
        """The number of finished latent frames."""
        return self.cache.frames

    def add(self, latents: Tensor, given: Guided) -> Tensor:
        """Write a finished frame (B, C, 1, h, w) into the cache, and return it. given: its conditions.

        It is remembered at the level `history_noise`, but for the frames of the model's sink.
        """
        check_latents(latents)
        engine, level = self.engine, torch.zeros(1, latents.shape[2], device=latents.device)
        remembered = latents
        if self.history_noise > 0 and self.frames >= engine.model.config.sink:
            level = level + self.history_noise.to(level)
            noise = engine.draw([(*key, self.frames) for key in self.keys], _HISTORY, self._frame_shape)
            remembered = engine.objective.noisy(latents, noise, level)
        self.cache.writing = True
        self._denoiser(given, self.guidance)(remembered, level)
        self.cache.writing = False
        return latents

    def generate(self, given: Guided) -> Tensor:
        """Generate the next frame (B, C, 1, h, w), and add it."""
        return self.add(self.predict(given), given)

    def predict(self, given: Guided) -> Tensor:
        """Generate the next frame from noise that is a function of the keys and its number; nothing is added."""
        engine, keys = self.engine, [(*key, self.frames) for key in self.keys]
        if self.noise is None:
            noise = engine.draw(keys, 0, self._frame_shape)
        else:
            noise = self.noise[:, :, self.frames, None].to(engine.device)
        output = SteeredDenoiser(self._denoiser, given, self.guidance, self.on_step)
        return solve(
            Schedule(noise, self.levels),
            engine.predictor(output),
            engine.objective.path,
            self.solver,
            draw=lambda step: engine.draw(keys, step + 1, self._frame_shape),
            end_step=engine.step_ends(output),
        )

    def copy(self) -> "Rollout":
        """The same clips, which can go on in another way."""
        other = copy.copy(self)
        other.cache = self.cache.copy()
        return other

    def _denoiser(self, given: Guided, guidance: Guidance) -> Denoiser:
        if self.guidance.learnt:
            return self.engine.denoiser(given, guidance, cache=self.cache)
        if self.guidance.scale == 1:  # whatever a callback asks for: the cache has keys and values of one branch
            return self.engine.denoiser(given, self.guidance, cache=self.cache)
        return self.engine.denoiser(given, guidance, cache=self.cache, both=True)


@dataclass(frozen=True)
class AutoregressiveSampler:
    """Generates one latent frame after another, each from noise to clean; time and memory per frame stay constant.

    noise: what all frames start from, (B, C, T, h, w); None: drawn by key. on_step: called after every step.
    """

    engine: Engine
    options: SamplingOptions
    noise: Tensor | None = None
    on_step: OnStep | None = None

    def fill(self, canvas: Canvas, given: Guided, keys: Keys) -> Tensor:
        """Fill a canvas whose known frames come first (`groups.is_continuation`); returns all its pixels."""
        known, size = _known_frames(canvas), _size(canvas)
        return torch.cat([known, *self.stream(known, size, given, keys, output=canvas.output_frames)], dim=2)

    def latent_shape(self, canvas: Canvas) -> Size:
        """The shape (T, h, w) of a canvas's latents."""
        return self.engine.latent_shape(_size(canvas))

    def latents(self, canvas: Canvas, given: Guided, keys: Keys) -> Tensor:
        """The latents (B, C, T, h, w) of a canvas, as `fill` would decode them."""
        frames = self._latent_frames(_known_frames(canvas), _size(canvas), given, keys, output=canvas.output_frames)
        return torch.cat(list(frames), dim=2)

    def stream(
        self, known: Tensor, size: Size, given: Guided, keys: Keys, *, output: range | None = None
    ) -> Iterator[Tensor]:
        """Yield groups of generated pixels (B, 3, f, H, W) as soon as each is finished.

        known: (B, 3, F, H, W), F = 0 or whole groups of the VAE. size: frames, height and width of the whole clip.
        given: conditions, those per frame for the frames `output` (None: of the whole clip).
        """
        vae = self.engine.vae
        latents = self._latent_frames(known, size, given, keys, output=output or range(size[0]))
        past = 0
        for pixels in vae.decode_stream(part.to(vae.dtype) for part in latents):
            new = pixels[:, :, max(0, known.shape[2] - past) :]
            past += pixels.shape[2]
            if new.shape[2]:
                yield new.clamp(-1, 1).float().cpu()

    def _latent_frames(
        self, known: Tensor, size: Size, given: Guided, keys: Keys, *, output: range
    ) -> Iterator[Tensor]:
        """Yield latents (B, C, 1, h, w): those of the known frames, then each generated one when it is finished."""
        engine, vae = self.engine, self.engine.vae
        trained_frames = engine.trained_on.num_frames  # the duration that a model conditioned on it saw in training
        given = engine.with_clip_facts(given, (trained_frames, *size[1:]), self.options.fps)
        rollout = Rollout(
            engine, self.options, size[1:], keys,
            guided=not given.unconditional or engine.learnt_guidance is not None, noise=self.noise, on_step=self.on_step,
        )  # fmt: skip

        def conditions() -> Guided:
            frame = rollout.frames
            return engine.conditions_at(given, [frame * vae.stride[0] - output.start], len(output), starts=frame == 0)

        if known.shape[2]:
            encoded = vae.encode(known.to(engine.device, vae.dtype)).float()
            for part in encoded.split(1, dim=2):
                yield rollout.add(part, conditions())
        total = engine.latent_shape(size)[0]
        for _ in engine.progress(range(rollout.frames, total), self.options.progress):
            yield rollout.generate(conditions())


def _known_frames(canvas: Canvas) -> Tensor:
    return canvas.pixels[:, :, : int((~canvas.mask).sum())]


def _size(canvas: Canvas) -> Size:
    frames, height, width = canvas.pixels.shape[2:]
    return frames, height, width

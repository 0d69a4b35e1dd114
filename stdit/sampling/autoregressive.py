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
from stdit.sampling.guidance import Denoiser
from stdit.sampling.options import SamplingOptions
from stdit.sampling.schedule import Schedule
from stdit.sampling.solvers import solve

# Key of the noise with which finished frames are remembered; smaller keys are those of solver steps.
_HISTORY = 2**31


class Rollout:
    """Clips that grow by one latent frame at a time: the cache of the finished frames, and what comes next.

    size: height and width in pixels. keys: of the clips, which decide their noise. guided: whether any frame has conditions
    that guidance leads toward.
    """

    def __init__(
        self, engine: Engine, options: SamplingOptions, size: tuple[int, int], keys: Keys, *, guided: bool = True
    ):
        self.engine, self.keys = engine, keys
        self.cache = FrameCache(engine.model.config.window, engine.model.config.sink)
        self.solver = options.solver or engine.default_solver
        # Every call must run the same branches of guidance, since each branch has its own keys and values in the cache.
        guidance = engine.guidance(options)._replace(interval=(0.0, 1.0), history=1.0)
        if guidance.guider == "auto":  # the cache has the keys and values of one model
            guidance = guidance._replace(guider="cfg")
        self.guidance = guidance if guided else guidance._replace(scale=1.0)
        trained_frames = engine.trained_on.num_frames  # the duration that a model conditioned on it saw in training
        shape = engine.latent_shape((trained_frames, *size))
        self.levels = engine.schedule(options.num_inference_steps, shape)[:, None].to(engine.device)
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
        self._denoiser(given)(remembered, level)
        self.cache.writing = False
        return latents

    def generate(self, given: Guided) -> Tensor:
        """Generate the next frame (B, C, 1, h, w), and add it."""
        return self.add(self.predict(given), given)

    def predict(self, given: Guided) -> Tensor:
        """Generate the next frame from noise that is a function of the keys and its number; nothing is added."""
        engine, keys = self.engine, [(*key, self.frames) for key in self.keys]
        return solve(
            Schedule(engine.draw(keys, 0, self._frame_shape), self.levels),
            engine.predictor(self._denoiser(given)),
            engine.objective.path,
            self.solver,
            draw=lambda step: engine.draw(keys, step + 1, self._frame_shape),
        )

    def copy(self) -> "Rollout":
        """The same clips, which can go on in another way."""
        other = copy.copy(self)
        other.cache = self.cache.copy()
        return other

    def _denoiser(self, given: Guided) -> Denoiser:
        return self.engine.denoiser(given, self.guidance, cache=self.cache)


@dataclass(frozen=True)
class AutoregressiveSampler:
    """Generates one latent frame after another, each from noise to clean; time and memory per frame stay constant."""

    engine: Engine
    options: SamplingOptions

    def fill(self, canvas: Canvas, given: Guided, keys: Keys) -> Tensor:
        """Fill a canvas whose known frames come first (`groups.is_continuation`); returns all its pixels."""
        known = canvas.pixels[:, :, : int((~canvas.mask).sum())]
        frames, height, width = canvas.pixels.shape[2:]
        parts = self.stream(known, (frames, height, width), given, keys, output=canvas.output_frames)
        return torch.cat([known, *parts], dim=2)

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
        rollout = Rollout(engine, self.options, size[1:], keys, guided=not given.unconditional)

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

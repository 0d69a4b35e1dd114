"""Generate frame by frame with a causal model, whose cache holds keys and values of the finished frames."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from stdit.conditions import Guided
from stdit.conditions.values import frames as select_frames
from stdit.nn.cache import FrameCache
from stdit.sampling.canvas import Canvas
from stdit.sampling.conditioning import condition_frames
from stdit.sampling.engine import Engine, Keys, Size, check_latents
from stdit.sampling.guidance import Denoiser
from stdit.sampling.options import SamplingOptions
from stdit.sampling.schedule import Schedule
from stdit.sampling.solvers import solve


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
        given: conditions, those per latent frame for the latent frames of the pixel frames `output` (None: of the whole
        clip).
        """
        engine, vae = self.engine, self.engine.vae
        output = output or range(size[0])
        condition_index = condition_frames(0, engine.latent_shape(size)[0], output=output, stride=vae.stride[0])
        latents = self._latent_frames(known, size, given, keys, condition_index=condition_index)
        past = 0
        for pixels in vae.decode_stream(part.to(vae.dtype) for part in latents):
            new = pixels[:, :, max(0, known.shape[2] - past) :]
            past += pixels.shape[2]
            if new.shape[2]:
                yield new.clamp(-1, 1).float().cpu()

    def _latent_frames(
        self, known: Tensor, size: Size, given: Guided, keys: Keys, *, condition_index: list[int]
    ) -> Iterator[Tensor]:
        """Yield latents (B, C, 1, h, w): those of the known frames, then each generated one when it is finished.

        condition_index: per latent frame, the index of its conditions.
        """
        engine, options, vae = self.engine, self.options, self.engine.vae
        config, path = engine.model.config, engine.objective.path
        shape = engine.latent_shape(size)
        frame_shape = (1, shape[1], shape[2])
        trained_frames = engine.trained_on.num_frames  # the duration that a model conditioned on it saw in training
        given = engine.with_clip_facts(given, (trained_frames, size[1], size[2]), options.fps)
        cache = FrameCache(config.window, config.sink)
        # Every call must run the same branches of guidance, since each branch has its own keys and values in the cache.
        guidance = engine.guidance(options)._replace(interval=(0.0, 1.0), history=1.0)
        if guidance.guider == "auto":  # the cache has the keys and values of one model
            guidance = guidance._replace(guider="cfg")

        def denoiser(frame: int) -> Denoiser:
            conditions = given.change(partial(select_frames, which=[condition_index[frame]]))
            return engine.denoiser(conditions, guidance, cache=cache)

        def finish(frame: int, latents: Tensor) -> Tensor:
            """Write a finished frame into the cache, at level 0."""
            check_latents(latents)
            cache.writing = True
            denoiser(frame)(latents, torch.zeros(1, latents.shape[2], device=latents.device))
            cache.writing = False
            return latents

        first = 0
        if known.shape[2]:
            encoded = vae.encode(known.to(engine.device, vae.dtype)).float()
            for part in encoded.split(1, dim=2):
                yield finish(first, part)
                first += 1
        levels = engine.schedule(options.num_inference_steps, (vae.latent_frames(trained_frames), *shape[1:]))
        levels = levels[:, None].to(engine.device)
        for frame in engine.progress(range(first, shape[0]), options.progress):
            frame_keys = [(*key, frame) for key in keys]

            def draw(step: int, frame_keys: Keys = frame_keys) -> Tensor:
                return engine.draw(frame_keys, step, frame_shape)

            latents = solve(
                Schedule(draw(0), levels),
                engine.predictor(denoiser(frame)),
                path,
                options.solver or engine.default_solver,
                draw=lambda step, draw=draw: draw(step + 1),  # type: ignore[misc]  # bound now: the loop rebinds it
            )
            yield finish(frame, latents)

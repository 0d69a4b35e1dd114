"""Minutes, not seconds: a causal model goes on frame by frame, remembering keys and values of the frames before."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stdit.diffusion.predictions import Estimate
from stdit.nn.cache import FrameCache
from stdit.prompt import Prompt
from stdit.rng import keyed_normal
from stdit.sampling.guidance import guided
from stdit.sampling.schedule import Schedule
from stdit.sampling.solvers import solve

if TYPE_CHECKING:
    from stdit.sampling.sampler import Sampler

Keys = list[tuple[int, ...]]


def stream(
    sampler: "Sampler", known: Tensor, size: tuple[int, int, int], prompt: Prompt, keys: Keys
) -> Iterator[Tensor]:
    """The made groups of pixels (B, 3, f, H, W) as they are finished, in constant time and memory each.

    known: (B, 3, F, H, W), F = 0 or whole groups; size: frames, height and width of the whole clip.
    """
    vae = sampler.pipe.video_vae
    first = vae.latent_frames(known.shape[2]) if known.shape[2] else 0
    shape = vae.latent_shape(*size, sampler.pipe.transformer.patch_size)
    network = sampler.network(sampler.pipe.config.num_frames, *size[1:])  # the length of what it saw in training
    latents = latent_frames(sampler, network, known.to(sampler.pipe.device), first, shape, prompt, keys)
    past = 0
    for pixels in vae.decode_stream(part.to(vae.dtype) for part in latents):
        new = pixels[:, :, max(0, known.shape[2] - past) :]
        past += pixels.shape[2]
        if new.shape[2]:
            yield new.clamp(-1, 1).float().cpu()


def latent_frames(
    sampler: "Sampler",
    network: Callable[..., Tensor],
    known: Tensor,
    first: int,
    shape: tuple[int, int, int],
    prompt: Prompt,
    keys: Keys,
) -> Iterator[Tensor]:
    """Latents (B, C, 1, h, w): the `first` known ones, then each of the others when it is finished."""
    pipe, vae, objective = sampler.pipe, sampler.pipe.video_vae, sampler.own.objective
    cache = FrameCache(pipe.transformer.config.window, pipe.transformer.config.sink)
    guidance = sampler.guidance._replace(
        interval=(0.0, 1.0), history=1.0
    )  # the cache needs the same calls at every level
    output = guided(partial(network, cache=cache), objective, prompt, guidance)

    def predict(x: Tensor, levels: Tensor) -> Estimate:
        return objective.estimate(output(x, levels), x, levels)

    def finish(latents: Tensor) -> Tensor:
        """A finished frame enters the cache at level 0."""
        cache.writing = True
        output(latents, torch.zeros(1, latents.shape[2], device=latents.device))
        cache.writing = False
        return latents

    if first:
        for part in vae.encode(known.to(vae.dtype)).float().split(1, dim=2):
            yield finish(part)
    trained = vae.latent_frames(pipe.config.num_frames) * shape[1] * shape[2]
    levels = objective.schedule(sampler.steps, trained)[:, None].to(known.device)
    for frame in pipe.progress_bar(range(first, shape[0])):

        def draw(step: int, frame: int = frame) -> Tensor:
            noise = keyed_normal("noise", [(*key, frame, step) for key in keys], (vae.channels, 1, *shape[1:]))
            return noise.to(known.device)

        solver = sampler.solver or sampler.own.solver
        made = solve(Schedule(draw(0), levels), predict, objective.path, solver, lambda step, draw=draw: draw(step + 1))
        yield finish(made)

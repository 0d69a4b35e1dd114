"""One step as a pure function: a batch, keyed noise and levels, a loss per clip."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stdit.data.loader import Batch
from stdit.diffusion.objective import Objective
from stdit.keys import keyed_generator, keyed_normal


class Losses(NamedTuple):
    """clips (B,): the mean over frames to be predicted; levels (B,): their mean noise level."""

    clips: Tensor
    levels: Tensor


def to_latents(batch: Batch, encode: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
    """Cached latents as they are, or pixels (B, F, H, W, 3) uint8 through the VAE -> (B, C, T, h, w) float32."""
    if batch.latents is not None:
        return batch.latents.to(device).float()
    assert batch.pixels is not None
    pixels = batch.pixels.to(device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        return encode(pixels).float()


def dropped_labels(labels: Tensor, keys: list[tuple[int, int, int]], dropout: float, null_label: int) -> Tensor:
    """Replace each label by the null label with probability `dropout`, a function of its key alone."""
    drop = [torch.rand((), generator=keyed_generator("dropout", *key)).item() < dropout for key in keys]
    return torch.where(torch.tensor(drop), null_label, labels)


def diffusion_losses(
    model: Callable[..., Tensor],
    objective: Objective,
    latents: Tensor,
    labels: Tensor | None,
    keys: list[tuple[int, int, int]],
) -> Losses:
    """Noise latents (B, C, T, h, w) at levels drawn by key, predict, compare."""
    frames, tokens = latents.shape[2], latents.shape[2] * latents.shape[3] * latents.shape[4]
    levels = torch.stack([objective.draw(keyed_generator("levels", *key), frames, tokens) for key in keys])
    levels = levels.to(latents.device)
    noise = keyed_normal("noise", keys, tuple(latents.shape[1:])).to(latents.device)
    noisy = objective.noisy(latents, noise, levels)
    shared = bool((levels == levels[:, :1]).all())  # one condition a clip is cheaper than one a frame
    timestep = objective.timestep(levels[:, 0] if shared else levels)
    output = model(noisy, timestep, class_labels=labels)
    loss = objective.loss(output, noisy, latents, noise, levels)
    predicted = levels > 0  # frames at level 0 are known
    clips = (loss * predicted).sum(1) / predicted.sum(1).clamp(min=1)
    return Losses(clips, levels.mean(1))

"""One step as a pure function: a batch, keyed noise and levels, a loss per clip."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stdit.data.loader import Batch
from stdit.diffusion.levels import choose_strategy
from stdit.diffusion.objective import Objective
from stdit.diffusion.paths import like
from stdit.prompt import Prompt
from stdit.rng import keyed_generator, keyed_normal
from stdit.vae import VideoVAE


class Losses(NamedTuple):
    """clips (B,): the mean over frames to be predicted; levels (B,): their mean noise level."""

    clips: Tensor
    levels: Tensor


def _never(starts: Tensor) -> Tensor:
    raise ValueError(
        "These latents were cached before runs of known frames were encoded; cache them again, or set "
        "objective.mask_strategy=shared."
    )


class Clips(NamedTuple):
    """latents (B, C, T, h, w); restarted: from a mask (B, T), those frames (n, C, h, w) as a run of known frames that
    begins there would have them: encoded behind their own first pixel frame, without the frames before."""

    latents: Tensor
    restarted: Callable[[Tensor], Tensor] = _never


def to_latents(batch: Batch, vae: VideoVAE) -> list[Clips]:
    """Cached latents as they are, or pixels (B, F, H, W, 3) uint8 through the VAE; float32, on the VAE's device.

    One entry, or one for each clip of a batch of many shapes.
    """
    if batch.latents is not None:
        cached = batch.restarts
        assert isinstance(batch.latents, Tensor) and not isinstance(cached, list), "cached latents are of one shape"

        latents = batch.latents.to(vae.device).float()
        if cached is None:
            return [Clips(latents)]
        return [Clips(latents, lambda starts: cached.transpose(1, 2)[starts.cpu()].to(vae.device).float())]
    assert batch.pixels is not None
    parts = [batch.pixels] if isinstance(batch.pixels, Tensor) else [clip[None] for clip in batch.pixels]
    return [_encoded(part, vae) for part in parts]


def _encoded(frames: Tensor, vae: VideoVAE) -> Clips:
    pixels = frames.to(vae.device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1

    @torch.no_grad()
    def encode(starts: Tensor) -> Tensor:
        groups = [vae.frames_of_latent(pixels[clip, None], frame) for clip, frame in starts.nonzero().tolist()]
        return vae.encode_segment(torch.cat(groups))[:, :, 0].float()

    with torch.no_grad():
        return Clips(vae.encode(pixels).float(), encode)


def dropped_labels(labels: Tensor, keys: list[tuple[int, int, int]], dropout: float, null_label: int) -> Tensor:
    """Replace each label by the null label with probability `dropout`, a function of its key alone."""
    drop = [torch.rand((), generator=keyed_generator("dropout", *key)).item() < dropout for key in keys]
    return torch.where(torch.tensor(drop), null_label, labels)


def dropped_captions(captions: list[str], keys: list[tuple[int, int, int]], dropout: float) -> list[str]:
    """Replace each caption by the empty one, together with its label (the same key decides)."""
    drop = [torch.rand((), generator=keyed_generator("dropout", *key)).item() < dropout for key in keys]
    return ["" if gone else text for text, gone in zip(captions, drop, strict=True)]


def dropped_info(info: Tensor | None, keys: list[tuple[int, int, int]], dropout: float) -> Tensor | None:
    """Rows of `MICRO_CONDITIONS` with the whole row unsaid (nan) with probability `dropout`, a function of its key alone."""
    if info is None:
        return None
    drop = [torch.rand((), generator=keyed_generator("dropout", *key, 1)).item() < dropout for key in keys]
    return torch.where(torch.tensor(drop)[:, None], float("nan"), info)


def diffusion_losses(
    model: Callable[..., Tensor],
    objective: Objective,
    clips: list[Clips],
    prompt: Prompt,
    keys: list[tuple[int, int, int]],
    patch: tuple[int, int, int] = (1, 1, 1),
    info: Tensor | None = None,
) -> Losses:
    """Noise latents (B, C, T, h, w) at levels drawn by key, predict under a prompt, compare what was not known.

    Each clip has a scheme of its own, so that every step shows some of each. Clips of many shapes go through the model in
    one packed sequence.
    """
    counts = [len(part.latents) for part in clips]
    begins = [sum(counts[:i]) for i in range(len(counts))]
    noised = [
        _noise(objective, part, keys[begin : begin + count], patch)
        for part, begin, count in zip(clips, begins, counts, strict=True)
    ]
    named = prompt.named() if info is None else {**prompt.named(), "info": info}
    if noised[0].history is not None:
        named["history"] = noised[0].history
    if len(noised) == 1:
        one = noised[0]
        outputs = [model(one.noisy, one.timestep, **named)]
        if objective.config.mask_ratio:  # once with all patches, once with some hidden (MDT)
            kept = _kept(objective.config.mask_ratio, keys, one, patch)
            outputs.append(model(one.noisy, one.timestep, **named, kept=kept))
            losses = [_compare(objective, output, one) for output in outputs]
            return Losses(losses[0].clips + losses[1].clips, losses[0].levels)
    else:
        packed: Any = model([one.noisy[0] for one in noised], [one.timestep[0] for one in noised], **named)
        outputs = [output[None] for output in packed]
    losses = [_compare(objective, output, one) for output, one in zip(outputs, noised, strict=True)]
    return Losses(*(torch.cat(parts) for parts in zip(*losses, strict=True)))


def _kept(ratio: float, keys: list[tuple[int, int, int]], one: "_Noised", patch: tuple[int, int, int]) -> Tensor:
    """(B, n) patches of a frame that are seen: as many in every clip of a step, which ones by each clip's key."""
    patches = (one.noisy.shape[3] // patch[1]) * (one.noisy.shape[4] // patch[2])
    ratio += 0.2 * float(torch.rand((), generator=keyed_generator("mask", *keys[0][:2])))
    count = max(1, int(patches * (1 - ratio)))
    drawn = [torch.randperm(patches, generator=keyed_generator("mask", *key))[:count] for key in keys]
    return torch.stack(drawn).to(one.noisy.device)


class _Noised(NamedTuple):
    clean: Tensor
    noise: Tensor
    noisy: Tensor
    levels: Tensor
    known: Tensor
    timestep: Tensor
    history: tuple[Tensor, Tensor] | None


def _noise(objective: Objective, clips: Clips, keys: list, patch: tuple[int, int, int]) -> _Noised:
    (t, h, w), (pt, ph, pw) = clips.latents.shape[2:], patch
    grid = (t // pt, h // ph, w // pw)
    drawn = []
    for key in keys:
        scheme = choose_strategy(key, objective.config.mask_probs_at(key[1]))
        drawn.append(objective.draw(keyed_generator("levels", *key), scheme, grid, t * h * w))
    supports_patch_levels = any(one.levels.ndim > 1 for one in drawn)
    levels, known = (
        torch.stack([_spread(part, grid) if supports_patch_levels else part for part in parts]).repeat_interleave(pt, 1)
        for parts in zip(*((one.levels, one.known) for one in drawn), strict=True)
    )
    levels, known = levels.to(clips.latents.device), known.to(clips.latents.device)
    latents = _as_encoded_alone(clips, known)
    noise = keyed_normal("noise", keys, tuple(latents.shape[1:])).to(latents.device)
    shared = bool((levels == levels[:, :1]).all())  # one condition a clip is cheaper than one a frame
    timestep = objective.timestep(levels[:, 0] if shared and not supports_patch_levels else levels)
    timestep = timestep.flatten(2) if supports_patch_levels else timestep
    history = None
    if drawn[0].history is not None:
        clean = torch.stack([one.history for one in drawn]).to(levels)[:, None].expand_as(levels)
        other = keyed_normal("history", keys, tuple(latents.shape[1:])).to(latents.device)
        history = objective.noisy(latents, other, clean), objective.timestep(clean)
    return _Noised(latents, noise, objective.noisy(latents, noise, levels), levels, known, timestep, history)


def _spread(frames: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(T,) or (T, rows, columns) -> (T, rows, columns)."""
    return frames if frames.ndim > 1 else frames[:, None, None].expand(grid)


def _compare(objective: Objective, output: Tensor, one: _Noised) -> Losses:
    """The mean over what was to be predicted of each frame, then over the frames that had something to predict."""
    loss = objective.loss(output, one.noisy, one.clean, one.noise, one.levels)
    counted = ~like(one.known, one.clean)[:, 0].expand_as(loss)
    frames = (loss * counted).sum((2, 3)) / counted.sum((2, 3)).clamp(min=1)
    predicted = counted.any(3).any(2)
    clips = (frames * predicted).sum(1) / predicted.sum(1).clamp(min=1)
    return Losses(clips, one.levels.flatten(1).mean(1))


def _as_encoded_alone(clips: Clips, known: Tensor) -> Tensor:
    """Latents in which every run of known frames, (B, T) or (B, T, rows, columns), is what a task can encode of it."""
    touched = known.flatten(2).any(2) if known.ndim > 2 else known
    starts = touched.clone()
    starts[:, 0] = False  # a clip's own beginning
    starts[:, 1:] &= ~touched[:, :-1]
    if not starts.any():
        return clips.latents
    latents = clips.latents.clone()
    latents.transpose(1, 2)[starts] = clips.restarted(starts)
    return latents

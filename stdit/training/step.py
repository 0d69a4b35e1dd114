"""One step as a pure function: a batch, keyed noise and levels, a loss per clip."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stdit.data.loader import Batch
from stdit.diffusion.levels import Drawn, choose
from stdit.diffusion.objective import Objective
from stdit.diffusion.paths import like
from stdit.keys import keyed_generator, keyed_normal
from stdit.prompt import Prompt
from stdit.vae import VideoVAE


class Losses(NamedTuple):
    """clips (B,): the mean over frames to be predicted; levels (B,): their mean noise level."""

    clips: Tensor
    levels: Tensor


def _never(starts: Tensor) -> Tensor:
    raise ValueError(
        "These latents were cached before runs of known frames were encoded; cache them again, or set "
        "objective.scheme=shared."
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
        groups = [vae.group(pixels[clip, None], frame) for clip, frame in starts.nonzero().tolist()]
        return vae.encode_run(torch.cat(groups))[:, :, 0].float()

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
    """Rows of `INFO` with the whole row unsaid (nan) with probability `dropout`, a function of its key alone."""
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

    Each clip draws its scheme by its key. Clips of one shape go through the model together, but those whose levels are by
    patch, or that see a history, which come after; clips of many shapes in one packed sequence.
    """
    named = prompt.named() if info is None else {**prompt.named(), "info": info}
    if len(clips) > 1:
        noised = [_noise(objective, part, [key], patch)[0][1] for part, key in zip(clips, keys, strict=True)]
        packed: Any = model([one.noisy[0] for one in noised], [one.timestep[0] for one in noised], **named)
        losses = [_compare(objective, output[None], one) for output, one in zip(packed, noised, strict=True)]
        return Losses(*(torch.cat(parts) for parts in zip(*losses, strict=True)))
    groups = _noise(objective, clips[0], keys, patch)
    losses = []
    for rows, one in groups:
        told = {name: value[rows] for name, value in named.items()} if len(groups) > 1 else dict(named)
        if one.history is not None:
            told["history"] = one.history
        found = _compare(objective, model(one.noisy, one.timestep, **told), one)
        if objective.config.mask_ratio:  # once with all patches, once with some hidden (MDT)
            kept = _kept(objective.config.mask_ratio, [keys[row] for row in rows], one, patch)
            hidden = _compare(objective, model(one.noisy, one.timestep, **told, kept=kept), one)
            found = found._replace(clips=found.clips + hidden.clips)
        losses.append(found)
    order = torch.tensor([row for rows, _ in groups for row in rows]).argsort().to(losses[0].clips.device)
    return Losses(*(torch.cat(parts)[order] for parts in zip(*losses, strict=True)))


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


def _noise(objective: Objective, clips: Clips, keys: list, patch: tuple[int, int, int]) -> list[tuple[list, _Noised]]:
    """Clips at the levels of their keys, in groups that a model can be told of at once, each with its rows in the batch."""
    (t, h, w), (pt, ph, pw) = clips.latents.shape[2:], patch
    drawn = []
    for key in keys:
        scheme = choose(keyed_generator("scheme", *key), objective.config.mixture_at(key[1]))
        one = objective.draw(keyed_generator("levels", *key), scheme, (t // pt, h // ph, w // pw), t * h * w)
        drawn.append(one._replace(levels=one.levels.repeat_interleave(pt, 0), known=one.known.repeat_interleave(pt, 0)))
    touched = torch.stack([one.known.reshape(t, -1).any(1) for one in drawn])
    latents = _as_encoded_alone(clips, touched.to(clips.latents.device))
    noise = keyed_normal("noise", keys, tuple(latents.shape[1:])).to(latents.device)
    alike: dict[Any, list[int]] = {}
    for row, one in enumerate(drawn):
        alike.setdefault((one.levels.ndim, one.history is not None), []).append(row)
    if len(alike) == 1:
        rows = list(range(len(keys)))
        return [(rows, _group(objective, latents, noise, drawn, keys))]
    return [
        (rows, _group(objective, latents[rows], noise[rows], [drawn[row] for row in rows], [keys[row] for row in rows]))
        for _, rows in sorted(alike.items())
    ]


def _group(objective: Objective, latents: Tensor, noise: Tensor, drawn: list[Drawn], keys: list) -> _Noised:
    levels = torch.stack([one.levels for one in drawn]).to(latents.device)
    known = torch.stack([one.known for one in drawn]).to(latents.device)
    shared = levels.ndim == 2 and bool((levels == levels[:, :1]).all())  # then one condition a clip says it all
    timestep = objective.timestep(levels[:, 0] if shared else levels)
    timestep = timestep.flatten(2) if timestep.ndim > 2 else timestep
    history = None
    if drawn[0].history is not None:
        clean = torch.stack([one.history for one in drawn]).to(levels)[:, None].expand_as(levels)
        other = keyed_normal("history", keys, tuple(latents.shape[1:])).to(latents.device)
        history = objective.noisy(latents, other, clean), objective.timestep(clean)
    return _Noised(latents, noise, objective.noisy(latents, noise, levels), levels, known, timestep, history)


def _compare(objective: Objective, output: Tensor, one: _Noised) -> Losses:
    """The mean over what was to be predicted of each frame, then over the frames that had something to predict."""
    loss = objective.loss(output, one.noisy, one.clean, one.noise, one.levels)
    counted = ~like(one.known, one.clean)[:, 0].expand_as(loss)
    frames = (loss * counted).sum((2, 3)) / counted.sum((2, 3)).clamp(min=1)
    predicted = counted.any(3).any(2)
    clips = (frames * predicted).sum(1) / predicted.sum(1).clamp(min=1)
    return Losses(clips, one.levels.flatten(1).mean(1))


def _as_encoded_alone(clips: Clips, known: Tensor) -> Tensor:
    """Latents in which every run of known frames, (B, T), is what a task can encode of it."""
    starts = known.clone()
    starts[:, 0] = False  # a clip's own beginning
    starts[:, 1:] &= ~known[:, :-1]
    if not starts.any():
        return clips.latents
    latents = clips.latents.clone()
    latents.transpose(1, 2)[starts] = clips.restarted(starts)
    return latents

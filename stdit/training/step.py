"""One training step as a pure function: a batch, keyed noise and levels, a loss per clip."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stdit.conditions import Conditions
from stdit.conditions.base import Key
from stdit.conditions.values import map_tensors, rows
from stdit.data.loader import Batch
from stdit.diffusion.flow_map import mean_velocity
from stdit.diffusion.levels import GUIDE_INTERVAL
from stdit.diffusion.masks import Grid, choose_strategy
from stdit.diffusion.objective import Objective
from stdit.diffusion.paths import like
from stdit.nn.layout import visible_count
from stdit.pixels import to_float
from stdit.rng import keyed_generator, keyed_normal
from stdit.sampling.guidance import GUIDERS
from stdit.vae import VideoVAE


class Losses(NamedTuple):
    """The loss of each clip.

    clips: (B,), means over the frames to predict. levels: (B,), mean noise levels.
    """

    clips: Tensor
    levels: Tensor


def _not_cached(mask: Tensor) -> Tensor:
    raise ValueError(
        "these latents were cached before segments of known frames were encoded; cache them again, or set "
        "objective.mask_strategy=shared."
    )


class LatentBatch(NamedTuple):
    """The latents (B, C, T, h, w) of a batch, and a function that encodes some of its frames again.

    reencode: from a mask (B, T), latents (n, C, h, w) of the marked frames, encoded as the start of a segment: after a
    copy of their first pixel frame, without the frames before. Sampling encodes known frames inside a clip in this way.
    """

    latents: Tensor
    reencode: Callable[[Tensor], Tensor] = _not_cached


class NoisyBatch(NamedTuple):
    """A noised batch, and what its loss needs.

    mask: (B, T) or (B, T, rows, columns), true where the loss counts. target: like levels, where the step of a flow map
    ends, and velocity: what it is to predict, like clean; else None. history: for teacher forcing, the latents and the
    timesteps (B, T) of the earlier frames that each frame attends to, else None.
    """

    clean: Tensor
    noise: Tensor
    noisy: Tensor
    levels: Tensor
    mask: Tensor
    timestep: Tensor
    history: tuple[Tensor, Tensor] | None
    target: Tensor | None = None
    velocity: Tensor | None = None


class FlowMapTraining(NamedTuple):
    """What the target of a flow map needs besides the batch.

    model: the network, which is called without gradients, at the precision of the training step. null: conditions for the
    unconditional branch of the guidance that is learnt. teacher: a trained flow model whose guided velocity is learnt; None: that of the data. guide: the weaker
    model that guidance of the teacher leads away from; None: its unconditional branch.
    """

    model: Callable[..., Tensor]
    null: Conditions
    teacher: Callable[..., Tensor] | None = None
    guide: Callable[..., Tensor] | None = None


def to_latents(batch: Batch, vae: VideoVAE) -> list[LatentBatch]:
    """The latents of a batch, cached or encoded from pixels (B, F, H, W, 3) uint8; float32, on the VAE's device.

    Returns one entry, or one for each clip of a batch of many shapes.
    """
    if isinstance(batch.latents, Tensor):
        assert not isinstance(batch.reencoded, list)
        return [_cached(batch.latents, batch.reencoded, vae)]
    if batch.latents is not None:
        reencoded: Sequence[Tensor | None] = batch.reencoded or [None] * len(batch.latents)  # type: ignore[assignment]
        pairs = zip(batch.latents, reencoded, strict=True)
        return [_cached(latents[None], None if again is None else again[None], vae) for latents, again in pairs]
    assert batch.pixels is not None
    parts = [batch.pixels] if isinstance(batch.pixels, Tensor) else [clip[None] for clip in batch.pixels]
    return [_encode(part, vae) for part in parts]


def _cached(latents: Tensor, reencoded: Tensor | None, vae: VideoVAE) -> LatentBatch:
    """Latents (B, C, T, h, w) of a cache, and its frames that were encoded without those before them."""
    found = latents.to(vae.device).float()
    if reencoded is None:
        return LatentBatch(found)
    return LatentBatch(found, lambda mask: reencoded.transpose(1, 2)[mask.cpu()].to(vae.device).float())


def _encode(frames: Tensor, vae: VideoVAE) -> LatentBatch:
    pixels = to_float(frames.to(vae.device))

    @torch.no_grad()
    def reencode(mask: Tensor) -> Tensor:
        groups = [vae.frames_of_latent(pixels[clip, None], frame) for clip, frame in mask.nonzero().tolist()]
        return vae.encode_segment(torch.cat(groups))[:, :, 0].float()

    with torch.no_grad():
        return LatentBatch(vae.encode(pixels).float(), reencode)


def diffusion_losses(
    model: Callable[..., Any],
    objective: Objective,
    clips: Sequence[LatentBatch],
    conditions: Conditions,
    keys: Sequence[Key],
    *,
    patch: tuple[int, int, int] = (1, 1, 1),
    level: float | None = None,
    strategy: str | None = None,
    flow_map: FlowMapTraining | None = None,
    draw: Callable[..., Tensor] = keyed_normal,
    route: bool = False,
) -> Losses:
    """The diffusion loss of each clip: noise at levels drawn by key, predict, and compare where the mask is true.

    The mask strategy is drawn for each clip, so that a step has clips of several strategies. Clips of many shapes go
    through the model in one packed sequence. level, strategy: used in place of drawn ones, for the loss at a given
    noise level. flow_map: needed to train a flow map. draw: gives the noise that `keyed_normal` draws. route: as
    training does, let patches skip the middle blocks by `objective.route_ratio`.
    """
    counts = [len(part.latents) for part in clips]
    where = [slice(sum(counts[:i]), sum(counts[: i + 1])) for i in range(len(counts))]
    noisy = [
        _add_noise(objective, part, keys[which], patch, level=level, strategy=strategy, draw=draw)
        for part, which in zip(clips, where, strict=True)
    ]
    arguments: dict[str, Any] = {"conditions": conditions}
    if noisy[0].history is not None:
        arguments["history"] = noisy[0].history
    if flow_map is not None:
        noisy = [
            _with_velocity(objective, one, rows(conditions, which), flow_map._replace(null=rows(flow_map.null, which)))
            for one, which in zip(noisy, where, strict=True)
        ]
    if len(noisy) == 1:
        one = noisy[0]
        ends = {} if flow_map is None else {"target_timestep": _timestep(objective, one.target)}
        if route and objective.config.route_ratio:
            frames = one.noisy.shape[2] // patch[0]
            ends["visible"] = _visible_patches(objective.config.route_ratio, keys, one, patch, frames=frames)
        outputs = [model(one.noisy, one.timestep, **arguments, **ends)]
        if objective.config.mask_ratio:  # once with all patches, once with some hidden (MDT)
            # MDT v2 draws the ratio from 0.3 to 0.5.
            more = 0.2 * float(torch.rand((), generator=keyed_generator("mask", *keys[0][:2])))
            visible = _visible_patches(objective.config.mask_ratio + more, keys, one, patch)[:, 0]
            outputs.append(model(one.noisy, one.timestep, **arguments, visible=visible))
            losses = [_compare(objective, output, one) for output in outputs]
            return Losses(losses[0].clips + losses[1].clips, losses[0].levels)
    else:
        if flow_map is not None:
            arguments["target_timestep"] = [_timestep(objective, one.target)[0] for one in noisy]
        packed = model([one.noisy[0] for one in noisy], [one.timestep[0] for one in noisy], **arguments)
        outputs = [output[None] for output in packed]
    losses = [_compare(objective, output, one) for output, one in zip(outputs, noisy, strict=True)]
    return Losses(*(torch.cat(parts) for parts in zip(*losses, strict=True)))


def _visible_patches(
    ratio: float, keys: Sequence[Key], one: NoisyBatch, patch: tuple[int, int, int], *, frames: int = 1
) -> Tensor:
    """Draw by key the patches (B, frames, n) of a clip that are left where a share is hidden."""
    patches = (one.noisy.shape[3] // patch[1]) * (one.noisy.shape[4] // patch[2])
    count = visible_count(patches, ratio)
    generators = [keyed_generator("mask", *key) for key in keys]
    drawn = [[torch.randperm(patches, generator=one)[:count] for _ in range(frames)] for one in generators]
    return torch.stack([torch.stack(clip) for clip in drawn]).to(one.noisy.device)


def _add_noise(
    objective: Objective,
    clips: LatentBatch,
    keys: Sequence[Key],
    patch: tuple[int, int, int],
    *,
    level: float | None,
    strategy: str | None,
    draw: Callable[..., Tensor],
) -> NoisyBatch:
    (t, h, w), (pt, ph, pw) = clips.latents.shape[2:], patch
    grid = (t // pt, h // ph, w // pw)
    samples = []
    for key in keys:
        name = strategy or choose_strategy(key, objective.config.mask_probs_at(key[1]))
        generator = keyed_generator("levels", *key)
        samples.append(objective.sample(generator, name, grid, tokens=t * h * w, level=level))
    per_patch = any(one.levels.ndim > 1 for one in samples)
    levels, mask = (
        torch.stack([_per_patch(part, grid) if per_patch else part for part in parts]).repeat_interleave(pt, 1)
        for parts in zip(*((one.levels, one.mask) for one in samples), strict=True)
    )
    levels, mask = levels.to(clips.latents.device), mask.to(clips.latents.device)
    latents = _with_segments_reencoded(clips, mask)
    noise = draw("noise", list(keys), tuple(latents.shape[1:])).to(latents.device)
    target = None
    if samples[0].target is not None:
        ends = [one.target for one in samples if one.target is not None]
        target = torch.stack([_per_patch(end, grid) if per_patch else end for end in ends]).repeat_interleave(pt, 1)
        target = target.to(levels.device)
    shared = target is None and bool((levels == levels[:, :1]).all())  # a condition per clip is cheaper than per frame
    timestep = _timestep(objective, levels[:, 0] if shared and not per_patch else levels)
    history = None
    if samples[0].history is not None:
        clean = torch.stack([one.history for one in samples if one.history is not None])
        clean = clean.to(levels)[:, None].repeat(1, levels.shape[1])
        clean[:, : objective.config.cond_clean_frames] = 0
        other = draw("history", list(keys), tuple(latents.shape[1:])).to(latents.device)
        history = objective.noisy(latents, other, clean), objective.timestep(clean)
    return NoisyBatch(
        clean=latents,
        noise=noise,
        noisy=objective.noisy(latents, noise, levels),
        levels=levels,
        mask=mask if target is None else mask & _moves(levels, target),
        timestep=timestep,
        history=history,
        target=target,
    )


def _timestep(objective: Objective, levels: Tensor | None) -> Tensor:
    """Timesteps (B,), (B, T) or, for levels per patch (B, T, rows, columns), per token."""
    assert levels is not None
    found = objective.timestep(levels)
    return found.flatten(2) if found.ndim > 2 else found


def _moves(levels: Tensor, target: Tensor) -> Tensor:
    """Where a step changes the level; everywhere in clips whose step has no length, which train the velocity."""
    moves = levels > target
    return moves | ~moves.flatten(1).any(1).view(-1, *[1] * (moves.ndim - 1))


@torch.no_grad()
def _with_velocity(objective: Objective, one: NoisyBatch, conditions: Conditions, given: FlowMapTraining) -> NoisyBatch:
    """Add what a flow map is to predict: the mean velocity on the way of the data, or of the teacher."""
    assert one.target is not None
    scale = objective.config.distilled_guidance
    scales = conditions.get("guidance")  # of every clip, where the scale is a condition

    def run(network: Callable[..., Tensor], noisy: NoisyBatch, target: Tensor | None, conditions: Conditions) -> Tensor:
        further = {} if noisy.history is None else {"history": noisy.history}
        ends = {} if target is None else {"target_timestep": _timestep(objective, target)}
        timestep = _timestep(objective, noisy.levels)
        return network(noisy.noisy, timestep, conditions=conditions, **further, **ends).float()

    if given.teacher is not None:
        if isinstance(scales, Tensor):
            by_guider = dict(zip(sorted(objective.config.distilled_scales), scales[:, 0].unbind(1), strict=True))
        else:
            by_guider = {objective.config.distilled_guider: torch.full((len(one.noisy),), scale)}
        velocity = _guided_velocity(run, one, conditions, given=given, by_guider=by_guider)
    else:
        velocity = one.noise - one.clean
        if scale != 1:  # as in MeanFlow, equation 19: the null branch learns the velocity of the data
            velocity = scale * velocity + (1 - scale) * run(given.model, one, one.levels, given.null)

    def rest(x: Tensor, levels: Tensor, target: Tensor, which: Tensor) -> Tensor:
        part = _clips(one, which)._replace(noisy=x, levels=levels)
        return run(given.model, part, target, _conditions_of(conditions, which))

    return one._replace(
        velocity=mean_velocity(rest, one.noisy, velocity=velocity, levels=one.levels, target=one.target)
    )


def _guided_velocity(
    run: Callable[..., Tensor],
    one: NoisyBatch,
    conditions: Conditions,
    *,
    given: FlowMapTraining,
    by_guider: Mapping[str, Tensor],
) -> Tensor:
    """The teacher's velocity, led away from its null branch and its guide by the scales (B,) of each clip."""
    conditions, null = (
        {name: value for name, value in part.items() if name != "guidance"} for part in (conditions, given.null)
    )
    velocity = run(given.teacher, one, None, conditions)
    found = velocity.clone()
    noisiest = one.levels.flatten(1).amax(1)
    for guider, by in ((guider, by.to(velocity)) for guider, by in by_guider.items()):
        which = by > 1
        if guider == "auto":  # as in sampling
            which = which & (noisiest >= GUIDE_INTERVAL[0])
        if not bool(which.any()):
            continue
        network, chosen = (given.guide, conditions) if guider == "auto" else (given.teacher, null)
        worse = run(network, _clips(one, which), None, _conditions_of(chosen, which))
        scale = by[which].view(-1, *[1] * (worse.ndim - 1))
        found[which] += GUIDERS[guider](velocity[which], worse, scale, one.levels[which]) - velocity[which]
    return found


def _clips(one: NoisyBatch, which: Tensor) -> NoisyBatch:
    """What the network gets of some clips of a batch (B,) bool; the rest is as it was."""
    history = None if one.history is None else (one.history[0][which], one.history[1][which])
    return one._replace(noisy=one.noisy[which], levels=one.levels[which], history=history)


def _conditions_of(conditions: Conditions, which: Tensor) -> Conditions:
    return map_tensors(conditions, lambda value: value if len(value) == 1 else value[which])


def _per_patch(frames: Tensor, grid: Grid) -> Tensor:
    """Expand (T,) or (T, rows, columns) to (T, rows, columns)."""
    return frames if frames.ndim > 1 else frames[:, None, None].expand(grid)


def _compare(objective: Objective, output: Tensor, one: NoisyBatch) -> Losses:
    """The mean loss over the masked positions of each frame, then over the frames that have any."""
    if one.velocity is None:
        loss = objective.loss(output, one.noisy, one.clean, noise=one.noise, levels=one.levels)
    else:
        loss = (output.float() - one.velocity).square().mean(dim=1)
    counted = like(one.mask, one.clean)[:, 0].expand_as(loss)
    frames = (loss * counted).sum((2, 3)) / counted.sum((2, 3)).clamp(min=1)
    predicted = counted.any(3).any(2)
    clips = (frames * predicted).sum(1) / predicted.sum(1).clamp(min=1)
    return Losses(clips, one.levels.flatten(1).mean(1))


def _with_segments_reencoded(clips: LatentBatch, mask: Tensor) -> Tensor:
    """Latents in which segments of known frames inside a clip are encoded without the frames before, as in sampling.

    mask: (B, T) or (B, T, rows, columns), true = to be generated.
    """
    known = ~mask.flatten(2).all(2) if mask.ndim > 2 else ~mask
    starts = known.clone()
    starts[:, 0] = False  # the first frame of a clip is encoded alone anyway
    starts[:, 1:] &= ~known[:, :-1]
    if not starts.any():
        return clips.latents
    latents = clips.latents.clone()
    latents.transpose(1, 2)[starts] = clips.reencode(starts)
    return latents

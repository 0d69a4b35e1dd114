"""Does a world obey? Rollouts of a model beside the truth of its environment, under the same actions."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stdit.conditions import Actions
from stdit.data.video_write import to_uint8
from stdit.evaluation.metrics import decibel, ssim
from stdit.pixels import to_float
from stdit.progress import Progress
from stdit.rng import keyed_normal, keyed_rng
from stdit.sampling.options import SamplingOptions
from stdit.sampling.pipeline import STDiTPipeline
from stdit.worlds.environments import Environment
from stdit.worlds.policies import Policy
from stdit.worlds.record import plain, read_info

HORIZONS = (1, 4, 8, 16, 32, 64, 128, 256)  # actions after which dream and truth are compared
TOGETHER = 48  # rollouts that run as one batch
FOLLOWED = 16  # groups of an episode whose frames are all kept, for predictions from true frames
_NOISE_LEVEL = 0.8  # at which the loss under other actions is measured
_CHANGED = 0.25  # of a latent's standard deviation: a position that differs more from the frame before has changed


class Episode(NamedTuple):
    """What an environment did. lasts (G + 1, H, W, 3) uint8: its first picture, and the last one of every group; clip: all
    frames of its first groups. actions: one for each group. states: what `state` read with each picture of `lasts`. label:
    None without one."""

    lasts: np.ndarray
    clip: np.ndarray
    actions: list[Any]
    states: list[Any]
    label: int | str | None = None


class DreamedEpisode(NamedTuple):
    """A rollout of a model: frames like `lasts` of the truth beside it."""

    lasts: np.ndarray
    truth: Episode


class Play(NamedTuple):
    """How episodes are played: an environment and a policy for each, groups of frames, and the size of pictures (H, W).

    state: reads from the environment what a measurement needs to know. label: the name of what is an episode's label.
    repeat: frames that an action lasts (None: a group).
    """

    env: Environment
    policy: Callable[[], Policy]
    groups: int
    group: int
    size: tuple[int, int]
    state: Callable[[Any], Any]
    label: str | None = None
    repeat: int | None = None


def play_episode(how: Play, seed: int) -> Episode:
    """Play an episode of an action for each group; it is shorter if the environment ends it."""
    env, policy, rng = how.env, how.policy(), keyed_rng("sample", seed)
    check = Actions(**env.space.plain)
    observation, info = env.reset(seed)
    first, label = env.picture(how.size), None if how.label is None else read_info(info, how.label, env)
    lasts, clip, actions, states = [first], [first], [], [how.state(env.env.unwrapped)]
    for number in range(how.groups):
        action = check.number(plain(policy(observation, info, rng)))
        steps = list(env.act(action, how.group, how.size, repeat=how.repeat))
        observation, info = steps[-1].observation, steps[-1].info
        if len(steps) == how.group:  # a group that the end cuts short is no whole one
            lasts.append(steps[-1].picture)
            actions.append(action)
            states.append(how.state(env.env.unwrapped))
            if number < FOLLOWED:
                clip += [step.picture for step in steps]
        if steps[-1].done:
            break
    return Episode(np.stack(lasts), np.stack(clip), actions=actions, states=states, label=label)


def dream(
    pipe: STDiTPipeline, episodes: Sequence[Episode], options: SamplingOptions, *, progress: bool = True
) -> Iterator[DreamedEpisode]:
    """Roll out a model from the first picture of every episode under its actions, many at a time."""
    for first in range(0, len(episodes), TOGETHER):
        part = episodes[first : first + TOGETHER]
        starts = torch.cat([to_float(one.lasts[:1])[None] for one in part])
        world = pipe.world(starts, labels_of(part), options=options)
        lasts = [np.stack([one.lasts[0] for one in part])]
        longest = max(len(one.actions) for one in part)
        for group in Progress(range(longest), desc="dreaming", unit="group", disable=not progress, leave=False):
            held = [one.actions[min(group, len(one.actions) - 1)] for one in part]
            pixels = world.step(hold(held, world.group))
            lasts.append(np.stack([to_uint8(clip[:, -1:])[0] for clip in pixels]))
        for own, one in zip(np.stack(lasts, axis=1), part, strict=True):
            yield DreamedEpisode(own[: len(one.lasts)], one)


def labels_of(episodes: Sequence[Episode]) -> list[int | str] | None:
    """The labels of episodes; None if they have none."""
    labels = [one.label for one in episodes if one.label is not None]
    return labels or None


def hold(actions: Sequence[Any], frames: int) -> Tensor:
    """One action of each clip, held for some frames: (B, frames) or (B, frames, width)."""
    values = torch.as_tensor(actions)
    return values[:, None].expand(-1, frames, *values.shape[1:])


class Fidelity(NamedTuple):
    """How near pictures are to the truth: PSNR in dB, SSIM, and the mean difference of their mean colours (drift, in [0, 1])."""

    psnr: float
    ssim: float
    drift: float


def fidelity(made: np.ndarray, truth: np.ndarray) -> Fidelity:
    """Compare pictures (N, H, W, 3) uint8, each with its own truth."""
    a, b = (to_float(frames).transpose(0, 1)[:, :, None] for frames in (made, truth))
    drift = ((a - b).mean((2, 3, 4)).abs() / 2).mean()
    return Fidelity(decibel((a - b).square().mean()), ssim(a, b), float(drift))


def fidelity_by_horizon(dreams: Sequence[DreamedEpisode]) -> dict[int, Fidelity]:
    """`fidelity` after each of `HORIZONS` that any episode reaches."""
    found = {}
    for horizon in HORIZONS:
        whole = [one for one in dreams if len(one.lasts) > horizon]
        if whole:
            pictures = (
                np.stack([one.lasts[horizon] for one in whole]),
                np.stack([one.truth.lasts[horizon] for one in whole]),
            )
            found[horizon] = fidelity(*pictures)
    return found


class Forced(NamedTuple):
    """Predictions of one group from true frames, and what the VAE makes of the truth itself: PSNR in dB to the truth."""

    predicted: float
    decoded: float


def teacher_forced(pipe: STDiTPipeline, episodes: Sequence[Episode], options: SamplingOptions) -> Forced:
    """Predict each group from the true ones before it."""
    errors, losses = [], []
    for one in episodes:
        clip = to_float(one.clip)[None]
        actions = [None, *(action for action in one.actions[:FOLLOWED] for _ in range(pipe.video_vae.stride[0]))]
        made = torch.cat(
            list(pipe.world(clip[:, :, :0], labels_of([one]), options=options).predictions(clip, actions)), 2
        )
        with torch.no_grad():
            decoded = pipe.decode(pipe.video_vae.encode(clip.to(pipe.video_vae.device)))
        errors.append((made - clip[:, :, 1:]).square().mean())
        losses.append((decoded - clip)[:, :, 1:].square().mean())
    return Forced(decibel(torch.stack(errors).mean()), decibel(torch.stack(losses).mean()))


class Shuffled(NamedTuple):
    """The loss under the true actions and under those of other clips, and the standard error of their paired difference."""

    true: float
    shuffled: float
    error: float

    @property
    def ratio(self) -> float:
        """How many times as large the loss is under the actions of other clips."""
        return self.shuffled / self.true


@torch.no_grad()
def loss_under_other_actions(pipe: STDiTPipeline, episodes: Sequence[Episode]) -> Shuffled:
    """The loss at noise level 0.8 with a clean history, where a latent frame differs from the one before it.

    A model that ignores actions has the same loss under its own actions as under those of another clip.
    """
    vae, model, objective = pipe.video_vae, pipe.transformer, pipe.engine.objective
    condition = model.conditioners["actions"]
    losses: list[list[float]] = [[], []]
    for i, one in enumerate(episodes):
        other = episodes[(i + 1) % len(episodes)]
        frames = min(pipe.config.num_frames, len(one.clip), len(other.clip))
        frames = 1 + (frames - 1) // vae.stride[0] * vae.stride[0]
        clip = to_float(one.clip[:frames])[None].to(vae.device, vae.dtype)
        latents = vae.encode(clip).float()
        changed = (latents[:, :, 1:] - latents[:, :, :-1]).abs().amax(1) > _CHANGED
        if not changed.any():
            continue
        noise = keyed_normal("noise", [(0, i)], tuple(latents.shape[1:])).to(latents.device)
        levels = torch.full((1, latents.shape[2]), _NOISE_LEVEL, device=latents.device)
        noisy = objective.noisy(latents, noise, levels)
        history = (latents, torch.zeros_like(levels))
        named = None if one.label is None else pipe.labels(one.label)
        labels = {} if named is None else {"label": named[:, None].to(latents.device)}
        for kept, source in zip(losses, (one, other), strict=True):
            rows = hold(source.actions[: (frames - 1) // vae.stride[0]], vae.stride[0])
            rows = condition.parse([None, *rows.flatten(0, 1).tolist()], 1)
            given = condition.at(rows, range(0, frames, vae.stride[0]), frames, stride=vae.stride[0], starts=True)
            output = model(
                noisy,
                objective.timestep(levels),
                conditions={**labels, "actions": given.to(latents.device)},
                history=history,
            )
            loss = objective.loss(output, noisy, latents, noise=noise, levels=levels)[:, 1:]
            kept.append(float(loss[changed].mean()))
    if len(losses[0]) < 2:
        raise ValueError(
            "nothing changes in the episodes, so the loss under other actions cannot be measured; play longer ones."
        )
    true, shuffled = (np.array(kept) for kept in losses)
    error = float((shuffled - true).std(ddof=1) / np.sqrt(len(true)))
    return Shuffled(float(true.mean()), float(shuffled.mean()), error)

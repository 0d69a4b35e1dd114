"""Does a world obey? Rollouts of a model beside the truth of its environment, under the same actions."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from stdit.data.video_write import to_uint8
from stdit.pixels import to_float
from stdit.rng import keyed_rng
from stdit.sampling.options import SamplingOptions
from stdit.sampling.pipeline import STDiTPipeline
from stdit.worlds.environments import Environment
from stdit.worlds.policies import Policy

HORIZONS = (1, 8, 32, 128)  # actions after which a rollout is compared with the truth
TOGETHER = 48  # rollouts that run as one batch


class Episode(NamedTuple):
    """The truth of one rollout: frames (G + 1, H, W, 3) uint8, the start and the last frame of every group; the action of
    each group; and the environment's state at each frame (what `state` of the rollout read)."""

    frames: np.ndarray
    actions: list[Any]
    states: list[Any]


class Rollout(NamedTuple):
    """A dream beside its truth. frames: like those of `truth`."""

    frames: np.ndarray
    truth: Episode


def play_truth(
    env: Environment,
    policy: Policy,
    groups: int,
    *,
    seed: int,
    group: int,
    size: tuple[int, int],
    state: Callable[[Any], Any],
) -> Episode:
    """Play an episode of `groups` actions, each of which lasts `group` frames; it is shorter if the episode ends."""
    rng = keyed_rng("sample", seed)
    observation, info = env.reset(seed)
    frames, actions, states = [env.picture(size)], [], [state(env.env.unwrapped)]
    for _ in range(groups):
        action, taken = policy(observation, info, rng), None
        for taken in env.act(action, group, size):
            observation, info = taken.observation, taken.info
        assert taken is not None
        frames.append(taken.picture)
        actions.append(action)
        states.append(state(env.env.unwrapped))
        if taken.done:
            break
    return Episode(np.stack(frames), actions, states)


def dream(
    pipe: STDiTPipeline, episodes: Sequence[Episode], options: SamplingOptions, *, progress: bool = True
) -> Iterator[Rollout]:
    """Roll out a model from the first frame of every episode under its actions, many at a time."""
    for first in range(0, len(episodes), TOGETHER):
        part = episodes[first : first + TOGETHER]
        starts = torch.cat([to_float(episode.frames[:1])[None] for episode in part])
        world = pipe.world(starts, options=options)
        longest = max(len(episode.actions) for episode in part)
        lasts = [np.stack([episode.frames[0] for episode in part])]
        for group in tqdm(range(longest), desc="dreaming", unit="group", disable=not progress, leave=False):
            actions = [episode.actions[min(group, len(episode.actions) - 1)] for episode in part]
            pixels = world.step(_rows(actions, world.group))
            lasts.append(np.stack([to_uint8(clip[:, -1:])[0] for clip in pixels]))
        frames = np.stack(lasts, axis=1)
        for own, episode in zip(frames, part, strict=True):
            yield Rollout(own[: len(episode.frames)], episode)


def _rows(actions: Sequence[Any], group: int) -> torch.Tensor:
    """One action of each clip, held for a group: (B, group) or (B, group, width)."""
    values = torch.as_tensor(actions)
    return values[:, None].expand(-1, group, *values.shape[1:])

"""Record episodes of an environment: frames, the actions that led to them, and what else is asked for."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stdit.conditions import Actions, ActionSpace
from stdit.data.video_write import write_video
from stdit.rng import keyed_rng
from stdit.worlds.environments import Environment
from stdit.worlds.policies import Policy


class Recording(NamedTuple):
    """How episodes are recorded.

    frames: at most, of one episode. repeat: frames that one action of the policy lasts. size: (H, W) of the pictures.
    info: names of the environment's info that are kept. lossless: whether the clips have exactly the frames. label: what of
    the info, or which attribute of the environment, at the start of an episode is its label.
    """

    frames: int
    repeat: int
    size: tuple[int, int]
    fps: float
    info: Sequence[str] = ()
    lossless: bool = False
    label: str | None = None


class Episode(NamedTuple):
    """The frames (F, H, W, 3) uint8 of an episode; for each of them the action that led to it (None for the first), the
    reward that it gave, and the info that was asked for; and its label, None without one."""

    frames: np.ndarray
    actions: list[Any]
    rewards: list[float]
    info: dict[str, list[Any]]
    label: int | str | None = None


def play_episode(env: Environment, policy: Policy, how: Recording, *, seed: int) -> Episode:
    """Play an episode, a function of the seed alone if the environment and the policy are."""
    rng, check = keyed_rng("sample", seed), Actions(**env.space.plain)
    return _run(
        env, lambda observation, info, frame: check.number(plain(policy(observation, info, rng))), how, seed=seed
    )


def replay(env: Environment, actions: Sequence[Any], how: Recording, *, seed: int) -> Episode:
    """The episode that recorded actions (one for each frame, the first None) and their seed give again."""
    return _run(env, lambda observation, info, frame: actions[frame], how._replace(frames=len(actions)), seed=seed)


def _run(env: Environment, choose: Callable[[Any, dict[str, Any], int], Any], how: Recording, *, seed: int) -> Episode:
    env = env._replace(size=how.size)
    observation, info = env.reset(seed)
    frames, actions, rewards, done = [env.picture()], [None], [0.0], False
    kept: dict[str, list[Any]] = {name: [read_info(info, name, env)] for name in how.info}
    label = None if how.label is None else read_info(info, how.label, env)
    while not done and len(frames) < how.frames:
        action = choose(observation, info, len(frames))
        for taken in env.act(action, min(how.repeat, how.frames - len(frames))):
            observation, info, done = taken.observation, taken.info, taken.done
            frames.append(taken.picture)
            actions.append(action)
            rewards.append(taken.reward)
            for name, values in kept.items():
                values.append(read_info(info, name, env))
    return Episode(np.stack(frames), actions, rewards, info=kept, label=label)


def read_info(info: dict[str, Any], name: str, env: Environment) -> Any:
    """A value of the environment's info, or an attribute of the environment of that name, as plain values."""
    if name in info:
        return plain(info[name])
    if hasattr(env.env.unwrapped, name):
        return plain(getattr(env.env.unwrapped, name))
    has = ", ".join(map(str, info)) or "none"
    raise ValueError(f"{name!r} is neither in the info of environment {env.name!r} ({has}) nor an attribute of it.")


def plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    value = value.tolist() if hasattr(value, "tolist") else value
    try:
        json.dumps(value)
    except TypeError:
        return str(value)
    return value


def frames_hash(frames: np.ndarray) -> str:
    """The sha256 of frames (F, H, W, 3) uint8, as they are in memory."""
    return hashlib.sha256(np.ascontiguousarray(frames).tobytes()).hexdigest()


def write_episode(
    path: Path, episode: Episode, env: Environment, how: Recording, *, seed: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the clip of an episode -> its row of the manifest. options: with which the environment was made."""
    write_video(path, episode.frames, fps=how.fps, encoding="lossless" if how.lossless else "faithful")
    about = {
        "name": env.name, "options": dict(options), "turn_based": env.turn_based, "size": list(how.size), "label": how.label,
    }  # fmt: skip
    space: ActionSpace = replace(env.space, repeat=how.repeat, environment=about)
    row = {
        "path": path.name, "frames": len(episode.frames), "seed": seed, "actions": episode.actions,
        "action_space": space.plain, "reward": episode.rewards, "frames_sha256": frames_hash(episode.frames), "versions": dict(env.versions),
    }  # fmt: skip
    row |= {} if episode.label is None else {"label": episode.label}
    return row | ({"info": episode.info} if episode.info else {})

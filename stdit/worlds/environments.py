"""Environments by name: the one that ships, and Gymnasium's; their pictures and the space of their actions."""

import contextlib
import functools
import importlib
import importlib.metadata
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from stdit.conditions import ActionSpace
from stdit.conditions.actions import bounded
from stdit.data.transforms import cover_size, crop, resize
from stdit.worlds.room import Room

# Packages that register environments with Gymnasium when they are imported, and the distributions they come from.
_PACKAGES = {"minigrid": "minigrid", "ale_py": "ale-py", "vizdoom.gymnasium_wrapper": "vizdoom"}
_TURN_BASED = ("minigrid",)
SHIPPED = "room"
LARGEST_SIDE = 4096  # of pictures, in pixels; those of training are far smaller


class EnvStep(NamedTuple):
    """What one frame of an environment gives: the picture (H, W, 3) uint8 and what `step` returns in Gymnasium."""

    picture: np.ndarray
    observation: Any
    reward: float
    done: bool
    info: dict[str, Any]


class Environment(NamedTuple):
    """An environment that is drawn, and what its actions are.

    env: with Gymnasium's interface. space: of its actions, as a model takes them. first: the number of its first action
    (Gymnasium's `Discrete.start`). turn_based: whether nothing happens between actions (`act`). versions: of the packages
    that it needs. writes: whether its engine, which starts at the first reset, writes into the current folder. size: (H, W) of
    its pictures in recordings; None: as they are drawn.
    """

    name: str
    env: Any
    space: ActionSpace
    first: int = 0
    turn_based: bool = False
    versions: Mapping[str, str] = {}
    writes: bool = False
    size: tuple[int, int] | None = None

    @property
    def fps(self) -> float:
        """Frames a second at which it is meant to be seen."""
        return float((self.env.metadata or {}).get("render_fps") or 8)

    def reset(self, seed: int) -> tuple[Any, dict[str, Any]]:
        """Begin an episode -> observation and info."""
        with contextlib.chdir(_scratch().name) if self.writes else contextlib.nullcontext():
            return self._call("begin an episode", self.env.reset, seed=seed)

    def _call(self, doing: str, method: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Call a method of the environment; ValueError of one line if it fails, however it does."""
        try:
            return method(*given, **named)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # of code that is not ours
            said = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"environment {self.name!r} cannot {doing}: {said}") from error

    def act(
        self, action: Any, frames: int, size: tuple[int, int] | None = None, *, repeat: int | None = None
    ) -> Iterator[EnvStep]:
        """Take an action for `frames` frames, or until the episode ends, and yield what follows, frame by frame.

        In a turn-based environment a step is taken every `repeat` frames (None: one for all of them), and its picture lasts
        so long; in others every frame is a step.
        """
        given = int(action) + self.first if self.space.width is None else np.asarray(action, dtype=np.float32)
        taken = None
        for frame in range(frames):
            if taken is None or not self.turn_based or (repeat and frame % repeat == 0 and not taken.done):
                observation, reward, terminated, truncated, info = self._call("take a step", self.env.step, given)
                done = bool(terminated or truncated)
                taken = EnvStep(self.picture(size), observation, reward=float(reward), done=done, info=dict(info))
            yield taken
            if taken.done and not self.turn_based:
                return
            taken = taken._replace(reward=0.0) if self.turn_based else taken

    def picture(self, size: tuple[int, int] | None = None) -> np.ndarray:
        """The picture (H, W, 3) uint8 as it is now, as a recording has it.

        size: (H, W) that it is scaled to cover, and to which its centre is cropped, as clips are in training.
        """
        frame = np.asarray(self._call("draw its picture", self.env.render))
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
            raise ValueError(
                f"environment {self.name!r} draws {frame.dtype} of shape {frame.shape}, not a picture (height, width, 3) of "
                "uint8; choose another one."
            )
        pictures = frame[None] if self.size is None else resize(frame[None], self.size)
        if size is not None:
            pictures = crop(resize(pictures, cover_size(pictures.shape[1:3], size)), size)
        return pictures[0]


def make_environment(
    name: str, options: Mapping[str, Any] | None = None, turn_based: bool | None = None
) -> Environment:
    """Make an environment: "room", which ships, or an id of Gymnasium's.

    options: keyword arguments of its constructor. turn_based: None: of those whose module is known to be. ValueError, in one
    line, for one that is not installed, draws no pictures, or whose actions are neither one of several nor a vector.
    """
    if name == SHIPPED:
        try:
            room = Room(**(options or {}))
        except TypeError as error:
            raise ValueError(f"options of environment 'room': {error}; it takes size.") from error
        return Environment(name, room, ActionSpace(count=room.action_space.n, names=list(room.action_names)))
    env, versions = _make(name, dict(options or {}))
    try:
        space, first = _space_of(name, env)
    except ValueError:
        env.close()
        raise
    package = type(env.unwrapped).__module__.partition(".")[0]
    turn_based = package in _TURN_BASED if turn_based is None else turn_based
    return Environment(
        name, env, space, first=first, turn_based=turn_based, versions=versions, writes=package == "vizdoom"
    )


def frames_of_action(space: ActionSpace, group: int) -> int:
    """The frames that an action lasts; ValueError if a group of a turn-based environment is not whole actions."""
    if (space.environment or {}).get("turn_based") and group % space.repeat:
        raise ValueError(
            f"an action of this turn-based environment lasts {space.repeat} frames, but the model makes {group} at a time; record it "
            f"with --repeat {group}."
        )
    return space.repeat


def steps_of_group(space: ActionSpace, group: int) -> int:
    """How many steps of a turn-based environment an action takes if it is held for a group of frames."""
    return max(1, group // frames_of_action(space, group))


def environment_of(about: Mapping[str, Any]) -> Environment:
    """The environment that `ActionSpace.environment` describes, with pictures of the size that was recorded."""
    name, options = str(about["name"]), about.get("options") or {}
    if ":" in name or not isinstance(options, Mapping):  # Gymnasium imports the module before a colon
        raise ValueError(f"environment {name[:60]!r} would import a module; name one that is registered.")
    size = about.get("size")
    if size is not None and not (
        isinstance(size, list | tuple)
        and len(size) == 2
        and all(isinstance(side, int) and 1 <= side <= LARGEST_SIDE for side in size)
    ):
        raise ValueError(
            f"environment {name[:60]!r} has pictures of size={str(size)[:40]!r}; give [height, width], 1 to {LARGEST_SIDE}."
        )
    env = make_environment(name, options, about.get("turn_based"))
    return env._replace(size=None if size is None else (size[0], size[1]))


def _make(name: str, options: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """An environment of Gymnasium's, and the versions of what it needs."""
    try:
        import gymnasium
    except ImportError as error:
        raise ValueError(
            f"environment {name!r} needs gymnasium, which is not installed: pip install 'stdit[worlds]'. 'room' needs nothing."
        ) from error
    installed = []
    for module, distribution in _PACKAGES.items():
        try:
            found = importlib.import_module(module)
        except ImportError:
            continue
        if module == "ale_py":
            gymnasium.register_envs(found)
            found.ALEInterface.setLoggerMode(found.LoggerMode.Error)
        installed.append(distribution)
    try:
        env = gymnasium.make(name, render_mode="rgb_array", disable_env_checker=True, **options)
    except gymnasium.error.Error as error:
        missing = [distribution for distribution in _PACKAGES.values() if distribution not in installed]
        hint = f" {', '.join(missing)} are not installed (pip install 'stdit[worlds]')." if missing else ""
        raise ValueError(f"environment {name!r}: {' '.join(str(error).split())[:300]}{hint}") from error
    except (TypeError, ValueError, KeyError, AssertionError, ImportError, AttributeError, OSError) as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"environment {name!r} cannot be made with options {options}: {said}.") from error
    if env.render_mode != "rgb_array":
        raise ValueError(f"environment {name!r} draws no pictures (render_mode='rgb_array'); choose another one.")
    needs = {"gymnasium"} | {
        dist for mod, dist in _PACKAGES.items() if type(env.unwrapped).__module__.startswith(mod.split(".")[0])
    }
    return env, {dist: importlib.metadata.version(dist) for dist in sorted(needs)}


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    """A folder until the process ends, for what engines write into the current one (Doom: _vizdoom.ini, _vizdoom/)."""
    return tempfile.TemporaryDirectory(prefix="stdit-")


def _space_of(name: str, env: Any) -> tuple[ActionSpace, int]:
    from gymnasium import spaces

    actions = env.action_space
    if isinstance(actions, spaces.Discrete):
        count = int(actions.n)
        names = _action_names(env.unwrapped)
        return ActionSpace(count=count, names=names if names and len(names) == count else None), int(actions.start)
    if isinstance(actions, spaces.Box) and len(actions.shape) == 1:
        low, high = actions.low.astype(float).tolist(), actions.high.astype(float).tolist()
        given = {"low": low, "high": high} if bounded([*low, *high]) else {}
        return ActionSpace(width=len(low), **given), 0
    raise ValueError(
        f"environment {name!r} has actions {actions}, which are neither one of several (Discrete) nor a vector (Box); wrap it, or "
        "choose another one."
    )


def _action_names(env: Any) -> list[str] | None:
    """The names of an environment's actions: of ALE, of an enumeration (MiniGrid), or of the buttons (ViZDoom)."""
    if hasattr(env, "get_action_meanings"):
        return [str(name).lower() for name in env.get_action_meanings()]
    if hasattr(env, "button_map"):
        buttons = [str(button).rpartition(".")[2].lower() for button in env.game.get_available_buttons()]
        pressed = [[b for b, on in zip(buttons, combination, strict=False) if on] for combination in env.button_map]
        return ["+".join(names) or "none" for names in pressed]
    if isinstance(getattr(env, "actions", None), type):
        return [str(action.name) for action in env.actions]
    return None

"""Actions, one for every pixel frame: what an agent did on the way to it."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from stdit.conditions.base import ClipFacts, Conditioner, Key
from stdit.conditions.values import Value

LARGEST_COUNT, LARGEST_WIDTH = 100_000, 4096  # actions, and numbers of one; worlds and robots have far fewer
UNBOUNDED = 1e30  # a bound beyond it is none: environments write infinity as the largest float32


@dataclass(frozen=True)
class ActionSpace:
    """The actions of an environment: one of `count`, or `width` numbers.

    names: of the actions, or of the numbers. low, high: bounds of each number (`bounded`). repeat: frames that one action lasts.
    environment: where they belong, as `worlds.environments.make_environment` reads it: name, and perhaps options,
    turn_based and size.
    """

    count: int | None = None
    width: int | None = None
    names: Sequence[str] | None = None
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    repeat: int = 1
    environment: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any], where: str) -> "ActionSpace":
        """Read a mapping of these fields; ValueError if it is no space of actions. where: what is read, for messages."""
        try:
            space = cls(**{name: given[name] for name in given})
        except TypeError as error:
            names = ", ".join(field.name for field in fields(cls))
            raise ValueError(f"{where}: {error}; give {names}.") from error
        space.check(where)
        return space

    @property
    def plain(self) -> dict[str, Any]:
        """The fields that are set, as a dictionary that JSON can hold."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def check(self, where: str) -> None:
        """Raise ValueError for a space that contradicts itself."""
        if (self.count is None) == (self.width is None):
            raise ValueError(f"{where}: count={self.count} and width={self.width}; give one of them.")
        for field, kind in (("names", str), ("low", (int, float)), ("high", (int, float))):
            value = getattr(self, field)
            if value is not None and not (isinstance(value, Sequence) and all(isinstance(one, kind) for one in value)):
                raise ValueError(
                    f"{where}: {field}={str(value)[:60]!r} is no list of {'texts' if field == 'names' else 'numbers'}."
                )
        size, name, most = (
            (self.width, "width", LARGEST_WIDTH) if self.count is None else (self.count, "count", LARGEST_COUNT)
        )
        if not isinstance(size, int) or not 1 <= size <= most:
            raise ValueError(f"{where}: {name}={size} is not a whole number from 1 to {most}.")
        if not isinstance(self.repeat, int) or self.repeat < 1:
            raise ValueError(f"{where}: repeat={self.repeat} is not a number of frames, 1 or more.")
        about = self.environment
        if about is not None and not (isinstance(about, Mapping) and isinstance(about.get("name"), str)):
            raise ValueError(f"{where}: environment={str(about)[:60]} has no name.")
        for field in ("names", "low", "high"):
            value = getattr(self, field)
            if value is not None and len(value) != size:
                raise ValueError(f"{where}: {len(value)} {field} for {size} {'numbers' if self.width else 'actions'}.")
        low, high = self.low or (), self.high or ()
        if not bounded([*low, *high]) or any(high < low for low, high in zip(low, high, strict=False)):
            raise ValueError(
                f"{where}: low={str(low)[:60]} and high={str(high)[:60]} are no bounds, which are finite, at most {UNBOUNDED:g}, and "
                "low <= high; leave both out for numbers without bounds."
            )

    def number(self, action: int | str) -> int:
        """The number of an action that is given as number or name; ValueError if it is unknown or out of range."""
        assert self.count is not None
        names = list(self.names or ())
        if isinstance(action, str) and action in names:
            return names.index(action)
        known = f" ({', '.join(names[:12])})" if names else ""
        try:
            number = int(action)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"action {str(action)[:40]!r} is unknown; use 0 to {self.count - 1}{known}.") from error
        if not 0 <= number < self.count or number != action:
            raise ValueError(f"action {action!r} is out of range; use 0 to {self.count - 1}{known}.")
        return number


def bounded(bounds: Sequence[float]) -> bool:
    """Whether all of these bounds are ones: finite, and small enough that float32 holds the range between them."""
    return all(abs(bound) <= UNBOUNDED for bound in bounds)


class ActionEmbedder(nn.Module):
    """Embeds the actions of a group of frames: each by a table or a matrix, concatenated in order, then an MLP.

    A missing action has a vector of its own. The output is zero at initialisation.
    """

    def __init__(self, space: ActionSpace, stride: int, dim: int):
        super().__init__()
        self.count, each = space.count, max(16, dim // 4)
        self.table = nn.Embedding((space.count or 0) + 1, each)  # the last row: no action
        self.proj = None if space.width is None else nn.Linear(space.width, each)
        self.mlp = nn.Sequential(nn.Linear(stride * each, dim), nn.SiLU(), nn.Linear(dim, dim))

    def reset(self) -> None:
        """Zero-initialise the output, so that actions have no effect at first."""
        nn.init.normal_(self.table.weight, std=0.5)
        for parameter in self.mlp[2].parameters():
            nn.init.zeros_(parameter)

    def forward(self, actions: Tensor) -> Tensor:
        """Actions (..., stride), or (..., stride, width), nan where missing -> vectors (..., D)."""
        if self.proj is None:
            each = self.table(actions)
        else:
            missing = actions.isnan().any(-1, keepdim=True)
            dtype = self.proj.weight.dtype
            each = torch.where(missing, self.table.weight[0], self.proj(actions.nan_to_num().to(dtype)))
        return self.mlp(each.flatten(-2))


class Actions(Conditioner):
    """An action for every pixel frame, the one that leads to it; a latent frame is told those of its `stride` frames.

    A value is (B, T, stride) with `count` for "no action", or (B, T, stride, width) with nan. The first frame has none.
    In pipeline calls `actions` has one entry for each frame of the result, or for its last ones only. The other arguments
    are those of `ActionSpace`; numbers are scaled by their bounds to [-1, 1].
    """

    name = "actions"
    keywords = ("actions",)
    module = "action_embedder"
    guided_by_default = False  # what is told is done at half the cost

    def __init__(self, stride: int = 1, **space: Any):
        self.space = ActionSpace.of(space, "the space of actions")
        if not isinstance(stride, int) or not 1 <= stride <= 64:
            raise ValueError(f"stride={stride} of the actions is not that of a VAE in time, 1 to 64.")
        self.stride, self.width = stride, self.space.width

    @property
    def clip_ndim(self) -> int:  # type: ignore[override]
        """Dimensions of a value for whole clips: (B, stride), or (B, stride, width)."""
        return 2 if self.width is None else 3

    @property
    def _count(self) -> int:
        assert self.space.count is not None
        return self.space.count

    def embedder(self, dim: int) -> nn.Module:
        """Make the embedder of a group's actions."""
        return ActionEmbedder(self.space, self.stride, dim)

    def null(self, count: int) -> Tensor:
        """No action in any frame of a group (count, 1, stride)."""
        return self._missing(count, 1, self.stride)

    def _missing(self, *shape: int) -> Tensor:
        if self.width is None:
            return torch.full(shape, self._count)
        return torch.full((*shape, self.width), float("nan"))

    # Data

    @classmethod
    def read(cls, record: Mapping[str, Any], clip: ClipFacts) -> Any:
        """The actions of the clip's frames, None for the first and for those without one.

        None where the record has none that belong to these frames; `data.actions` says why before a run that needs them.
        """
        try:
            actions = cls.listed(record.get("actions") or None)
        except ValueError:
            return None
        frames = list(range(clip.size[0])) if clip.frames is None else list(clip.frames)
        if frames[-1] >= len(actions) or any(after - before != 1 for before, after in pairwise(frames)):
            return None
        return [None, *(actions[frame] for frame in frames[1:])]

    @staticmethod
    def listed(actions: Any) -> Sequence[Any]:
        """The actions of a row, which CSV holds as the text of a list; ValueError if they are none."""
        try:
            found = json.loads(actions) if isinstance(actions, str) else actions
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, list | tuple):
            raise ValueError(
                f"actions {str(actions)[:60]!r} are no list; give one for every frame of the file, null for the first."
            )
        return found

    @classmethod
    def collate(cls, raws: Sequence[Any]) -> Any:
        """Per pixel frame: whole numbers (B, F), -1 where missing, or numbers (B, F, width), nan where missing.

        None if some clips have none, or if they are of several kinds: a model without actions does not ask.
        """
        if any(raw is None for raw in raws):
            return None
        widths = {len(one) for raw in raws for one in raw if isinstance(one, Sequence) and not isinstance(one, str)}
        try:
            return torch.stack([_to_tensor(raw, next(iter(widths), None)) for raw in raws]) if len(widths) < 2 else None
        except ValueError:
            return None

    # Training

    def drop(self, values: Any, keys: Sequence[Key], rate: float) -> Any:
        """Replace all actions of dropped clips by none."""
        gone = torch.tensor(self.dropped(keys, rate)).view(-1, *[1] * (values.ndim - 1))
        return torch.where(gone, -1 if self.width is None else float("nan"), values)

    def encode(self, values: Any, stride: int) -> Tensor:
        """Group the actions of pixel frames (B, F) to those of latent frames (B, T, stride)."""
        per_frame = self._checked(values)
        total = per_frame.shape[1]
        return self.at(per_frame, range(0, total, stride), total, stride=stride, starts=True)

    # Sampling

    def parse(self, given: Any, count: int) -> Tensor:
        """Actions per pixel frame, one row for each clip or one for all, to (count, F) or (count, F, width)."""
        if given is None:
            return self._missing(count, 1)
        values = self._rows(given)
        if len(values) not in (1, count):
            raise ValueError(f"{len(values)} rows of actions for {count} clips; give one per clip, or one for all.")
        return self._checked(values).expand(count, *values.shape[1:])

    def pair(self, given: Any, count: int, negative: Any = None) -> tuple[Tensor, Tensor]:
        """The actions of `count` clips, and what guidance leads away from: `negative`, or no action."""
        value = self.parse(given, count)
        null = self._missing(*value.shape[:2]) if negative is None else self.parse(negative, count)
        return value, null

    def count(self, given: Any) -> int:
        """The number of clips that a user's actions are for."""
        return len(self._rows(given))

    def at(self, value: Value, frames: Sequence[int], total: int, *, stride: int, starts: bool) -> Tensor:
        """The actions (B, T, stride) of latent frames that end at pixel frames `frames` of a clip of `total` frames.

        value: per pixel frame; if fewer than `total`, of the last ones. starts: whether the first latent frame is encoded
        alone, so that no action leads to it.
        """
        assert isinstance(value, Tensor)
        ends = torch.as_tensor(list(frames))[:, None] + torch.arange(1 - self.stride, 1)
        index = ends - (total - value.shape[1])
        known = (index >= 0) & (index < value.shape[1]) & (ends > 0)
        if starts:
            known[0] = False
        found = value[:, index.clamp(0, value.shape[1] - 1).flatten()].unflatten(1, index.shape)
        missing = self._missing(len(value), *index.shape).to(found)
        known = known.to(found.device)
        return torch.where(known if self.width is None else known[..., None], found, missing)

    def check_frames(self, value: Value, frames: int, stride: int) -> None:
        """Raise ValueError for more actions than frames."""
        assert isinstance(value, Tensor)
        if value.shape[1] > frames:
            raise ValueError(
                f"{value.shape[1]} actions for {frames} frames; give one for every frame of the result, or for its last ones."
            )

    def preview(
        self, records: Callable[[int], Mapping[str, Any]], samples: int, count: int, *, frames: int
    ) -> dict[str, Any]:
        """The first actions of clips of the data."""
        found = [_recorded(records(i * samples // count))[:frames] for i in range(count)]
        shortest = min(len(actions) for actions in found)
        return {"actions": [actions[:shortest] for actions in found]}

    def number(self, action: Any) -> Any:
        """One action as numbers: of a name, a whole number; of numbers, a list; ValueError if it is none of this space."""
        if self.width is None:
            return self.space.number(action)
        try:
            if isinstance(action, str | bytes | Mapping):  # whose characters or keys may be numbers
                raise TypeError(f"it is a {type(action).__name__}")
            values = [float(one) for one in action]
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"action {str(action)[:40]!r} is no list of {self.width} numbers; give these.") from error
        if not all(math.isfinite(one) for one in values):
            raise ValueError(f"action {str(action)[:40]} has numbers that are not finite; give others.")
        if len(values) != self.width:
            raise ValueError(f"action {action!r} has {len(values)} numbers; give {self.width}.")
        self._scale(torch.tensor(values))  # raises for one that is out of range
        return values

    def _rows(self, given: Any) -> Tensor:
        """A user's actions as rows of clips (B, F) or (B, F, width), -1 or nan where there is none."""
        if hasattr(given, "shape"):
            values = torch.as_tensor(given)
        else:
            one = self.clip_ndim - 1  # nested lists of one clip
            rows = given if _depth(given) > one else [given]
            if _depth(rows) != one + 1:
                raise ValueError(
                    f"actions {str(given)[:80]!r} do not fit; give a list with one for each frame, or lists of clips."
                )
            numbers = [[None if action is None else self.number(action) for action in row] for row in rows]
            if len({len(row) for row in numbers}) > 1:
                raise ValueError("clips of one call have different numbers of actions; give as many for each.")
            values = torch.stack([_to_tensor(row, self.width) for row in numbers])
        return values[None] if values.ndim == self.clip_ndim - 1 else values

    def _checked(self, values: Tensor) -> Tensor:
        """Values per pixel frame as the model takes them; ValueError for another kind of action, or one out of range."""
        if self.width is None:
            if values.ndim != 2 or values.is_floating_point():
                raise ValueError(
                    f"actions of shape {tuple(values.shape)} do not fit: this model takes whole numbers, one for each frame."
                )
            wrong = values[(values < -1) | (values >= self._count)]
            if len(wrong):
                self.space.number(int(wrong[0]))  # raises
            return torch.where(values < 0, self._count, values)
        if values.ndim != 3 or values.shape[2] != self.width:
            raise ValueError(
                f"actions of shape {tuple(values.shape)} do not fit: this model takes {self.width} numbers for each frame."
            )
        return self._scale(values.float())

    def _scale(self, values: Tensor) -> Tensor:
        """Numbers scaled by their bounds to [-1, 1]; ValueError for one beyond them. Without bounds, as they are.

        A number that is always the same is 0.
        """
        if self.space.low is None or self.space.high is None:
            return values
        low, high = torch.tensor(self.space.low).to(values), torch.tensor(self.space.high).to(values)
        room = 1e-3 * (high - low) + 1e-6  # of rounding
        beyond = (values < low - room) | (values > high + room)
        if beyond.any():
            where = beyond.nonzero()[0].tolist()
            raise ValueError(
                f"action {values[tuple(where)]:g} is out of range; number {where[-1]} goes from {low[where[-1]]:g} to {high[where[-1]]:g}."
            )
        scaled = 2 * (values - low) / (high - low).clamp(min=1e-9) - 1
        return torch.where((high == low) & ~values.isnan(), 0.0, scaled)  # a missing one stays nan


def _recorded(record: Mapping[str, Any]) -> list[Any]:
    """The actions of a record, of the data or of a cache; none if it has none."""
    found = record.get("actions") or record.get("conditions", {}).get("actions") or [None]
    return list(Actions.listed(found))


def _depth(value: Any) -> int:
    """How deep lists are nested; 0 for what is no list."""
    return (
        1 + max(map(_depth, value), default=0)
        if isinstance(value, list | tuple) or (hasattr(value, "shape") and len(value.shape))
        else 0
    )


def _to_tensor(actions: Sequence[Any], width: int | None) -> Tensor:
    """A clip's actions as whole numbers, -1 for None, or as numbers (F, width), nan for None."""
    try:
        if width is None:
            return torch.tensor([-1 if one is None else one for one in actions])
        return torch.tensor(
            [[float("nan")] * width if one is None else list(one) for one in actions], dtype=torch.float32
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"actions {str(actions)[:80]} are no numbers ({error}); give one for each frame.") from error

"""The interface of a conditioner, which turns a record of the data into a vector or tokens for the blocks."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from stdit.conditions.values import Tokens, Value, map_value
from stdit.rng import keyed_generator

Key = tuple[int, int, int]  # (seed, step, slot) of a clip in training


class ClipFacts(NamedTuple):
    """Properties of a loaded or generated clip.

    size: pixel frames, height and width. fps: frames per second. frames: numbers of its frames in the source file.
    """

    size: tuple[int, int, int]
    fps: float
    frames: Sequence[int] | None = None


class Conditioner(ABC):
    """One kind of condition: how it is read, collated, dropped in training, embedded and passed to the blocks.

    A value is a tensor or `Tokens`, as a model takes it; the null value stands for "no condition".

    name: key in batches and in `conditions=` of a model. keywords: argument names in a model's forward and in pipeline
    calls. module: name of the embedder in the model. joins: "vector" is added to the conditioning vector, "tokens" are
    passed to the blocks as tokens. clip_ndim: dimensions of a value for whole clips, without the frame axis. guided:
    whether guidance replaces it by its null in the unconditional branch. guided_by_default: whether a model of this
    condition alone is guided by calls that give no scale. stored: whether a latent cache has a column of
    its raw values under its name.
    """

    name: ClassVar[str]
    keywords: ClassVar[tuple[str, ...]]
    module: ClassVar[str]
    joins: ClassVar[Literal["vector", "tokens"]] = "vector"
    clip_ndim: ClassVar[int]
    guided: ClassVar[bool] = True
    guided_by_default: ClassVar[bool] = True
    stored: ClassVar[bool] = True

    # Model

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self | None:
        """Make the conditioner from a model's config; None if the model does not have the condition.

        By default the arguments of the constructor are the entry `name` of `extra_conditions`.
        """
        arguments = (config.get("extra_conditions") or {}).get(cls.name)
        return None if arguments is None else cls(**arguments)

    @abstractmethod
    def embedder(self, dim: int) -> nn.Module:
        """Make the module that maps a value (B, T|1, ...) to vectors (B, T|1, D) or tokens (B, T|1, L, D)."""

    @abstractmethod
    def null(self, count: int) -> Value:
        """The null value, for `count` clips."""

    def default(self, count: int) -> Value | None:
        """Value if none is given: by default the null. None adds nothing; ValueError if a value is required."""
        return self.null(count)

    def value(self, given: Tensor, mask: Tensor | None = None) -> Value:
        """Make a value (B, T|1, ...) from the arguments of `keywords`.

        given: (B, ...) for whole clips, or (B, T, ...) per latent frame.
        """
        return with_frames(given, self.clip_ndim)

    def example(self, count: int) -> Value:
        """An example value of the right shape, for counting the operations of a model."""
        return self.null(count)

    # Data

    @classmethod
    @abstractmethod
    def read(cls, record: Mapping[str, Any], clip: ClipFacts) -> Any:
        """Read one clip's raw value (numbers or text that JSON can hold) from its record; None if it has none."""

    @classmethod
    def collate(cls, raws: Sequence[Any]) -> Any:
        """Collate raw values of a batch, by default to a float tensor (B, ...)."""
        if any(raw is None for raw in raws):
            raise ValueError(f"{cls.name!r} is missing for some clips of the data; give it for all clips, or for none.")
        return torch.tensor(raws, dtype=torch.float32)

    # Training

    dropout_salt: ClassVar[tuple[int, ...] | None] = None  # None: derived from the name

    def dropped(self, keys: Sequence[Key], rate: float) -> list[bool]:
        """Whether the condition is dropped for each training clip, as a function of the clip's key only."""
        salt = (2, zlib.crc32(self.name.encode())) if self.dropout_salt is None else self.dropout_salt
        return [torch.rand((), generator=keyed_generator("dropout", *key, *salt)).item() < rate for key in keys]

    def drop(self, values: Any, keys: Sequence[Key], rate: float) -> Any:
        """Replace the collated values of dropped clips by the null."""
        null = self.null(len(keys))
        assert isinstance(values, Tensor) and isinstance(null, Tensor)
        gone = torch.tensor(self.dropped(keys, rate)).view(-1, *[1] * (values.ndim - 1))
        null = null[:, 0] if values.ndim < null.ndim else null
        return torch.where(gone, null, values)

    def redraw(self, values: Any, keys: Sequence[Key]) -> Any:
        """Other values in place of collated ones, drawn by the clips' keys; by default the same, where none can be drawn."""
        return values

    def encode(self, values: Any, stride: int) -> Value:
        """Convert collated values to a value; `stride`: pixel frames per latent frame after the first."""
        return self.value(values)

    # Sampling

    def parse(self, given: Any, count: int) -> Value:
        """Convert a user's input for `count` clips, one per clip or one for all, to a value; None gives the null."""
        if given is None:
            return self.null(count)
        given = torch.as_tensor(given)
        values = self.value(given if given.ndim >= self.clip_ndim else given[None])
        null = self.null(1)
        assert isinstance(values, Tensor) and isinstance(null, Tensor)
        if values.shape[2:] != null.shape[2:]:
            shape = ", ".join(map(str, null.shape[2:]))
            raise ValueError(
                f"{self.keywords[0]} of shape {tuple(given.shape)} does not fit; give (clips, {shape}), or (clips, latent "
                f"frames, {shape})."
            )
        if len(values) not in (1, count):
            raise ValueError(
                f"{len(values)} values of {self.name!r} for {count} clips; give one per clip, or one for all."
            )
        return values.expand(count, *values.shape[1:])

    def pair(self, given: Any, count: int, negative: Any = None) -> tuple[Value, Value]:
        """The value for `count` clips, and what guidance leads away from, of the same shape: `negative`, or the null."""
        value = self.parse(given, count)
        if negative is None and not self.guided:
            return value, value
        null = self.null(count) if negative is None else self.parse(negative, count)
        assert isinstance(value, Tensor) and isinstance(null, Tensor)
        value, null = torch.broadcast_tensors(value, null)
        return value, null

    def count(self, given: Any) -> int:
        """The number of clips that a user's input is for."""
        values = torch.as_tensor(given)
        return len(values) if values.ndim >= self.clip_ndim else 1

    def at(self, value: Value, frames: Sequence[int], total: int, *, stride: int, starts: bool) -> Value:
        """The value for latent frames that end at pixel frames `frames` of an output of `total` frames.

        value: of all latent frames of the output, or of whole clips. Frames outside the output take its first or last
        value. stride: pixel frames per latent frame after the first. starts: whether the first of them is encoded alone,
        as the start of a clip.
        """
        latents = [-(-min(max(frame, 0), total - 1) // stride) for frame in frames]
        return map_value(value, lambda x: x if x.shape[1] == 1 else x[:, latents])

    def check_frames(self, value: Value, frames: int, stride: int) -> None:
        """Raise ValueError unless there is one value per clip, or one per latent frame of an output of `frames` frames."""
        expected = -(-(frames - 1) // stride) + 1
        given = (value.tokens if isinstance(value, Tokens) else value).shape[1]
        if given not in (1, expected):
            raise ValueError(
                f"condition {self.name!r} has {given} values per clip, but its {frames} frames are {expected} latent frames; give one value "
                "per latent frame, or one per clip."
            )

    def of_clip(self, clip: ClipFacts) -> Value | None:
        """Value that follows from the clip to be generated; None for a condition that the user gives."""
        return None

    def preview(
        self, records: Callable[[int], Mapping[str, Any]], samples: int, count: int, *, frames: int
    ) -> dict[str, Any]:
        """Arguments of the pipeline call that samples `count` preview clips in training.

        records: index of a sample, below `samples` -> its record. frames: of a clip.
        """
        return {}


def with_frames(value: Tensor, clip_ndim: int) -> Tensor:
    """Add the frame axis to a value of `clip_ndim` dimensions: (B, ...) -> (B, 1, ...)."""
    return value.unsqueeze(1) if value.ndim == clip_ndim else value


def last_of_groups(values: Tensor, stride: int) -> Tensor:
    """Take the last pixel frame of each of the VAE's groups: (B, F, ...) -> per latent frame (B, T, ...)."""
    return values[:, ::stride]

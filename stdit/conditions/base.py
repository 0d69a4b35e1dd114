"""The interface of a conditioner, from a row of the data to a vector or tokens in every block."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from stdit.conditions.values import Value
from stdit.rng import keyed_generator

Key = tuple[int, int, int]  # (seed, step, slot) of a clip in training


class ClipFacts(NamedTuple):
    """What a loaded clip is: pixel frames, height, width; frames per second; numbers of its frames in the source file."""

    size: tuple[int, int, int]
    fps: float
    frames: Sequence[int] | None = None


class Conditioner(ABC):
    """One kind of condition: how it is read, collated, dropped, made null, embedded, and how it joins the blocks.

    name: key in batches and in `conditions=` of a model. keywords: its arguments of a model's forward and of a pipeline
    call. module: name of its embedder in the model. joins: added to the conditioning vector, or tokens of their own.
    clip_ndim: dimensions of a value that holds for whole clips, without the frame axis. guided: whether guidance replaces
    it by its null in the unconditional branch. stored: whether a cache of latents keeps its raw values by its name.
    """

    name: ClassVar[str]
    keywords: ClassVar[tuple[str, ...]]
    module: ClassVar[str]
    joins: ClassVar[Literal["vector", "tokens"]] = "vector"
    clip_ndim: ClassVar[int]
    guided: ClassVar[bool] = True
    stored: ClassVar[bool] = True

    # The model's side

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self | None:
        """The conditioner of a model's config, or None if the model has none.

        Conditions without a key of their own stand in `extra_conditions`: name -> arguments of the constructor.
        """
        arguments = (config.get("extra_conditions") or {}).get(cls.name)
        return None if arguments is None else cls(**arguments)

    @abstractmethod
    def embedder(self, dim: int) -> nn.Module:
        """A module from a value (B, T|1, ...) to vectors (B, T|1, D), or to tokens (B, T|1, L, D)."""

    @abstractmethod
    def null(self, count: int) -> Value:
        """The null value, for `count` clips."""

    def default(self, count: int) -> Value | None:
        """What a model takes where nothing is given: the null; None adds nothing. May raise ValueError."""
        return self.null(count)

    def value(self, given: Tensor, mask: Tensor | None = None) -> Value:
        """A value (B, T|1, ...) from the arguments of `keywords`: (B, ...) holds for whole clips, (B, T, ...) per latent frame."""
        return with_frames(given, self.clip_ndim)

    def example(self, count: int) -> Value:
        """A value of the right shape, for counting what a model costs."""
        return self.null(count)

    # The data's side

    @classmethod
    @abstractmethod
    def read(cls, record: Mapping[str, Any], clip: ClipFacts) -> Any:
        """One clip's raw value (plain numbers or text, JSON can hold it) from its record; None if the data has none."""

    @classmethod
    def collate(cls, raws: Sequence[Any]) -> Any:
        """Raw values of a batch in one container, by default a float tensor (B, ...)."""
        if any(raw is None for raw in raws):
            raise ValueError(
                f"some clips of the data have {cls.name!r} and some have none; give it to all, or to none."
            )
        return torch.tensor(raws, dtype=torch.float32)

    # Training

    dropout_salt: ClassVar[tuple[int, ...] | None] = None  # None: from the name

    def dropped(self, keys: Sequence[Key], rate: float) -> list[bool]:
        """Which clips of training go without this condition: a function of each clip's key alone."""
        salt = (2, zlib.crc32(self.name.encode())) if self.dropout_salt is None else self.dropout_salt
        return [torch.rand((), generator=keyed_generator("dropout", *key, *salt)).item() < rate for key in keys]

    def drop(self, values: Any, keys: Sequence[Key], rate: float) -> Any:
        """Collated values with those of dropped clips replaced by the null."""
        null = self.null(len(keys))
        assert isinstance(values, Tensor) and isinstance(null, Tensor)
        gone = torch.tensor(self.dropped(keys, rate)).view(-1, *[1] * (values.ndim - 1))
        null = null[:, 0] if values.ndim < null.ndim else null
        return torch.where(gone, null, values)

    def encode(self, values: Any, stride: int) -> Value:
        """Collated values as a model takes them; `stride`: pixel frames per latent frame after the first."""
        return self.value(values)

    # Sampling

    def parse(self, given: Any, count: int) -> Value:
        """What a person gives for `count` clips, one for each or one for all, as a value; None is the default."""
        if given is None:
            return self.null(count)
        given = torch.as_tensor(given)
        values = self.value(given if given.ndim >= self.clip_ndim else given[None])
        assert isinstance(values, Tensor)
        if len(values) not in (1, count):
            raise ValueError(
                f"{len(values)} values of {self.name!r} for {count} clips; give one per clip, or one for all."
            )
        return values.expand(count, *values.shape[1:])

    def pair(self, given: Any, count: int) -> tuple[Value, Value]:
        """A value for `count` clips, and the null that guidance sets against it, of one shape."""
        value = self.parse(given, count)
        if not self.guided:
            return value, value
        null = self.null(count)
        assert isinstance(value, Tensor) and isinstance(null, Tensor)
        return value, null.expand_as(value)

    def of_clip(self, clip: ClipFacts) -> Value | None:
        """The value that follows from the clip to be made, whatever is given; None for a condition that a person gives."""
        return None

    def preview(self, records: Callable[[int], Mapping[str, Any]], samples: int, count: int) -> dict[str, Any]:
        """Arguments of a pipeline for `count` clips sampled in training; `records(i)` is the record of sample i of `samples`."""
        return {}


def with_frames(value: Tensor, clip_ndim: int) -> Tensor:
    """(B, ...) of `clip_ndim` dimensions -> (B, 1, ...); a value that has the frame axis stays as it is."""
    return value.unsqueeze(1) if value.ndim == clip_ndim else value


def last_of_groups(values: Tensor, stride: int) -> Tensor:
    """Per pixel frame (B, F, ...) -> per latent frame (B, T, ...): of each group of the VAE its last frame."""
    return values[:, ::stride]

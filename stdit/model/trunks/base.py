"""What any wiring of blocks is asked: which blocks, who follows whom, and what it does not go with."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stdit.conditions import Conditions
from stdit.nn.attention import POSITION_ENCODINGS
from stdit.nn.cache import FrameCache
from stdit.nn.layout import Layout
from stdit.nn.modulation import Condition


@dataclass(frozen=True)
class Build:
    """What a model asks of its trunk. axes and times are of every block; grid: rows and columns of patches it is made for;
    block: (number, **changes) -> a plain block of this model."""

    depth: int
    dim: int
    heads: int
    mlp_ratio: float
    qk_norm: bool
    axes: Sequence[str]
    times: Sequence[str]
    grid: tuple[int, int]
    conditioning: str
    position_encoding: str
    causal: bool
    relative_position_bias: bool
    caption_channels: int | None
    num_decoder_blocks: int
    num_single_blocks: int
    block: Callable[..., nn.Module]


@dataclass(frozen=True)
class Way:
    """The blocks, and what goes with the tokens from one to the next. call: runs a block, checkpointed where that is asked
    for; kept: (B, n) patches that may be seen, None for all.

    Blocks stand here, not among a trunk's arguments, since accelerate's hooks move modules that are given to a module.
    """

    blocks: nn.ModuleList
    call: Callable[..., Any]
    condition: Condition
    layout: Layout
    cache: FrameCache | None = None
    kept: Tensor | None = None

    def __call__(
        self, block: nn.Module, tokens: Tensor, skip: Tensor | None = None, layout: Layout | None = None
    ) -> Tensor:
        """Tokens through one plain block."""
        return self.call(block, tokens, self.condition, layout or self.layout, self.cache, skip)


class Trunk(nn.Module, ABC):
    """How blocks are wired; what it owns beside them. The blocks themselves are the model's, `blocks.0` to the last.

    packs: takes clips of many shapes in one row. by_patch: takes a level for every patch. hides: may learn with patches
    hidden. requires_text: has a stream of text. idle: in some steps some parameters take no part.
    """

    packs: ClassVar[bool] = False
    supports_patch_levels: ClassVar[bool] = True
    hides: ClassVar[bool] = False
    requires_text: ClassVar[bool] = False
    idle: ClassVar[bool] = False

    def __init__(self, build: Build):
        super().__init__()
        self.check(build)

    @classmethod
    def check(cls, build: Build) -> None:
        """ValueError for a depth that does not fit, and for company it does not take."""
        if build.num_single_blocks:
            raise ValueError(
                f"num_single_blocks={build.num_single_blocks} belongs to trunk='dual_stream'; leave it out."
            )

    def make_blocks(self, build: Build) -> list[nn.Module]:
        return [build.block(i) for i in range(build.depth)]

    def reset(self) -> None:
        """Its own start, where a linear layer's does not fit."""

    def pooled_text_embedding(self, conditions: Conditions, dtype: torch.dtype) -> Tensor | None:
        """(B, 1, 1, D) that the trunk adds to the conditioning vector, or None."""
        return None

    @abstractmethod
    def forward(self, tokens: Tensor, way: Way) -> Tensor:
        """Tokens (B, T, S, D) through all blocks."""


def block_position_encodings(entry: str, axes: Sequence[str]) -> list[str]:
    """Where time enters each block of these axes: in every attention, or once, in the stream before the first of time."""
    inside = [name for name in POSITION_ENCODINGS if name != "none"]
    if entry in inside:
        return [entry] * len(axes)
    if entry != "latte":
        raise ValueError(f"position_encoding={entry!r} is unknown. Choose one of: {', '.join([*inside, 'latte'])}.")
    first = next((i for i, axis in enumerate(axes) if axis != "spatial"), None)
    return ["latte" if i == first else "none" for i in range(len(axes))]

"""The interface of a trunk, which connects the blocks: which blocks, in which order, and what it supports."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stdit.nn.blocks import STDiTBlock
from stdit.nn.cache import FrameCache
from stdit.nn.conditioning import CONDITIONINGS, Conditioning
from stdit.nn.config import BlockConfig
from stdit.nn.context import POSITION_ENCODINGS, BlockContext, make_context
from stdit.nn.layout import Layout
from stdit.nn.modulation import Condition


@dataclass(frozen=True)
class TrunkConfig:
    """Configuration of a trunk.

    axes: of every block. grid: rows and columns of patches the model is made for. caption_axes: axes whose blocks
    cross-attend to captions (empty: all).
    """

    block: BlockConfig
    axes: Sequence[str]
    grid: tuple[int, int]
    position_encoding: str = "sincos"
    caption_channels: int | None = None
    caption_axes: Sequence[str] = ()
    num_decoder_blocks: int = 4
    num_single_blocks: int = 0

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.axes)

    @property
    def conditioning(self) -> Conditioning:
        """How the condition enters the blocks."""
        return CONDITIONINGS[self.block.conditioning]

    @property
    def position_encodings(self) -> list[str]:
        """The position encoding of every block."""
        return block_position_encodings(self.position_encoding, self.axes)

    def make_block(self, i: int, *, skip: bool = False) -> STDiTBlock:
        """The block `i`."""
        axis = self.axes[i]
        return STDiTBlock(
            self.block,
            axis,
            position_encoding=self.position_encodings[i],
            captions=bool(self.caption_channels) and axis in (self.caption_axes or self.axes),
            skip=skip,
        )


@dataclass
class TrunkContext:
    """What the blocks of one forward pass share in one forward pass.

    call: runs a block, checkpointed where that is asked for. visible: (B, n) patches that the encoder of a masked trunk
    sees, None for all. Blocks stand here, not among a trunk's arguments, since accelerate's hooks move modules that are
    given to a module.
    """

    blocks: Sequence[Any]
    call: Callable[..., Any]
    config: BlockConfig
    condition: Condition
    layout: Layout
    cache: FrameCache | None = None
    visible: Tensor | None = None
    _contexts: dict[int, BlockContext] = field(default_factory=dict)

    def of(self, layout: Layout | None = None) -> BlockContext:
        """The blocks' context for a layout (None: the trunk's own), its position tables made once."""
        layout = layout or self.layout
        if id(layout) not in self._contexts:
            attentions = [(block.attn.axis, block.attn.position_encoding) for block in self.blocks]
            self._contexts[id(layout)] = make_context(self.config, attentions, self.condition, layout, cache=self.cache)
        return self._contexts[id(layout)]

    def __call__(
        self, block: nn.Module, tokens: Tensor, skip: Tensor | None = None, layout: Layout | None = None
    ) -> Tensor:
        """Tokens (B, T, S, D) through one plain block."""
        return self.call(block, tokens, self.of(layout), skip)


class Trunk(nn.Module, ABC):
    """How blocks are connected, and the parameters it owns in addition. The blocks themselves are the model's `blocks`.

    supports: capabilities (`model.capabilities`) that a model with this trunk may have; requires: what it needs.
    options: constructor arguments of the model that only this trunk reads. block_classes: classes of its blocks, for diffusers (compilation, caches) and device maps. has_unused_parameters: in
    some steps some parameters get no gradient, so that DDP needs find_unused_parameters.
    """

    supports: ClassVar[frozenset[str]] = frozenset({"patch_levels", "block_caching"})
    requires: ClassVar[frozenset[str]] = frozenset()
    block_classes: ClassVar[tuple[type[nn.Module], ...]] = (STDiTBlock,)
    has_unused_parameters: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: TrunkConfig):
        super().__init__()
        self.check(config)

    @classmethod
    def check(cls, config: TrunkConfig) -> None:
        """Raise ValueError for an invalid depth or an unsupported combination."""

    def make_blocks(self, config: TrunkConfig) -> list[nn.Module]:
        """The blocks of a model."""
        return [config.make_block(i) for i in range(config.depth)]

    def reset(self) -> None:
        """Initialise what a linear layer's own initialisation does not fit."""

    def pooled_text_embedding(self, conditions: Mapping[str, Any], dtype: torch.dtype) -> Tensor | None:
        """(B, 1, 1, D) that the trunk adds to the conditioning vector, or None."""
        return None

    @abstractmethod
    def forward(self, tokens: Tensor, ctx: TrunkContext) -> Tensor:
        """Tokens (B, T, S, D) through all blocks."""


def block_position_encodings(encoding: str, axes: Sequence[str]) -> list[str]:
    """The position encoding of each block: the model's in every attention; Latte's once, in the first block of time."""
    if encoding not in POSITION_ENCODINGS or encoding == "none":
        known = [name for name in POSITION_ENCODINGS if name != "none"]
        raise ValueError(f"position_encoding={encoding!r} is unknown. Choose one of: {', '.join(known)}.")
    if encoding != "latte":
        return [encoding] * len(axes)
    first = next((i for i, axis in enumerate(axes) if axis != "spatial"), None)
    return ["latte" if i == first else "none" for i in range(len(axes))]

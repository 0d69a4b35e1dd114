"""The interface of a trunk, which makes the blocks and runs them in order."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stdit.nn.blocks import STDiTBlock
from stdit.nn.cache import FrameCache
from stdit.nn.conditioning import CONDITIONINGS, Conditioning
from stdit.nn.config import BlockConfig
from stdit.nn.context import POSITION_ENCODINGS, BlockContext, make_context
from stdit.nn.layout import DenseLayout, Layout
from stdit.nn.modulation import Condition


@dataclass(frozen=True)
class TrunkConfig:
    """Configuration of a trunk and its blocks.

    axes: the attention axis of every block. grid: rows and columns of patches of the training clips. caption_axes: axes
    whose blocks cross-attend to captions (empty: all).
    """

    block: BlockConfig
    axes: Sequence[str]
    grid: tuple[int, int]
    position_encoding: str = "sincos"
    caption_channels: int | None = None
    caption_axes: Sequence[str] = ()
    num_decoder_blocks: int = 4
    num_single_blocks: int = 0

    @classmethod
    def from_model_config(cls, config: Any) -> "TrunkConfig":
        """Collect the trunk's and the blocks' part of the flat config of STDiT."""
        patch_frames, patch_rows, patch_columns = config.patch_size
        frames, rows, columns = config.sample_size
        grid = (rows // patch_rows, columns // patch_columns)
        block = BlockConfig(
            dim=config.hidden_size,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            qk_norm=config.qk_norm,
            conditioning=config.conditioning,
            norm2_eps=config.norm2_eps,
            activation=config.activation,
            causal=config.causal,
            window=config.window,
            sink=config.sink,
            max_train_frames=frames // patch_frames,
            bias_grid=grid if config.relative_position_bias else None,
        )
        return cls(
            block=block,
            axes=[config.axes[i % len(config.axes)] for i in range(config.depth)],
            grid=grid,
            position_encoding=config.position_encoding,
            caption_channels=config.caption_channels,
            caption_axes=list(config.caption_axes),
            num_decoder_blocks=config.num_decoder_blocks,
            num_single_blocks=config.num_single_blocks,
        )

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
        """Make block `i` of the depth; skip: with a linear layer that merges an earlier block's output."""
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
    """The blocks of a model and their inputs in one forward pass.

    call: runs a block, with gradient checkpointing if it is enabled. visible: (B, n) or (B, T, n) indices of the patches that the
    encoder of a masked trunk or the middle blocks of a stack see, None for all. The blocks are passed here and not as arguments of a trunk, because
    accelerate's hooks move modules that are arguments of a module.
    """

    blocks: Sequence[Any]
    call: Callable[..., Any]
    config: BlockConfig
    condition: Condition
    layout: Layout
    cache: FrameCache | None = None
    visible: Tensor | None = None
    _contexts: dict[int, BlockContext] = field(default_factory=dict)

    def of_patches(self, visible: Tensor) -> "TrunkContext":
        """The context of blocks that see only these patches of every frame."""
        assert isinstance(self.layout, DenseLayout)
        return replace(
            self,
            layout=self.layout.with_visible(visible),
            condition=self.condition.of_patches(visible),
            visible=None,
            _contexts={},
        )

    def of(self, layout: Layout | None = None) -> BlockContext:
        """The blocks' context for a layout (None: `self.layout`); its position tables are made once."""
        layout = layout or self.layout
        if id(layout) not in self._contexts:
            attentions = [(block.attn.axis, block.attn.position_encoding) for block in self.blocks]
            flex = all(getattr(b.attn.processor, "_attention_backend", None) == "flex" for b in self.blocks)
            self._contexts[id(layout)] = make_context(
                self.config, attentions, self.condition, layout, cache=self.cache, flex=flex
            )
        return self._contexts[id(layout)]

    def __call__(
        self, block: nn.Module, tokens: Tensor, skip: Tensor | None = None, layout: Layout | None = None
    ) -> Tensor:
        """Run an `STDiTBlock` on tokens (B, T, S, D)."""
        return self.call(block, tokens, self.of(layout), skip)


class Trunk(nn.Module, ABC):
    """Connects the blocks of a model, and owns parameters that belong to no block. The model owns the blocks.

    supports: capabilities (`model.capabilities`) that a model with this trunk may have; requires: capabilities that it
    must have. options: constructor arguments of the model that only this trunk reads. block_classes: classes of its
    blocks, for diffusers (compilation, caches) and device maps. has_unused_parameters: some parameters get no gradient
    in some steps, so that DDP needs find_unused_parameters.
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
        """Raise ValueError for an invalid depth or an unsupported combination of choices."""

    def make_blocks(self, config: TrunkConfig) -> list[nn.Module]:
        """Make the blocks of a model, by default `config.depth` plain blocks."""
        return [config.make_block(i) for i in range(config.depth)]

    def reset(self) -> None:
        """Initialise the trunk's own parameters after the model has initialised all linear layers."""

    def pooled_text_embedding(self, conditions: Mapping[str, Any], dtype: torch.dtype) -> Tensor | None:
        """Embedding of the whole caption (B, 1, 1, D) that is added to the conditioning vector; by default None."""
        return None

    @abstractmethod
    def forward(self, tokens: Tensor, ctx: TrunkContext) -> Tensor:
        """Run tokens (B, T, S, D) through all blocks."""


def block_position_encodings(encoding: str, axes: Sequence[str]) -> list[str]:
    """The position encoding of each block.

    All blocks have the model's encoding, except that Latte's table is added once, in the first block that attends along
    time.
    """
    if encoding not in POSITION_ENCODINGS or encoding == "none":
        known = [name for name in POSITION_ENCODINGS if name != "none"]
        raise ValueError(f"position_encoding={encoding!r} is unknown. Choose one of: {', '.join(known)}.")
    if encoding != "latte":
        return [encoding] * len(axes)
    first = next((i for i, axis in enumerate(axes) if axis != "spatial"), None)
    return ["latte" if i == first else "none" for i in range(len(axes))]

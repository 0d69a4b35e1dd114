"""SD3's and FLUX's trunk: a video stream and a text stream pass through every block."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stdit.conditions import Tokens
from stdit.model.trunks.base import Trunk, TrunkConfig, TrunkContext
from stdit.nn.dual_stream import DualStreamBlock, SingleStreamBlock
from stdit.nn.embedders import CaptionEmbedder


class DualStream(Trunk):
    """Dual-stream blocks (Esser et al., figure 2), of which the last `num_single_blocks` are single-stream (FLUX).

    The mean of the caption's tokens is added to the conditioning vector. The text output of the last block is unused.
    """

    requires = frozenset({"text"})
    block_classes = (DualStreamBlock, SingleStreamBlock)
    has_unused_parameters = True
    options = ("num_single_blocks",)

    def __init__(self, config: TrunkConfig):
        super().__init__(config)
        assert config.caption_channels is not None
        self.pooled_embedder = CaptionEmbedder(config.caption_channels, config.block.dim)

    @classmethod
    def check(cls, config: TrunkConfig) -> None:
        """Raise ValueError without captions, and for choices that its blocks do not support."""
        if not config.caption_channels:
            raise ValueError(
                "trunk='dual_stream' needs captions: name a text encoder (text.encoder=words), or use trunk='stack'."
            )
        if not 0 <= config.num_single_blocks <= config.depth:
            raise ValueError(
                f"num_single_blocks must be >= 0 and <= depth={config.depth}, got {config.num_single_blocks}; "
                f"use 0 to {config.depth}."
            )
        block = config.block
        if block.causal or block.conditioning != "adaln_zero" or set(config.axes) != {"joint"}:
            raise ValueError(
                f"trunk='dual_stream' with conditioning={block.conditioning!r}, causal={block.causal} and "
                f"axes={sorted(set(config.axes))}: its blocks support only adaln_zero and joint attention; use "
                "conditioning=adaln_zero, causal=false, axes=[joint]."
            )
        if block.bias_grid is not None or config.position_encoding == "latte":
            raise ValueError(
                f"trunk='dual_stream' with relative_position_bias={block.bias_grid is not None} and "
                f"position_encoding={config.position_encoding!r}: its blocks support neither; use "
                "relative_position_bias=false and position_encoding='sincos' or 'rope_3d'."
            )

    def make_blocks(self, config: TrunkConfig) -> list[nn.Module]:
        """Make the dual-stream blocks, followed by the single-stream blocks."""
        first_single = config.depth - config.num_single_blocks
        return [
            (SingleStreamBlock if i >= first_single else DualStreamBlock)(config.block, encoding)
            for i, encoding in enumerate(config.position_encodings)
        ]

    def pooled_text_embedding(self, conditions: Mapping[str, Any], dtype: torch.dtype) -> Tensor | None:
        """Embed the mean of the caption's tokens: (B, 1, 1, D)."""
        caption = conditions["caption"]
        assert isinstance(caption, Tokens)
        if caption.tokens.shape[1] > 1:
            raise ValueError(
                "trunk='dual_stream' takes one caption per clip; give captions (B, L, C), or use another trunk."
            )
        tokens = caption.tokens[:, 0]
        weight = tokens.new_ones(tokens.shape[:2]) if caption.mask is None else caption.mask[:, 0].to(tokens)
        mean = (tokens * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp(min=1)
        return self.pooled_embedder(mean.to(dtype))[:, None, None]

    def forward(self, tokens: Tensor, ctx: TrunkContext) -> Tensor:
        """Run video and text through all blocks, and return the video tokens."""
        assert ctx.condition.tokens is not None
        text, block_ctx = ctx.condition.tokens[:, 0], ctx.of()
        for block in ctx.blocks:
            tokens, text = ctx.call(block, tokens, text, block_ctx)
        return tokens

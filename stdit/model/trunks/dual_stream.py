"""SD3's and FLUX's wiring: video and text side by side through every block."""

import torch
from torch import Tensor, nn

from stdit.conditions import Conditions, Tokens
from stdit.model.trunks.base import Build, Trunk, Way
from stdit.nn.dual_stream import DualStreamBlock, SingleStreamBlock
from stdit.nn.embedders import CaptionEmbedder


class DualStream(Trunk):
    """Blocks of two streams (Esser et al., "Scaling Rectified Flow Transformers", figure 2), the last `num_single_blocks` of one
    (FLUX); what has become of the text is left behind. The caption's mean is told by the vector besides."""

    requires_text, idle = True, True  # what the last block makes of the text is nobody's

    def __init__(self, build: Build):
        super().__init__(build)
        assert build.caption_channels is not None
        self.pooled_embedder = CaptionEmbedder(build.caption_channels, build.dim)

    @classmethod
    def check(cls, build: Build) -> None:
        if not build.caption_channels:
            raise ValueError(
                "trunk='dual_stream' has a stream of text: name a text encoder (text.encoder=words), or use trunk='stack'."
            )
        if not 0 <= build.num_single_blocks <= build.depth:
            raise ValueError(
                f"num_single_blocks={build.num_single_blocks} of depth={build.depth}: use 0 to {build.depth}."
            )
        if build.causal or build.conditioning != "adaln_zero" or set(build.axes) != {"joint"}:
            raise ValueError(
                f"trunk='dual_stream' with conditioning={build.conditioning!r}, causal={build.causal} and "
                f"axes={sorted(set(build.axes))}: its blocks have adaln_zero and attention over all tokens; use "
                "conditioning=adaln_zero, causal=false, axes=[joint]."
            )
        if build.relative_position_bias or build.position_encoding == "latte":
            raise ValueError(
                f"trunk='dual_stream' with relative_position_bias={build.relative_position_bias} and position_encoding={build.position_encoding!r}: its blocks have "
                "neither a bias nor time in the stream; use relative_position_bias=false and position_encoding='sincos' or 'rope_3d'."
            )

    def make_blocks(self, build: Build) -> list[nn.Module]:
        return [
            (SingleStreamBlock if i >= build.depth - build.num_single_blocks else DualStreamBlock)(
                build.dim, build.heads, build.mlp_ratio, build.qk_norm, time
            )
            for i, time in enumerate(build.times)
        ]

    def pooled_text_embedding(self, conditions: Conditions, dtype: torch.dtype) -> Tensor | None:
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

    def forward(self, tokens: Tensor, way: Way) -> Tensor:
        assert way.condition.tokens is not None
        text = way.condition.tokens[:, 0]
        for block in way.blocks:
            tokens, text = way.call(block, tokens, text, way.condition, way.layout)
        return tokens

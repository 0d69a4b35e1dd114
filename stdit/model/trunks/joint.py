"""SD3's and FLUX's wiring: video and text side by side through every block."""

import torch
from torch import Tensor, nn

from stdit.model.trunks.base import Build, Trunk, Way
from stdit.nn.embedders import CaptionEmbedder
from stdit.nn.joint import DualBlock, SingleBlock


class Joint(Trunk):
    """Blocks of two streams (Esser et al., "Scaling Rectified Flow Transformers", figure 2), the last `single_depth` of one
    (FLUX); what has become of the text is left behind. The caption's mean is told by the vector besides."""

    wants_text, idle = True, True  # what the last block makes of the text is nobody's

    def __init__(self, build: Build):
        super().__init__(build)
        assert build.caption_channels is not None
        self.pooled_embedder = CaptionEmbedder(build.caption_channels, build.dim)

    @classmethod
    def check(cls, build: Build) -> None:
        if not build.caption_channels:
            raise ValueError(
                "trunk='joint' has a stream of text: name a text encoder (text.encoder=words), or use trunk='stack'."
            )
        if not 0 <= build.single_depth <= build.depth:
            raise ValueError(f"single_depth={build.single_depth} of depth={build.depth}: use 0 to {build.depth}.")
        if build.causal or build.conditioning != "adaln_zero" or set(build.axes) != {"joint"}:
            raise ValueError(
                f"trunk='joint' with conditioning={build.conditioning!r}, causal={build.causal} and "
                f"axes={sorted(set(build.axes))}: its blocks have adaln_zero and attention over all tokens; use "
                "conditioning=adaln_zero, causal=false, axes=[joint]."
            )
        if build.place_bias or build.time_entry == "stream":
            raise ValueError(
                f"trunk='joint' with place_bias={build.place_bias} and time_entry={build.time_entry!r}: its blocks have "
                "neither a bias nor time in the stream; use place_bias=false and time_entry='attention' or 'rotary_3d'."
            )

    def make_blocks(self, build: Build) -> list[nn.Module]:
        return [
            (SingleBlock if i >= build.depth - build.single_depth else DualBlock)(
                build.dim, build.heads, build.mlp_ratio, build.qk_norm, time
            )
            for i, time in enumerate(build.times)
        ]

    def told(self, captions: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        assert captions is not None  # a model with captions has said so
        if captions.ndim > 3:
            raise ValueError("trunk='joint' takes one caption a clip; give captions (B, L, C), or use another trunk.")
        said = captions.new_ones(captions.shape[:2]) if mask is None else mask.to(captions)
        mean = (captions * said[..., None]).sum(1) / said.sum(1, keepdim=True).clamp(min=1)
        return self.pooled_embedder(mean.to(dtype))[:, None, None]

    def forward(self, tokens: Tensor, way: Way) -> Tensor:
        assert way.condition.tokens is not None
        text = way.condition.tokens[:, 0]
        for block in way.blocks:
            tokens, text = way.call(block, tokens, text, way.condition, way.layout)
        return tokens

"""MDT v2's trunk: an encoder with hidden patches in training, a side-interpolater for these, and a decoder."""

import torch
from torch import Tensor, nn

from stdit.model.trunks.base import Trunk, TrunkConfig, TrunkContext
from stdit.model.trunks.long_skip import forward_with_long_skips
from stdit.nn.embedders import LearnedPosEmbed
from stdit.nn.layout import DenseLayout, gather_patches, scatter_patches


class Masked(Trunk):
    """An encoder with long skips, and a decoder whose blocks all take the embedded patches as skip (MDT v2).

    Masking needs a mask token, position embeddings of the decoder and one side-interpolater block (Gao et al., "MDTv2",
    section 3). The same patches are hidden in all frames of a clip, so that every frame has the same number of tokens.
    """

    supports = frozenset({"patch_levels", "masking"})
    has_unused_parameters = True

    def __init__(self, config: TrunkConfig):
        super().__init__(config)
        self.side_interpolater, self.num_decoder_blocks = config.make_block(0), config.num_decoder_blocks
        self.decoder_pos_embed = LearnedPosEmbed(*config.grid, config.block.dim)
        self.mask_token = nn.Parameter(torch.zeros(config.block.dim))

    @classmethod
    def check(cls, config: TrunkConfig) -> None:
        """Raise ValueError if the encoder has no two equal halves, and for choices that masking does not support."""
        depth, decoder = config.depth, config.num_decoder_blocks
        if decoder < 1 or depth <= decoder or (depth - decoder) % 2:
            raise ValueError(
                f"trunk='masked' with depth={depth} and num_decoder_blocks={decoder}: the encoder has two equal "
                f"halves; use a depth of num_decoder_blocks plus an even number, such as depth={decoder + 2}."
            )
        in_context, encoding = config.conditioning.in_context, config.position_encoding
        if config.block.causal or in_context or encoding in ("rope_3d", "sincos+rope_3d"):
            raise ValueError(
                f"trunk='masked' hides patches, which conditioning={config.block.conditioning!r}, causal={config.block.causal} "
                f"and position_encoding={encoding!r} do not support; use adaln_zero, causal=false and position_encoding='sincos'."
            )

    def make_blocks(self, config: TrunkConfig) -> list[nn.Module]:
        """Make encoder and decoder blocks; all but the first half of the encoder take a skip connection."""
        half = (config.depth - config.num_decoder_blocks) // 2
        return [config.make_block(i, skip=i >= half) for i in range(config.depth)]

    def reset(self) -> None:
        """Initialise the mask token and the side-interpolater."""
        nn.init.normal_(self.mask_token, std=0.02)
        self.side_interpolater.reset()

    def forward(self, tokens: Tensor, ctx: TrunkContext) -> Tensor:
        """Run encoder, side-interpolater (if patches are hidden) and decoder."""
        assert isinstance(ctx.layout, DenseLayout)
        blocks, first_tokens, (_, rows, columns) = ctx.blocks, tokens, ctx.layout.grid
        encoder, decoder = (
            blocks[: len(blocks) - self.num_decoder_blocks],
            blocks[len(blocks) - self.num_decoder_blocks :],
        )
        pos_embed = self.decoder_pos_embed(rows, columns).to(tokens)
        if ctx.visible is None:
            tokens = forward_with_long_skips(encoder, tokens, ctx) + pos_embed
        else:
            patches = gather_patches(tokens, ctx.visible)
            visible = forward_with_long_skips(encoder, patches, ctx.of_patches(ctx.visible))
            tokens = self._interpolate(visible, ctx, pos_embed)
        for block in decoder:
            tokens = ctx(block, tokens, skip=first_tokens)
        return tokens

    def _interpolate(self, tokens: Tensor, ctx: TrunkContext, pos_embed: Tensor) -> Tensor:
        """Fill in the hidden patches with the side-interpolater; the visible patches stay unchanged."""
        batch, frames, _, dim = tokens.shape
        assert ctx.visible is not None
        hidden = self.mask_token.to(tokens).expand(batch, frames, len(pos_embed), dim)
        full = scatter_patches(hidden, ctx.visible, tokens) + pos_embed
        is_visible = torch.zeros(batch, len(pos_embed), dtype=torch.bool, device=tokens.device).scatter(
            1, ctx.visible, True
        )
        return torch.where(is_visible[:, None, :, None], full, ctx(self.side_interpolater, full))

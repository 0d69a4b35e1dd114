"""DiffiT's U-shaped trunk: a convolution before every block, and the middle blocks at half resolution."""

import torch
from torch import Tensor, nn

from stdit.model.trunks.base import Trunk, TrunkConfig, TrunkContext
from stdit.nn.layout import DenseLayout


class UShape(Trunk):
    """A convolution before every block, down- and upsampling, and skip connections from encoder to decoder.

    Hatamizadeh et al., "DiffiT: Diffusion Vision Transformers for Image Generation", the image-space model. Convolutions
    run on single frames; frames exchange information through the blocks' attention.
    """

    supports = frozenset()

    def __init__(self, config: TrunkConfig):
        super().__init__(config)
        depth, dim = config.depth, config.block.dim
        self.outer = depth // 3  # blocks of the encoder, and of the decoder
        groups = next(n for n in (32, 16, 8, 4, 2, 1) if dim % n == 0)
        self.convs = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(groups, dim), nn.SiLU(), nn.Conv2d(dim, dim, 3, padding=1)) for _ in range(depth)
        )
        self.down = nn.Conv2d(dim, dim, 3, stride=2, padding=1)
        self.up = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(dim, dim, 3, padding=1))
        self.joins = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(self.outer))

    @classmethod
    def check(cls, config: TrunkConfig) -> None:
        """Raise ValueError for fewer than 3 blocks and for in-context conditioning."""
        if config.depth < 3 or config.conditioning.in_context:
            raise ValueError(
                f"trunk='u_shape' with depth={config.depth} and conditioning={config.block.conditioning!r}: it takes 3 blocks "
                "or more, and only patches; use depth=3 and conditioning='time_attention' (DiffiT) or 'adaln_zero'."
            )

    def forward(self, tokens: Tensor, ctx: TrunkContext) -> Tensor:
        """Run tokens (B, T, rows * columns, D) through the U; ValueError for a grid that cannot be halved."""
        blocks, layout = ctx.blocks, ctx.layout
        assert isinstance(layout, DenseLayout)
        frames, rows, columns = layout.grid
        if rows % 2 or columns % 2:
            raise ValueError(
                f"trunk='u_shape' halves the grid of {rows} x {columns} patches; use sizes with an even number of patches, "
                f"such as {rows + rows % 2} x {columns + columns % 2}."
            )
        if ctx.condition.embedding.shape[2] > 1:
            raise ValueError(
                "trunk='u_shape' takes levels per frame, not per patch (in training objective.mask_probs.region=0)."
            )
        time, y, x = layout.scale
        half = DenseLayout(
            (frames, rows // 2, columns // 2), frame_offset=layout.frame_offset, scale=(time, 2 * y, 2 * x)
        )
        last, skips = len(blocks) - self.outer, list[Tensor]()
        for i, block in enumerate(blocks):
            if i == self.outer:
                tokens = _per_frame(self.down, tokens, rows)
            if i == last:
                tokens = _per_frame(self.up, tokens, rows // 2)
            inside = self.outer <= i < last
            if i >= last:
                tokens = self.joins[i - last](torch.cat([tokens, skips.pop()], dim=-1))
            features = _per_frame(self.convs[i], tokens, rows // 2 if inside else rows)
            tokens = tokens + ctx(block, features, layout=half if inside else layout)
            if i < self.outer:
                skips.append(tokens)
        return tokens


def _per_frame(convolution: nn.Module, tokens: Tensor, rows: int) -> Tensor:
    """Apply a convolution to each frame of tokens (B, T, rows * columns, D)."""
    batch, frames, count, dim = tokens.shape
    images = tokens.reshape(batch * frames, rows, count // rows, dim).permute(0, 3, 1, 2)
    return convolution(images).flatten(2).transpose(1, 2).unflatten(0, (batch, frames))

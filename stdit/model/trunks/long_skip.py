"""U-ViT's trunk: long skip connections from the first half of the blocks to the second."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from stdit.model.trunks.base import Trunk, TrunkConfig, TrunkContext


class LongSkip(Trunk):
    """Long skip connections that pair the first block with the last, and so on inwards; a middle block has none.

    Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models", figure 1.
    """

    supports = frozenset({"packing", "patch_levels", "block_caching"})

    def make_blocks(self, config: TrunkConfig) -> list[nn.Module]:
        """Make the blocks, of which the second half merge a skip connection."""
        depth = config.depth
        return [config.make_block(i, skip=i >= depth - depth // 2) for i in range(depth)]

    def forward(self, tokens: Tensor, ctx: TrunkContext) -> Tensor:
        """Run the tokens through the blocks, with their skip connections."""
        return forward_with_long_skips(ctx.blocks, tokens, ctx)


def forward_with_long_skips(blocks: Sequence[nn.Module], tokens: Tensor, run: Callable[..., Tensor]) -> Tensor:
    """Run tokens through blocks, of which the second half take `skip`; run: (block, tokens, skip=) -> tokens."""
    half, skips = len(blocks) // 2, []
    for block in blocks[:half]:
        tokens = run(block, tokens)
        skips.append(tokens)
    for block in blocks[half : len(blocks) - half]:
        tokens = run(block, tokens)
    for block in blocks[len(blocks) - half :]:
        tokens = run(block, tokens, skip=skips.pop())
    return tokens

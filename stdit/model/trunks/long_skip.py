"""U-ViT's trunk: blocks of the first half are connected to those of the second."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from stdit.model.trunks.base import Trunk, TrunkConfig, TrunkContext


class LongSkip(Trunk):
    """Long skip connections from the first half of the blocks to the second, last to first; a middle block has none.

    Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models", figure 1.
    """

    supports = frozenset({"packing", "patch_levels", "block_caching"})

    def make_blocks(self, config: TrunkConfig) -> list[nn.Module]:
        depth = config.depth
        return [config.make_block(i, skip=i >= depth - depth // 2) for i in range(depth)]

    def forward(self, tokens: Tensor, ctx: TrunkContext) -> Tensor:
        return forward_with_long_skips(ctx.blocks, tokens, ctx)


def forward_with_long_skips(blocks: Sequence[nn.Module], tokens: Tensor, run: Callable[..., Tensor]) -> Tensor:
    """Tokens through blocks of which the last half take `skip`; run: (block, tokens, skip=) -> tokens."""
    half, skips = len(blocks) // 2, []
    for block in blocks[:half]:
        tokens = run(block, tokens)
        skips.append(tokens)
    for block in blocks[half : len(blocks) - half]:
        tokens = run(block, tokens)
    for block in blocks[len(blocks) - half :]:
        tokens = run(block, tokens, skip=skips.pop())
    return tokens

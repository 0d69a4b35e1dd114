"""DiT's trunk: one block after another."""

from torch import Tensor

from stdit.model.trunks.base import Trunk, TrunkContext


class Stack(Trunk):
    """A plain sequence of blocks (DiT, figure 3)."""

    supports = frozenset({"packing", "patch_levels", "block_caching"})

    def forward(self, tokens: Tensor, ctx: TrunkContext) -> Tensor:
        """Run the tokens through the blocks in order."""
        for block in ctx.blocks:
            tokens = ctx(block, tokens)
        return tokens

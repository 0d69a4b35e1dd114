"""DiT's trunk."""

from torch import Tensor

from stdit.model.trunks.base import Trunk, TrunkContext


class Stack(Trunk):
    """One block after another (DiT, figure 3)."""

    supports = frozenset({"packing", "patch_levels", "block_caching"})

    def forward(self, tokens: Tensor, ctx: TrunkContext) -> Tensor:
        for block in ctx.blocks:
            tokens = ctx(block, tokens)
        return tokens

"""DiT's trunk: one block after another."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stdit.model.trunks.base import Trunk, TrunkContext
from stdit.nn.layout import gather_patches, scatter_patches


class Stack(Trunk):
    """A plain sequence of blocks (DiT, figure 3).

    With `visible`, in training, the other patches skip the middle blocks (Krause et al., "TREAD", section 3). Where blocks
    attend along time, these are the same in all frames of a clip.
    """

    supports = frozenset({"packing", "patch_levels", "block_caching", "routing"})

    def forward(self, tokens: Tensor, ctx: TrunkContext) -> Tensor:
        """Run the tokens through the blocks in order."""
        if ctx.visible is None:
            return _run(ctx, ctx.blocks, tokens)
        middle, visible = routed_blocks(len(ctx.blocks)), ctx.visible
        if visible.ndim == 3 and any(block.attn.axis == "temporal" for block in ctx.blocks):
            visible = visible[:, 0]
        tokens = _run(ctx, ctx.blocks[: middle.start], tokens)
        patches = _run(ctx.of_patches(visible), ctx.blocks[middle], gather_patches(tokens, visible))
        return _run(ctx, ctx.blocks[middle.stop :], scatter_patches(tokens, visible, patches))


def routed_blocks(depth: int) -> slice:
    """The blocks that patches can skip: of 28 the third to the 24th, as in TREAD, and the same share of other depths."""
    return slice(max(1, depth // 12), depth - max(1, depth // 7))


def _run(ctx: TrunkContext, blocks: Sequence[Any], tokens: Tensor) -> Tensor:
    for block in blocks:
        tokens = ctx(block, tokens)
    return tokens

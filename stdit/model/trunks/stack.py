"""DiT's trunk."""

from torch import Tensor

from stdit.model.trunks.base import Trunk, Way


class Stack(Trunk):
    """One block after another (DiT, figure 3)."""

    packs = True

    def forward(self, tokens: Tensor, way: Way) -> Tensor:
        for block in way.blocks:
            tokens = way(block, tokens)
        return tokens

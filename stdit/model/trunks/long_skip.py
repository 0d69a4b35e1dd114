"""U-ViT's wiring: the first half hands what it made to the second."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from stdit.model.trunks.base import Build, Trunk, Way


class LongSkip(Trunk):
    """What the first half made goes over the heads of others to the second half, last to first; a middle block has none
    (Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models", figure 1)."""

    packs = True

    def make_blocks(self, build: Build) -> list[nn.Module]:
        return [build.block(i, skip=i >= build.depth - build.depth // 2) for i in range(build.depth)]

    def forward(self, tokens: Tensor, way: Way) -> Tensor:
        return skipping(way.blocks, tokens, way)


def skipping(blocks: Sequence[nn.Module], tokens: Tensor, way: Callable[..., Tensor]) -> Tensor:
    """Tokens through blocks of which the last half take `skip`."""
    half, kept = len(blocks) // 2, []
    for block in blocks[:half]:
        tokens = way(block, tokens)
        kept.append(tokens)
    for block in blocks[half : len(blocks) - half]:
        tokens = way(block, tokens)
    for block in blocks[len(blocks) - half :]:
        tokens = way(block, tokens, skip=kept.pop())
    return tokens

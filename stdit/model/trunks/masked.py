"""MDT v2: an encoder that sees some patches while it learns, a side block that guesses the others, a decoder that sees all."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from stdit.model.trunks.base import Build, Trunk, Way
from stdit.model.trunks.long_skip import skipping
from stdit.nn.conditioning import CONDITIONINGS
from stdit.nn.embedders import LearnedPosEmbed
from stdit.nn.layout import DenseLayout


class Masked(Trunk):
    """Long skips in the encoder, the first tokens handed to every block of the decoder, and what masking needs (Gao et al.,
    "MDTv2", section 3): a token for what is hidden, the decoder's places, one side block.

    The same patches are hidden in all frames of a clip, so that tokens keep their layout and an image is one frame.
    """

    hides, idle = True, True

    def __init__(self, build: Build):
        super().__init__(build)
        self.side_interpolater, self.num_decoder_blocks = build.block(0), build.num_decoder_blocks
        self.decoder_pos_embed = LearnedPosEmbed(*build.grid, build.dim)
        self.mask_token = nn.Parameter(torch.zeros(build.dim))

    @classmethod
    def check(cls, build: Build) -> None:
        super().check(build)
        depth, num_decoder_blocks = build.depth, build.num_decoder_blocks
        if num_decoder_blocks < 1 or depth <= num_decoder_blocks or (depth - num_decoder_blocks) % 2:
            raise ValueError(
                f"trunk='masked' with depth={depth} and num_decoder_blocks={num_decoder_blocks}: the encoder is two halves, so use a "
                f"depth of num_decoder_blocks and an even number more, such as depth={num_decoder_blocks + 2}."
            )
        if build.causal or CONDITIONINGS[build.conditioning].joins or build.position_encoding.endswith("3d"):
            raise ValueError(
                f"trunk='masked' hides patches, which conditioning={build.conditioning!r}, causal={build.causal} and "
                f"position_encoding={build.position_encoding!r} do not take; use adaln_zero, causal=false and position_encoding='sincos'."
            )

    def make_blocks(self, build: Build) -> list[nn.Module]:
        half = (build.depth - build.num_decoder_blocks) // 2
        return [build.block(i, skip=i >= half) for i in range(build.depth)]

    def reset(self) -> None:
        nn.init.normal_(self.mask_token, std=0.02)
        self.side_interpolater.reset()  # type: ignore[operator]

    def forward(self, tokens: Tensor, way: Way) -> Tensor:
        assert isinstance(way.layout, DenseLayout)
        blocks, begin, (_, rows, columns) = way.blocks, tokens, way.layout.grid
        encoder, decoder = (
            blocks[: len(blocks) - self.num_decoder_blocks],
            blocks[len(blocks) - self.num_decoder_blocks :],
        )
        places = self.decoder_pos_embed(rows, columns).to(tokens)
        if way.kept is None:
            tokens = skipping(encoder, tokens, way) + places
        else:
            seen = _gather(tokens, way.kept)
            seen = skipping(encoder, seen, replace(way, layout=way.layout.keeping(way.kept)))
            tokens = self._guess(seen, way, way.kept, places)
        for block in decoder:
            tokens = way(block, tokens, skip=begin)
        return tokens

    def _guess(self, seen: Tensor, way: Way, kept: Tensor, places: Tensor) -> Tensor:
        """All patches again: the hidden ones as the side block guesses them, the others as they were."""
        batch, frames, _, dim = seen.shape
        where = kept[:, None, :, None].expand(-1, frames, -1, dim)
        full = self.mask_token.to(seen).expand(batch, frames, len(places), dim).scatter(2, where, seen) + places
        shown = torch.zeros(batch, len(places), dtype=torch.bool, device=seen.device).scatter(1, kept, True)
        return torch.where(shown[:, None, :, None], full, way(self.side_interpolater, full))


def _gather(tokens: Tensor, kept: Tensor) -> Tensor:
    """(B, T, S, D), (B, n) -> (B, T, n, D)."""
    where = kept[:, None, :, None].expand(-1, tokens.shape[1], -1, tokens.shape[-1])
    return tokens.gather(2, where)

"""MDT v2: an encoder that sees some patches while it learns, a side block that guesses the others, a decoder that sees all."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stdit.model.trunks import Run, long_skip
from stdit.nn.embedders import PlaceTable
from stdit.nn.layout import Dense
from stdit.nn.modulation import Condition


class MaskedTrunk(nn.Module):
    """What masking needs beside the blocks (Gao et al., "MDTv2", section 3): a token for what is hidden, the decoder's
    places, one side block.

    The same patches are hidden in all frames of a clip, so that tokens keep their layout and an image is one frame.
    """

    def __init__(self, side: nn.Module, grid: tuple[int, int], dim: int, decode_depth: int):
        super().__init__()
        self.side, self.decode_depth = side, decode_depth
        self.places = PlaceTable(*grid, dim)
        self.token = nn.Parameter(torch.zeros(dim))

    def reset(self) -> None:
        nn.init.normal_(self.token, std=0.02)
        self.side.reset()

    def forward(
        self,
        blocks: nn.ModuleList,
        tokens: Tensor,
        condition: Condition,
        run: Callable[..., Tensor],
        layout: Dense,
        kept: Tensor | None,
    ) -> Tensor:
        """tokens (B, T, S, D) through encoder and decoder; kept: (B, n) patches that the encoder sees, None for all."""
        begin, (_, rows, columns) = tokens, layout.grid
        encoder, decoder = blocks[: len(blocks) - self.decode_depth], blocks[len(blocks) - self.decode_depth :]
        places = self.places(rows, columns).to(tokens)
        if kept is None:
            tokens = long_skip(encoder, tokens, condition, _with(run, layout)) + places
        else:
            tokens = _gather(tokens, kept)
            tokens = long_skip(encoder, tokens, condition, _with(run, layout.keeping(kept)))
            tokens = self._guess(tokens, condition, run, layout, kept, places)
        for block in decoder:
            tokens = run(block, tokens, condition, layout=layout, skip=begin)
        return tokens

    def _guess(
        self, seen: Tensor, condition: Condition, run: Callable, layout: Dense, kept: Tensor, places: Tensor
    ) -> Tensor:
        """All patches again: the hidden ones as the side block guesses them, the others as they were."""
        batch, frames, _, dim = seen.shape
        where = kept[:, None, :, None].expand(-1, frames, -1, dim)
        full = self.token.to(seen).expand(batch, frames, len(places), dim).scatter(2, where, seen) + places
        shown = torch.zeros(batch, len(places), dtype=torch.bool, device=seen.device).scatter(1, kept, True)
        guessed = run(self.side, full, condition, layout=layout)
        return torch.where(shown[:, None, :, None], full, guessed)


def _with(run: Callable[..., Any], layout: Dense) -> Run:
    def go(block: nn.Module, tokens: Tensor, condition: Condition, skip: Tensor | None = None) -> Tensor:
        return run(block, tokens, condition, layout=layout, skip=skip)

    return go


def _gather(tokens: Tensor, kept: Tensor) -> Tensor:
    """(B, T, S, D), (B, n) -> (B, T, n, D)."""
    where = kept[:, None, :, None].expand(-1, tokens.shape[1], -1, tokens.shape[-1])
    return tokens.gather(2, where)

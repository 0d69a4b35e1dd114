"""Adaptive layer norm: a condition becomes shifts, scales and gates."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from stdit.nn.layout import Layout


class Condition(NamedTuple):
    """What blocks are conditioned on, once per clip, frame or patch.

    embedding: (B, T|1, S|1, D), the sum of all conditions that are vectors (diffusers' `temb`). adaln: (B, T|1, S|1, 6 D),
    the modulation that all blocks share, where there is one. tokens: (B, T|1, N, D) to attend to; token_mask: (B, T|1, N)
    bool, false for padding.
    """

    embedding: Tensor
    adaln: Tensor | None = None
    tokens: Tensor | None = None
    token_mask: Tensor | None = None


class Modulation(NamedTuple):
    """Shift, scale and gate, (B, T|1, S|1, D) each: computed once per frame, broadcast over patches; None changes nothing."""

    shift: Tensor | None = None
    scale: Tensor | None = None
    gate: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return x if self.scale is None else x * (1 + self.scale) + self.shift

    def gated(self, x: Tensor) -> Tensor:
        return x if self.gate is None else self.gate * x


class AdaLN(nn.Sequential):
    """The conditioning vector through a linear layer to shift, scale and (if `gated`) gate of `branches` branches.

    Gated and zero-initialised it is adaLN-Zero; without gates, adaLN (DiT, section 3.2).
    """

    def __init__(self, dim: int, branches: int = 2, gated: bool = True):
        self.parts = 3 if gated else 2
        super().__init__(nn.SiLU(), nn.Linear(dim, self.parts * branches * dim))
        self.branches = branches

    def forward(self, condition: Condition, layout: Layout | None = None) -> list[Modulation]:
        modulation = super().forward(condition.embedding)
        if layout is not None:
            modulation = layout.expand_to_tokens(modulation)
        chunks = modulation.chunk(self.parts * self.branches, dim=-1)
        return [Modulation(*chunks[self.parts * i : self.parts * (i + 1)]) for i in range(self.branches)]

    def reset(self) -> None:
        """Zero-initialise, as in DiT."""
        nn.init.zeros_(self[1].weight)
        nn.init.zeros_(self[1].bias)


class AdaLNSingle(nn.Module):
    """A table per block, added to the modulation that all blocks share (PixArt-alpha, section 2.3); the head adds its table to the vector."""

    def __init__(self, dim: int, branches: int = 2, gated: bool = True):
        super().__init__()
        self.parts, self.gated = 3 if gated else 2, gated
        self.table = nn.Parameter(torch.zeros(self.parts * branches, dim))

    def forward(self, condition: Condition, layout: Layout | None = None) -> list[Modulation]:
        base = condition.adaln if self.gated else condition.embedding.repeat(1, 1, 1, self.parts)
        assert base is not None
        modulation = base + self.table.flatten().to(base)
        if layout is not None:
            modulation = layout.expand_to_tokens(modulation)
        chunks = modulation.chunk(len(self.table), dim=-1)
        return [Modulation(*chunks[i : i + self.parts]) for i in range(0, len(chunks), self.parts)]

    def reset(self) -> None:
        """Zero-initialise, as in DiT."""
        nn.init.zeros_(self.table)


class AdaLNLora(nn.Module):
    """A low-rank layer per block, added to the modulation that all blocks share (Gupta et al., "W.A.L.T", AdaLN-LoRA).

    The rank is a sixteenth of the width, as in Cosmos. Zero when fresh.
    """

    def __init__(self, dim: int, branches: int = 2):
        super().__init__()
        rank = max(1, dim // 16)
        self.branches = branches
        self.lora = nn.Sequential(
            nn.SiLU(), nn.Linear(dim, rank, bias=False), nn.Linear(rank, 3 * branches * dim, bias=False)
        )

    def forward(self, condition: Condition, layout: Layout | None = None) -> list[Modulation]:
        assert condition.adaln is not None
        modulation = condition.adaln + self.lora(condition.embedding)
        if layout is not None:
            modulation = layout.expand_to_tokens(modulation)
        chunks = modulation.chunk(3 * self.branches, dim=-1)
        return [Modulation(*chunks[3 * i : 3 * i + 3]) for i in range(self.branches)]

    def reset(self) -> None:
        """Zero-initialise, as in DiT."""
        nn.init.zeros_(self.lora[2].weight)  # type: ignore[arg-type]


class NoModulation(nn.Module):
    """No modulation, for blocks that are conditioned by tokens or by their attention alone."""

    def __init__(self, dim: int, branches: int = 2):
        super().__init__()
        self.branches = branches

    def forward(self, condition: Condition, layout: Layout | None = None) -> list[Modulation]:
        return [Modulation()] * self.branches

    def reset(self) -> None:
        """Nothing to initialise."""

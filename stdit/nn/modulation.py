"""Adaptive layer norm (adaLN): shifts, scales and gates computed from a condition."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from stdit.nn.layout import Layout, gather_patches


class Condition(NamedTuple):
    """The embedded condition of the blocks, per clip, frame or patch.

    embedding: (B, T|1, S|1, D), the sum of all conditions that are vectors (diffusers' `temb`). adaln: (B, T|1, S|1, 6 D),
    the modulation shared by all blocks, if there is one. tokens: (B, T|1, N, D), to which blocks attend; token_mask:
    (B, T|1, N) bool, false for padding.
    """

    embedding: Tensor
    adaln: Tensor | None = None
    tokens: Tensor | None = None
    token_mask: Tensor | None = None

    def of_patches(self, visible: Tensor) -> "Condition":
        """The condition of the visible patches of every frame, where it differs between patches."""
        embedding, adaln = (
            x if x is None or x.shape[2] == 1 else gather_patches(x, visible) for x in (self.embedding, self.adaln)
        )
        assert embedding is not None
        return self._replace(embedding=embedding, adaln=adaln)


class Modulation(NamedTuple):
    """Shift, scale and gate of one branch of a block, (B, T|1, S|1, D) each; None has no effect.

    Calling it returns x * (1 + scale) + shift.
    """

    shift: Tensor | None = None
    scale: Tensor | None = None
    gate: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return x if self.scale is None or self.shift is None else x * (1 + self.scale) + self.shift

    def gated(self, x: Tensor) -> Tensor:
        """Multiply the output of a branch by the gate, if there is one."""
        return x if self.gate is None else self.gate * x


class AdaLN(nn.Sequential):
    """A linear layer from the conditioning vector to the shift, scale and (if `gated`) gate of `branches` branches.

    With gates it is adaLN-Zero, without gates adaLN (DiT, section 3.2).
    """

    def __init__(self, dim: int, branches: int = 2, gated: bool = True):
        self.parts = 3 if gated else 2
        super().__init__(nn.SiLU(), nn.Linear(dim, self.parts * branches * dim))
        self.branches = branches

    def forward(self, condition: Condition, layout: Layout | None = None) -> list[Modulation]:
        """The modulation of each branch, from the conditioning vector; `layout` expands it to all tokens."""
        modulation = super().forward(condition.embedding)
        if layout is not None:
            modulation = layout.expand_to_tokens(modulation)
        chunks = modulation.chunk(self.parts * self.branches, dim=-1)
        return [Modulation(*chunks[self.parts * i : self.parts * (i + 1)]) for i in range(self.branches)]

    def reset(self) -> None:
        """Zero-initialise the linear layer, as in DiT."""
        for parameter in self[1].parameters():
            nn.init.zeros_(parameter)


class AdaLNSingle(nn.Module):
    """A table per block, added to the modulation that all blocks share (PixArt-alpha, section 2.3).

    The final layer (without gate) adds its table to the conditioning vector.
    """

    def __init__(self, dim: int, branches: int = 2, gated: bool = True):
        super().__init__()
        self.parts, self.gated = 3 if gated else 2, gated
        self.table = nn.Parameter(torch.zeros(self.parts * branches, dim))

    def forward(self, condition: Condition, layout: Layout | None = None) -> list[Modulation]:
        """The modulation of each branch: the shared modulation (or the vector) plus the table."""
        base = condition.adaln if self.gated else condition.embedding.repeat(1, 1, 1, self.parts)
        assert base is not None
        modulation = base + self.table.flatten().to(base)
        if layout is not None:
            modulation = layout.expand_to_tokens(modulation)
        chunks = modulation.chunk(len(self.table), dim=-1)
        return [Modulation(*chunks[i : i + self.parts]) for i in range(0, len(chunks), self.parts)]

    def reset(self) -> None:
        """Zero-initialise the table."""
        nn.init.zeros_(self.table)


class AdaLNLora(nn.Module):
    """A low-rank layer per block, added to the modulation that all blocks share (Gupta et al., "W.A.L.T", AdaLN-LoRA).

    The rank is a sixteenth of the hidden size, as in Cosmos. The low-rank layer is zero at initialisation.
    """

    def __init__(self, dim: int, branches: int = 2):
        super().__init__()
        rank = max(1, dim // 16)
        self.branches = branches
        self.lora = nn.Sequential(
            nn.SiLU(), nn.Linear(dim, rank, bias=False), nn.Linear(rank, 3 * branches * dim, bias=False)
        )

    def forward(self, condition: Condition, layout: Layout | None = None) -> list[Modulation]:
        """The modulation of each branch: the shared modulation plus the low-rank layer's output."""
        assert condition.adaln is not None
        modulation = condition.adaln + self.lora(condition.embedding)
        if layout is not None:
            modulation = layout.expand_to_tokens(modulation)
        chunks = modulation.chunk(3 * self.branches, dim=-1)
        return [Modulation(*chunks[3 * i : 3 * i + 3]) for i in range(self.branches)]

    def reset(self) -> None:
        """Zero-initialise the last linear layer."""
        for parameter in self.lora[2].parameters():
            nn.init.zeros_(parameter)


class NoModulation(nn.Module):
    """No modulation, for blocks that are conditioned only by tokens or by a bias in attention."""

    def __init__(self, dim: int, branches: int = 2):
        super().__init__()
        self.branches = branches

    def forward(self, condition: Condition, layout: Layout | None = None) -> list[Modulation]:
        """An empty modulation for each branch."""
        return [Modulation()] * self.branches

    def reset(self) -> None:
        """Do nothing: there are no parameters."""

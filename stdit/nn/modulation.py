"""Adaptive layer norm: a condition becomes shifts, scales and gates."""

from typing import NamedTuple

from torch import Tensor, nn

from stdit.nn.layout import Layout


class Modulation(NamedTuple):
    """(B, T|1, S|1, D) each: computed once per frame, broadcast over patches."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x * (1 + self.scale) + self.shift


class AdaLNZero(nn.Sequential):
    """Condition (B, T|1, S|1, D) -> modulations of `branches` residual branches, all zero at the start."""

    def __init__(self, dim: int, branches: int = 2):
        super().__init__(nn.SiLU(), nn.Linear(dim, 3 * branches * dim))
        self.branches = branches

    def forward(self, condition: Tensor, layout: Layout | None = None) -> list[Modulation]:
        modulation = super().forward(condition)
        if layout is not None:
            modulation = layout.spread(modulation)
        chunks = modulation.chunk(3 * self.branches, dim=-1)
        return [Modulation(*chunks[3 * i : 3 * i + 3]) for i in range(self.branches)]

"""DiffiT's U: blocks behind convolutions, the middle third on a grid of half the rows and columns."""

import torch
from torch import Tensor, nn

from stdit.model.trunks.base import Build, Trunk, Way
from stdit.nn.conditioning import CONDITIONINGS
from stdit.nn.layout import DenseLayout


class UShape(Trunk):
    """Before each block a convolution over its frame, a way down, a way up, and the encoder handed to the decoder
    (Hatamizadeh et al., "DiffiT: Diffusion Vision Transformers for Image Generation", the image-space model).

    Convolutions see one frame; what frames tell each other they tell by the blocks' attention.
    """

    supports_patch_levels = False

    def __init__(self, build: Build):
        super().__init__(build)
        depth, dim = build.depth, build.dim
        self.outer = depth // 3  # blocks of each arm
        groups = next(n for n in (32, 16, 8, 4, 2, 1) if dim % n == 0)
        self.convs = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(groups, dim), nn.SiLU(), nn.Conv2d(dim, dim, 3, padding=1)) for _ in range(depth)
        )
        self.down = nn.Conv2d(dim, dim, 3, stride=2, padding=1)
        self.up = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(dim, dim, 3, padding=1))
        self.joins = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(self.outer))

    @classmethod
    def check(cls, build: Build) -> None:
        super().check(build)
        if build.depth < 3 or CONDITIONINGS[build.conditioning].joins:
            raise ValueError(
                f"trunk='u_shape' with depth={build.depth} and conditioning={build.conditioning!r}: it takes 3 blocks or "
                "more, and patches alone; use depth=3 and conditioning='time_attention' (DiffiT) or 'adaln_zero'."
            )

    def forward(self, tokens: Tensor, way: Way) -> Tensor:
        """Tokens (B, T, rows * columns, D) down and up again; ValueError for a grid that cannot be halved."""
        blocks, layout = way.blocks, way.layout
        assert isinstance(layout, DenseLayout)
        frames, rows, columns = layout.grid
        if rows % 2 or columns % 2:
            raise ValueError(
                f"trunk='u_shape' halves the grid of {rows} x {columns} patches; use sizes with an even number of patches, "
                f"such as {rows + rows % 2} x {columns + columns % 2}."
            )
        if way.condition.embedding.shape[2] > 1:
            raise ValueError(
                "trunk='u_shape' takes levels by frame, not by patch (in training objective.mask_probs.region=0)."
            )
        half = DenseLayout((frames, rows // 2, columns // 2), layout.begin, tuple(2 * s if i else s for i, s in enumerate(layout.scale)))  # type: ignore[arg-type]  # fmt: skip
        last = len(blocks) - self.outer
        kept: list[Tensor] = []
        for i, block in enumerate(blocks):
            if i == self.outer:
                tokens = _per_frame(self.down, tokens, rows)
            if i == last:
                tokens = _per_frame(self.up, tokens, rows // 2)
            inside = self.outer <= i < last
            if i >= last:
                tokens = self.joins[i - last](torch.cat([tokens, kept.pop()], dim=-1))
            seen = _per_frame(self.convs[i], tokens, rows // 2 if inside else rows)
            tokens = tokens + way(block, seen, layout=half if inside else layout)
            if i < self.outer:
                kept.append(tokens)
        return tokens


def _per_frame(convolution: nn.Module, tokens: Tensor, rows: int) -> Tensor:
    """(B, T, rows * columns, D) through a convolution over each frame."""
    batch, frames, count, dim = tokens.shape
    images = tokens.reshape(batch * frames, rows, count // rows, dim).permute(0, 3, 1, 2)
    return convolution(images).flatten(2).transpose(1, 2).unflatten(0, (batch, frames))

"""Patches, noise levels and labels to vectors. Names and layouts are DiT's."""

import math

import torch
from torch import Tensor, nn

from stdit.nn.positions import spatial_pos_embed
from stdit.nn.tokens import Patch, patchify


class PatchEmbed(nn.Module):
    """(B, C, T*pt, H*ph, W*pw) latents -> (B, T, H*W, D). A convolution of stride = kernel, written as a product."""

    def __init__(self, patch_size: Patch, in_channels: int, dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(in_channels * math.prod(patch_size), dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(patchify(x, self.patch_size))


class TimestepEmbedder(nn.Module):
    """Timesteps of any shape (...), on 0..1000 -> (..., D): sinusoid of 256 numbers, then an MLP.

    Weights made elsewhere may expect another clock: `scale` and `reverse` turn ours into theirs (SiT: 0.001, reversed),
    `offset` counts from there (U-ViT's first step is 1), `frequency_shift` spreads the frequencies as diffusers' DiT does (1.0). mlp: false leaves the sinusoid, D numbers, as
    it is (U-ViT).
    """

    def __init__(
        self,
        dim: int,
        frequency_dim: int = 256,
        scale: float = 1.0,
        reverse: bool = False,
        frequency_shift: float = 0.0,
        mlp: bool = True,
        offset: float = 0.0,
    ):
        super().__init__()
        self.offset = offset
        frequency_dim = frequency_dim if mlp else dim
        self.frequency_dim, self.scale, self.reverse, self.shift = frequency_dim, scale, reverse, frequency_shift
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, dim), nn.SiLU(), nn.Linear(dim, dim)) if mlp else None

    def forward(self, timestep: Tensor) -> Tensor:
        # Always float32: bfloat16 would fold a thousand timesteps into 507.
        half = self.frequency_dim // 2
        exponents = torch.arange(half, dtype=torch.float32, device=timestep.device)
        frequencies = torch.exp(-math.log(10000) * exponents / (half - self.shift))
        clock = self.scale * (1000 - timestep.float() if self.reverse else timestep.float() + self.offset)
        angles = clock[..., None] * frequencies
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return sinusoid if self.mlp is None else self.mlp(sinusoid.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Labels (...) in 0..num_classes -> (..., D); label `num_classes` is null, for guidance without a classifier."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def reset(self) -> None:
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class MicroConditionEmbedder(nn.Module):
    """Numbers about a clip (..., N), such as its frame rate -> (..., D); nan where nothing is said. Zero when fresh.

    Each number is seen on a logarithmic scale, as a timestep would be (SDXL's size conditioning).
    """

    def __init__(self, count: int, dim: int):
        super().__init__()
        self.each = nn.ModuleList(TimestepEmbedder(dim) for _ in range(count))
        self.out = nn.Linear(dim, dim)

    def reset(self) -> None:
        nn.init.zeros_(self.out.weight)

    def forward(self, info: Tensor) -> Tensor:
        said = ~info.isnan()
        clock = 100 * torch.log2(info.nan_to_num(1.0).clamp(min=2.0**-5)) + 500  # 1/32 to 32768 on 0..2000
        parts = [each(clock[..., i]) * said[..., i, None] for i, each in enumerate(self.each)]
        return self.out(torch.stack(parts).sum(0))


class CaptionEmbedder(nn.Module):
    """A text encoder's tokens (..., L, C) -> (..., L, D): an MLP, as PixArt's and Latte's `caption_projection`."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, dim)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, captions: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(captions)))


class LearnedPosEmbed(nn.Module):
    """A learned vector for every place of a grid, and for `extras` tokens before it; other grids see it bent to theirs.

    Fresh, the grid holds DiT's sin-cos positions and the extras nothing.
    """

    def __init__(self, rows: int, columns: int, dim: int, extras: int = 0):
        super().__init__()
        self.grid = (rows, columns)
        self.patches = nn.Parameter(torch.empty(rows * columns, dim))
        self.prefix = nn.Parameter(torch.zeros(extras, dim)) if extras else None
        self.reset()

    def reset(self) -> None:
        with torch.no_grad():
            self.patches.copy_(spatial_pos_embed(*self.grid, self.patches.shape[1]))

    def forward(self, rows: int, columns: int) -> Tensor:
        """(rows * columns, D)"""
        if (rows, columns) == self.grid:
            return self.patches
        table = self.patches.T.unflatten(1, self.grid)[None]
        bent = nn.functional.interpolate(table, size=(rows, columns), mode="bicubic", align_corners=False)
        return bent[0].flatten(1).T

"""Embedders of patches, timesteps, labels, numbers and captions. Names and layouts are DiT's."""

import math

import torch
from torch import Tensor, nn

from stdit.nn.positions import spatial_pos_embed
from stdit.nn.tokens import Patch, patchify


class PatchEmbed(nn.Module):
    """(B, C, T*pt, H*ph, W*pw) latents -> (B, T, H*W, D). A convolution whose stride is its kernel, as a matrix product."""

    def __init__(self, patch_size: Patch, in_channels: int, dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(in_channels * math.prod(patch_size), dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(patchify(x, self.patch_size))


class TimestepEmbedder(nn.Module):
    """Timesteps of any shape (...), on 0..1000 -> (..., D): a sinusoid of 256 numbers, then an MLP.

    Weights from elsewhere may expect another convention: `scale` and `reverse` convert ours to theirs (SiT: 0.001,
    reversed), `offset` is added (U-ViT's first step is 1), `frequency_shift` spreads the frequencies as diffusers' DiT does
    (1.0). mlp: false returns the sinusoid itself, of D numbers (U-ViT).
    """

    def __init__(
        self,
        dim: int,
        frequency_dim: int = 256,
        *,
        scale: float = 1.0,
        reverse: bool = False,
        offset: float = 0.0,
        frequency_shift: float = 0.0,
        mlp: bool = True,
    ):
        super().__init__()
        self.frequency_dim = frequency_dim if mlp else dim
        self.scale, self.reverse, self.offset, self.shift = scale, reverse, offset, frequency_shift
        hidden = nn.Sequential(nn.Linear(self.frequency_dim, dim), nn.SiLU(), nn.Linear(dim, dim)) if mlp else None
        self.mlp: nn.Sequential | None = hidden

    def forward(self, timestep: Tensor) -> Tensor:
        # Always float32: bfloat16 would fold a thousand timesteps into 507.
        half = self.frequency_dim // 2
        exponents = torch.arange(half, dtype=torch.float32, device=timestep.device)
        frequencies = torch.exp(-math.log(10000) * exponents / (half - self.shift))
        steps = self.scale * (1000 - timestep.float() if self.reverse else timestep.float() + self.offset)
        angles = steps[..., None] * frequencies
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return sinusoid if self.mlp is None else self.mlp(sinusoid.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Labels (...) in 0..num_classes -> (..., D); label `num_classes` is null, for classifier-free guidance."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def reset(self) -> None:
        """DiT's initialisation."""
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class MicroConditionEmbedder(nn.Module):
    """Numbers about a clip (..., N), such as its frame rate -> (..., D); nan where unknown. Zero when fresh.

    Each number is embedded on a logarithmic scale as a timestep would be (SDXL's size conditioning).
    """

    def __init__(self, count: int, dim: int):
        super().__init__()
        self.embedders = nn.ModuleList(TimestepEmbedder(dim) for _ in range(count))
        self.out = nn.Linear(dim, dim)

    def reset(self) -> None:
        """Zero-initialise the output, so that a fresh condition changes nothing."""
        nn.init.zeros_(self.out.weight)

    def forward(self, numbers: Tensor) -> Tensor:
        known = ~numbers.isnan()
        timesteps = 100 * torch.log2(numbers.nan_to_num(1.0).clamp(min=2.0**-5)) + 500  # 1/32 to 32768 on 0..2000
        parts = [embed(timesteps[..., i]) * known[..., i, None] for i, embed in enumerate(self.embedders)]
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
    """Learned position embedding of a (rows, columns) grid, bicubically resized for other grids.

    num_prefix: as many vectors more, for tokens before the patches. Fresh, the grid holds DiT's sin-cos positions and the
    prefix zeros.
    """

    def __init__(self, rows: int, columns: int, dim: int, num_prefix: int = 0):
        super().__init__()
        self.grid = (rows, columns)
        self.patches = nn.Parameter(torch.empty(rows * columns, dim))
        self.prefix = nn.Parameter(torch.zeros(num_prefix, dim)) if num_prefix else None
        self.reset()

    def reset(self) -> None:
        """Start from DiT's sin-cos table."""
        with torch.no_grad():
            self.patches.copy_(spatial_pos_embed(*self.grid, self.patches.shape[1]))

    def forward(self, rows: int, columns: int) -> Tensor:
        """(rows * columns, D) for a grid of any size."""
        if (rows, columns) == self.grid:
            return self.patches
        table = self.patches.T.unflatten(1, self.grid)[None]
        resized = nn.functional.interpolate(table, size=(rows, columns), mode="bicubic", align_corners=False)
        return resized[0].flatten(1).T

    def add_to_prefix(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T, N, D) whose first `num_prefix` get their positions; later ones (captions) have their own."""
        if self.prefix is None:
            return tokens
        count = len(self.prefix)
        return torch.cat([tokens[:, :, :count] + self.prefix, tokens[:, :, count:]], 2)

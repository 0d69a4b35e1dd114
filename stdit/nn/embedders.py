"""Embedders of patches, timesteps, labels, numbers and captions. Names and weight shapes are DiT's."""

import math

import torch
from torch import Tensor, nn

from stdit.nn.positions import spatial_pos_embed
from stdit.nn.tokens import Patch, patchify


class PatchEmbed(nn.Module):
    """Embeds the patches of latents, as a convolution whose stride equals its kernel size.

    The convolution is computed as a matrix product.
    """

    def __init__(self, patch_size: Patch, in_channels: int, dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(in_channels * math.prod(patch_size), dim)

    def forward(self, x: Tensor) -> Tensor:
        """Latents (B, C, T*pt, H*ph, W*pw) -> tokens (B, T, H*W, D)."""
        return self.proj(patchify(x, self.patch_size))


class TimestepEmbedder(nn.Module):
    """Embeds timesteps on 0..1000 as a sinusoid of 256 numbers, followed by an MLP.

    Weights of other repositories may expect another convention: `scale` and `reverse` convert our timesteps to theirs
    (SiT: 0.001, reversed), `offset` is added (U-ViT's first step is 1), `frequency_shift` spreads the frequencies as in
    diffusers' DiT (1.0). mlp=False returns the sinusoid itself, of D numbers (U-ViT).
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
        """Timesteps (...) of any shape -> vectors (..., D)."""
        # Always float32: in bfloat16 only 507 of a thousand timesteps differ.
        half = self.frequency_dim // 2
        exponents = torch.arange(half, dtype=torch.float32, device=timestep.device)
        frequencies = torch.exp(-math.log(10000) * exponents / (half - self.shift))
        steps = self.scale * (1000 - timestep.float() if self.reverse else timestep.float() + self.offset)
        angles = steps[..., None] * frequencies
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return sinusoid if self.mlp is None else self.mlp(sinusoid.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Embeds labels 0..num_classes; label `num_classes` is the null label for classifier-free guidance."""

    def __init__(self, num_classes: int, dim: int, std: float = 0.02):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)
        self.std = std

    def reset(self) -> None:
        """Initialise the table with standard deviation `std`; DiT's is 0.02."""
        nn.init.normal_(self.embedding_table.weight, std=self.std)

    def forward(self, labels: Tensor) -> Tensor:
        """Labels (...) -> vectors (..., D)."""
        return self.embedding_table(labels)


class MicroConditionEmbedder(nn.Module):
    """Embeds numbers about a clip, such as its frame rate; nan stands for an unknown number.

    Each number is embedded like a timestep, on a logarithmic scale (SDXL's size conditioning). The output is zero at
    initialisation.
    """

    def __init__(self, count: int, dim: int):
        super().__init__()
        self.embedders = nn.ModuleList(TimestepEmbedder(dim) for _ in range(count))
        self.out = nn.Linear(dim, dim)

    def reset(self) -> None:
        """Zero-initialise the output, so that the condition has no effect at first."""
        nn.init.zeros_(self.out.weight)

    def forward(self, numbers: Tensor) -> Tensor:
        """Numbers (..., N) -> vectors (..., D)."""
        known = ~numbers.isnan()
        timesteps = 100 * torch.log2(numbers.nan_to_num(1.0).clamp(min=2.0**-5)) + 500  # 1/32 to 32768 on 0..2000
        parts = [embed(timesteps[..., i]) * known[..., i, None] for i, embed in enumerate(self.embedders)]
        return self.out(torch.stack(parts).sum(0))


class CaptionEmbedder(nn.Module):
    """Projects a text encoder's tokens with an MLP, as PixArt's and Latte's `caption_projection`."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, dim)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, captions: Tensor) -> Tensor:
        """Tokens (..., L, C) -> tokens (..., L, D)."""
        return self.fc2(self.act(self.fc1(captions)))


class LearnedPosEmbed(nn.Module):
    """Learned position embedding of a (rows, columns) grid, bicubically resized for other grids.

    num_prefix: number of further vectors, for tokens before the patches. The grid is initialised with DiT's sin-cos
    positions and the prefix with zeros.
    """

    def __init__(self, rows: int, columns: int, dim: int, num_prefix: int = 0):
        super().__init__()
        self.grid = (rows, columns)
        self.patches = nn.Parameter(torch.empty(rows * columns, dim))
        self.prefix = nn.Parameter(torch.zeros(num_prefix, dim)) if num_prefix else None
        self.reset()

    def reset(self) -> None:
        """Initialise the grid with DiT's sin-cos table."""
        with torch.no_grad():
            self.patches.copy_(spatial_pos_embed(*self.grid, self.patches.shape[1]))

    def forward(self, rows: int, columns: int) -> Tensor:
        """Position embedding (rows * columns, D) of a grid of any size."""
        if (rows, columns) == self.grid:
            return self.patches
        table = self.patches.T.unflatten(1, self.grid)[None]
        resized = nn.functional.interpolate(table, size=(rows, columns), mode="bicubic", align_corners=False)
        return resized[0].flatten(1).T

    def add_to_prefix(self, tokens: Tensor) -> Tensor:
        """Add positions to the first `num_prefix` of tokens (B, T, N, D); caption tokens after them carry their own."""
        if self.prefix is None:
            return tokens
        count = len(self.prefix)
        return torch.cat([tokens[:, :, :count] + self.prefix, tokens[:, :, count:]], 2)

"""stdit's own small causal video VAE: stride (4, 8, 8), 16 channels, about two million parameters.

Time is cut into groups of four frames; the first frame stands alone and is repeated to fill its group. Inside a
group the four frames are channels, so every convolution is two-dimensional and wide (what CPUs do best); between
groups information flows forward only, through convolutions that also see the group before.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn

from stdit.vae.base import VideoVAE, each_frame


@dataclass
class TinyVAEConfig:
    """Widths at a stride of 8, 4 and 2 pixels; `*_blocks` counts residual blocks there."""

    channels: int = 16
    encoder_widths: list[int] = field(default_factory=lambda: [64, 96])  # at stride 4, 8
    encoder_blocks: list[int] = field(default_factory=lambda: [1, 1])
    decoder_widths: list[int] = field(default_factory=lambda: [144, 80, 32])  # at stride 8, 4, 2
    decoder_blocks: list[int] = field(default_factory=lambda: [2, 3, 1])


class CausalConvCache(dict[nn.Module, Tensor]):
    """What each `CausalConv` saw last, by module: the whole state of a stream."""


class CausalConv(nn.Conv2d):
    """A (2, k, k) convolution over time and space: sees this group and the one before it, never a later one.

    x: (B, T, C, h, w). Before the first group stands the first group itself, as if the clip had begun earlier.
    """

    def __init__(self, dim_in: int, dim_out: int, kernel: int = 3):
        super().__init__(2 * dim_in, dim_out, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, past: CausalConvCache) -> Tensor:
        before = torch.cat([past.get(self, x[:, :1]), x[:, :-1]], dim=1)
        past[self] = x[:, -1:]
        return each_group(super().forward, torch.cat([before, x], dim=2))


def each_group(layer, x: Tensor) -> Tensor:
    """Apply an image layer to every group of (B, T, C, h, w)."""
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class ResBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))); with `causal` the first convolution also sees the group before."""

    def __init__(self, dim: int, causal: bool):
        super().__init__()
        self.conv1 = CausalConv(dim, dim) if causal else nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, past: CausalConvCache) -> Tensor:
        h = F.silu(x)
        h = self.conv1(h, past) if isinstance(self.conv1, CausalConv) else each_group(self.conv1, h)
        return x + each_group(self.conv2, F.silu(h))


def stage(dim: int, blocks: int) -> nn.ModuleList:
    return nn.ModuleList(ResBlock(dim, causal=i == 0) for i in range(blocks))


class Encoder(nn.Module):
    """(B, T, 12, H, W) groups of four RGB frames -> (B, T, C, H/8, W/8)."""

    def __init__(self, config: TinyVAEConfig):
        super().__init__()
        width4, width8 = config.encoder_widths
        self.conv_in = nn.Conv2d(12 * 16, width4, 3, padding=1)
        self.stride4 = nn.ModuleList(ResBlock(width4, causal=False) for _ in range(config.encoder_blocks[0]))
        self.to_stride8 = nn.Conv2d(4 * width4, width8, 1)
        self.stride8 = stage(width8, config.encoder_blocks[1])
        self.conv_out = nn.Conv2d(width8, config.channels, 1)

    def forward(self, x: Tensor, past: CausalConvCache) -> Tensor:
        x = each_group(self.conv_in, F.pixel_unshuffle(x, 4))
        for block in self.stride4:
            x = block(x, past)
        x = each_group(self.to_stride8, F.pixel_unshuffle(x, 2))
        for block in self.stride8:
            x = block(x, past)
        return each_group(self.conv_out, x)


class Decoder(nn.Module):
    """(B, T, C, h, w) -> (B, T, 12, 8h, 8w) groups of four RGB frames."""

    def __init__(self, config: TinyVAEConfig):
        super().__init__()
        width8, width4, width2 = config.decoder_widths
        self.conv_in = CausalConv(config.channels, width8)
        self.stride8 = stage(width8, config.decoder_blocks[0])
        self.to_stride4 = nn.Conv2d(width8, 4 * width4, 1)
        self.stride4 = stage(width4, config.decoder_blocks[1])
        self.to_stride2 = nn.Conv2d(width4, 4 * width2, 1)
        self.stride2 = nn.ModuleList(ResBlock(width2, causal=False) for _ in range(config.decoder_blocks[2]))
        self.conv_out = nn.Conv2d(width2, 12 * 4, 3, padding=1)

    def forward(self, x: Tensor, past: CausalConvCache) -> Tensor:
        x = self.conv_in(x, past)
        for block in self.stride8:
            x = block(x, past)
        x = F.pixel_shuffle(each_group(self.to_stride4, x), 2)
        for block in self.stride4:
            x = block(x, past)
        x = F.pixel_shuffle(each_group(self.to_stride2, x), 2)
        for block in self.stride2:
            x = block(x, past)
        return F.pixel_shuffle(each_group(self.conv_out, x), 2)


class TinyVAE(VideoVAE, ModelMixin, ConfigMixin):
    """The `tiny` VAE. An image is exactly its clip's first latent frame; both directions are causal and stream."""

    stride = (4, 8, 8)
    causal = True
    name = "tiny"

    @register_to_config
    def __init__(
        self,
        channels: int = 16,
        encoder_widths: Sequence[int] = (64, 96),
        encoder_blocks: Sequence[int] = (1, 1),
        decoder_widths: Sequence[int] = (144, 80, 32),
        decoder_blocks: Sequence[int] = (2, 3, 1),
    ):
        super().__init__()
        shape = TinyVAEConfig(channels, *map(list, (encoder_widths, encoder_blocks, decoder_widths, decoder_blocks)))
        self.channels = channels
        self.encoder = Encoder(shape)
        self.decoder = Decoder(shape)
        # Statistics of raw latents, measured after training: they make latents zero mean, unit variance.
        self.register_buffer("latent_mean", torch.zeros(self.channels))
        self.register_buffer("latent_std", torch.ones(self.channels))

    def _groups(self, pixels: Tensor) -> Tensor:
        first = pixels[:, :, :1].expand(-1, -1, 3, -1, -1)
        return rearrange(torch.cat([first, pixels], 2), "b c (t f) h w -> b t (f c) h w", f=4)

    def _frames(self, groups: Tensor, clip_start: bool) -> Tensor:
        frames = rearrange(groups, "b t (f c) h w -> b c (t f) h w", f=4)
        return frames[:, :, 3:] if clip_start else frames

    def encode_raw(self, pixels: Tensor) -> Tensor:
        """Latents before normalisation, all groups at once (training's path)."""
        return self.encoder(self._groups(pixels), CausalConvCache()).transpose(1, 2)

    def decode_raw(self, latents: Tensor) -> Tensor:
        return self._frames(self.decoder(latents.transpose(1, 2), CausalConvCache()), clip_start=True)

    def _encode(self, pixels: Tensor) -> Tensor:
        # The first group runs alone: same shapes as an image, so the same numbers to the last bit.
        past, groups = CausalConvCache(), self._groups(pixels)
        parts = [self.encoder(part, past) for part in (groups[:, :1], groups[:, 1:]) if part.shape[1]]
        raw = torch.cat(parts, dim=1).transpose(1, 2)
        return (raw - _per_channel(self.latent_mean, raw)) / _per_channel(self.latent_std, raw)

    def _denormalise(self, latents: Tensor) -> Tensor:
        return latents * _per_channel(self.latent_std, latents) + _per_channel(self.latent_mean, latents)

    def _decode(self, latents: Tensor) -> Tensor:
        return self.decode_raw(self._denormalise(latents))

    def decode_stream(self, latents: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        past = CausalConvCache()
        for t, frame in enumerate(each_frame(latents)):
            group = self._denormalise(frame).transpose(1, 2)
            yield self._frames(self.decoder(group, past), clip_start=t == 0)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype)[None, :, None, None, None]

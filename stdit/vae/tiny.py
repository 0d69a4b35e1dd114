"""A small causal video VAE: stride (4, 8, 8), 16 channels, about two million parameters.

A clip is divided into groups of four frames; the first frame is a group by itself, repeated four times. The four frames
of a group are stacked as channels, so that every convolution is two-dimensional and wide, which is fast on CPUs.
Information flows between groups forward in time only, through convolutions over a group and the previous one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from einops import rearrange
from torch import Tensor, nn

from stdit import legacy
from stdit.ranges import check_ranges
from stdit.vae.base import DecoderState, VideoVAE

# Bounds of the memory: pixels of the groups that are encoded, and decoded, at a time (each counted as one frame), over the
# batch; and the largest side of a tile of a larger frame, in latents. 17 frames of eight clips of 128 px are decoded at once.
MOST_PIXELS = 1 << 19
MOST_DECODED = 1 << 21
TILE = 96


@dataclass
class TinyVAEConfig:
    """The sizes of `TinyVAE`: for each resolution a width (`*_widths`) and a number of residual blocks (`*_blocks`)."""

    channels: int = 16  # latent channels
    encoder_widths: list[int] = field(default_factory=lambda: [64, 96])  # widths at strides of 4 and 8 pixels
    encoder_blocks: list[int] = field(default_factory=lambda: [1, 1])  # residual blocks per resolution
    decoder_widths: list[int] = field(default_factory=lambda: [144, 80, 32])  # widths at strides of 8, 4 and 2
    decoder_blocks: list[int] = field(default_factory=lambda: [2, 3, 1])  # residual blocks per resolution

    def __post_init__(self) -> None:
        check_ranges(
            "model", self, {"channels": "[1, inf)", "encoder_widths": "[1, inf)", "decoder_widths": "[1, inf)"}
        )
        check_ranges("model", self, {"encoder_blocks": "[0, inf)", "decoder_blocks": "[0, inf)"})


class CausalConvCache(dict[nn.Module, Tensor]):
    """The cache of a stream: the last input group of every `CausalConv`, by module."""


class CausalConv(nn.Conv2d):
    """A (2, k, k) convolution over time and space, whose inputs are a group and the previous one, never a later one.

    x: (B, T, C, h, w). For the first group of a clip the previous one is a copy of itself (replicate padding in time).
    """

    def __init__(self, dim_in: int, dim_out: int, kernel: int = 3):
        super().__init__(2 * dim_in, dim_out, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, cache: CausalConvCache) -> Tensor:  # type: ignore[override]
        """Convolve groups x (B, T, C, h, w); the cache has the group before them, and the last of them afterwards."""
        previous = torch.cat([cache.get(self, x[:, :1]), x[:, :-1]], dim=1)
        cache[self] = x[:, -1:]
        return per_group(super().forward, torch.cat([previous, x], dim=2))


def per_group(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a two-dimensional layer to every group of x (B, T, C, h, w)."""
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def groups_at_once(x: Tensor, stride: Sequence[int] = (1, 1, 1), cost: int = 1, *, most: int | None = None) -> int:
    """The number of groups of pixels, or of latents of a VAE's stride, that are coded at a time to bound the memory.

    cost: how many times as much memory as in the tiny VAE a group takes. most: pixels of groups at a time (`MOST_PIXELS`).
    """
    return max(1, (most or MOST_PIXELS) // (cost * len(x) * x.shape[3] * stride[1] * x.shape[4] * stride[2]))


class ResBlock(nn.Module):
    """A residual block x + conv(silu(conv(silu(x)))), which is the identity at initialisation.

    causal: whether the first convolution is a `CausalConv`.
    """

    def __init__(self, dim: int, causal: bool):
        super().__init__()
        self.conv1 = CausalConv(dim, dim) if causal else nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        assert self.conv2.bias is not None
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, cache: CausalConvCache) -> Tensor:
        """Apply the block to x (B, T, C, h, w), whose shape it keeps."""
        h = F.silu(x)
        h = self.conv1(h, cache) if isinstance(self.conv1, CausalConv) else per_group(self.conv1, h)
        return x + per_group(self.conv2, F.silu(h))


def stage(dim: int, blocks: int) -> nn.ModuleList:
    """Residual blocks of one resolution, of which the first is causal."""
    return nn.ModuleList(ResBlock(dim, causal=i == 0) for i in range(blocks))


class Encoder(nn.Module):
    """The encoder of groups of four RGB frames (B, T, 12, H, W) to (B, T, C, H/8, W/8)."""

    def __init__(self, config: TinyVAEConfig):
        super().__init__()
        width4, width8 = config.encoder_widths
        self.conv_in = nn.Conv2d(12 * 16, width4, 3, padding=1)
        self.stride4 = nn.ModuleList(ResBlock(width4, causal=False) for _ in range(config.encoder_blocks[0]))
        self.to_stride8 = nn.Conv2d(4 * width4, width8, 1)
        self.stride8 = stage(width8, config.encoder_blocks[1])
        self.conv_out = nn.Conv2d(width8, config.channels, 1)

    def forward(self, x: Tensor, cache: CausalConvCache) -> Tensor:
        """Encode groups; the cache carries the state of the groups before them."""
        x = per_group(self.conv_in, F.pixel_unshuffle(x, 4))
        for block in self.stride4:
            x = block(x, cache)
        x = per_group(self.to_stride8, F.pixel_unshuffle(x, 2))
        for block in self.stride8:
            x = block(x, cache)
        return per_group(self.conv_out, x)


class Decoder(nn.Module):
    """The decoder of (B, T, C, h, w) to groups of four RGB frames (B, T, 12, 8h, 8w)."""

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

    def forward(self, x: Tensor, cache: CausalConvCache) -> Tensor:
        """Decode groups; the cache carries the state of the groups before them."""
        x = self.conv_in(x, cache)
        for block in self.stride8:
            x = block(x, cache)
        x = F.pixel_shuffle(per_group(self.to_stride4, x), 2)
        for block in self.stride4:
            x = block(x, cache)
        x = F.pixel_shuffle(per_group(self.to_stride2, x), 2)
        for block in self.stride2:
            x = block(x, cache)
        return F.pixel_shuffle(per_group(self.conv_out, x), 2)


# ModelMixin comes first, since its `device` and `dtype` know of the hooks that diffusers attaches; ConfigMixin comes last,
# since its `__getattr__` finds no modules.
class TinyVAE(ModelMixin, VideoVAE, ConfigMixin):
    """The `tiny` VAE, whose encoder and decoder are causal.

    The latent of an image equals, to the last bit, the first latent frame of a clip that begins with that image.
    """

    stride = (4, 8, 8)
    causal = True
    resumable = True
    reentrant = True
    name = "tiny"
    latent_mean: Tensor
    latent_std: Tensor

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
        config = TinyVAEConfig(
            channels=channels,
            encoder_widths=list(encoder_widths),
            encoder_blocks=list(encoder_blocks),
            decoder_widths=list(decoder_widths),
            decoder_blocks=list(decoder_blocks),
        )
        self.channels = channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        # Statistics of the raw latents, measured after training, which normalise latents to mean 0 and variance 1.
        self.register_buffer("latent_mean", torch.zeros(self.channels))
        self.register_buffer("latent_std", torch.ones(self.channels))

    def _to_groups(self, pixels: Tensor) -> Tensor:
        """(B, 3, 1 + 4 k, H, W) -> (B, 1 + k, 12, H, W), the first frame repeated to four."""
        first = pixels[:, :, :1].expand(-1, -1, 3, -1, -1)
        return rearrange(torch.cat([first, pixels], 2), "b c (t f) h w -> b t (f c) h w", f=4)

    def _to_frames(self, groups: Tensor, clip_start: bool) -> Tensor:
        """(B, T, 12, H, W) -> (B, 3, F, H, W); at the start of a clip the first three copies are dropped."""
        frames = rearrange(groups, "b t (f c) h w -> b c (t f) h w", f=4)
        return frames[:, :, 3:] if clip_start else frames

    def encode_raw(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, F, H, W) to latents (B, C, T, h, w) before normalisation in one pass, as in training."""
        return self.encoder(self._to_groups(pixels), CausalConvCache()).transpose(1, 2)

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, T, h, w) before normalisation to pixels (B, 3, F, H, W)."""
        return self._to_frames(self.decoder(latents.transpose(1, 2), CausalConvCache()), clip_start=True)

    @apply_forward_hook  # an offloaded VAE is put on its device, as by a call of `forward`
    def _encode(self, pixels: Tensor) -> Tensor:
        raw = self._stream(pixels) if max(pixels.shape[3:]) <= TILE * self.stride[1] else self._tiles(pixels)
        return (raw - _per_channel(self.latent_mean, raw)) / _per_channel(self.latent_std, raw)

    @property
    def margin(self) -> int:
        """The latents around a tile that cover the encoder's receptive field: convolutions of 3 at strides of 4 and 8 pixels."""
        at4, at8 = len(self.encoder.stride4), len(self.encoder.stride8)
        return math.ceil((1 + 2 * at4) / 2 + 2 * at8)

    def _stream(self, pixels: Tensor) -> Tensor:
        """Encode some groups after the others, which bounds the memory of long clips.

        The first group is encoded by itself, as an image is, which gives the latents of an image to the last bit.
        """
        cache = CausalConvCache()
        parts = [self.encoder(self._to_groups(pixels[:, :, :1]), cache)]
        for frames in pixels[:, :, 1:].split(4 * groups_at_once(pixels), dim=2) if pixels.shape[2] > 1 else ():
            parts.append(self.encoder(rearrange(frames, "b c (t f) h w -> b t (f c) h w", f=4), cache))
        return torch.cat(parts, dim=1).transpose(1, 2)

    def _tiles(self, pixels: Tensor) -> Tensor:
        """Encode tiles of large frames, each with a margin, which is cut off again: the result is that of whole frames."""
        batch, _, frames, height, width = pixels.shape
        margin = self.margin
        rows, columns = height // self.stride[1], width // self.stride[2]
        raw = pixels.new_empty((batch, self.channels, self.latent_frames(frames), rows, columns))
        for top in range(0, rows, TILE):
            for left in range(0, columns, TILE):
                bottom, right = min(top + TILE, rows), min(left + TILE, columns)
                y, x = max(0, top - margin), max(0, left - margin)
                part = pixels[..., 8 * y : 8 * min(bottom + margin, rows), 8 * x : 8 * min(right + margin, columns)]
                found = self._stream(part)[..., top - y : bottom - y, left - x : right - x]
                raw[..., top:bottom, left:right] = found
        return raw

    def _denormalise(self, latents: Tensor) -> Tensor:
        return latents * _per_channel(self.latent_std, latents) + _per_channel(self.latent_mean, latents)

    @apply_forward_hook
    def _decode(self, latents: Tensor) -> Tensor:
        cache = CausalConvCache()
        at_once = groups_at_once(latents, self.stride, most=MOST_DECODED)
        parts = self._denormalise(latents).split(at_once, dim=2)
        frames = (
            self._to_frames(self.decoder(part.transpose(1, 2), cache), clip_start=i == 0)
            for i, part in enumerate(parts)
        )
        return torch.cat(list(frames), dim=2) if len(parts) > 1 else next(frames)

    @apply_forward_hook
    def decode_next(self, latents: Tensor, state: DecoderState | None = None) -> tuple[Tensor, DecoderState]:
        """Decode as `VideoVAE.decode_next`; the state is the input of every convolution over time."""
        cache = CausalConvCache(state or {})
        group = self._denormalise(latents).transpose(1, 2)
        return self._to_frames(self.decoder(group, cache), clip_start=state is None), cache


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """(C,) -> (1, C, 1, 1, 1) in the data type and on the device of `like`."""
    return values.to(like)[None, :, None, None, None]


__getattr__ = legacy.aliases(__name__)

"""TAEHV, tiny autoencoders for the latent spaces of Hunyuan Video, Wan, CogVideoX and others (github.com/madebyollin/taehv).

Convolutions are two-dimensional. What passes from frame to frame is the input of a block at the frame before; frames are
merged and split by 1x1 convolutions over neighbours. Latents are those that the diffusion models of these spaces take, of
mean 0 and variance 1. The encoder merges frames 0 to 3, 4 to 7, ..., so a latent also depends on up to three later frames.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from stdit.vae.base import DecoderState, VideoVAE
from stdit.vae.tiny import groups_at_once, per_group

_COST = 8  # of a group in memory, beside one of the tiny VAE
Memory = dict[nn.Module, Tensor]  # layer -> its input (B, 1, C, h, w) at the last frame


class MemoryBlock(nn.Module):
    """A residual block whose convolutions also get its input at the frame before, zeros at the first.

    Two kinds: three 3x3 convolutions; or, of the `super` decoders, a 7x7 one by channel and two 1x1.
    """

    def __init__(self, dim: int, is_super: bool = False):
        super().__init__()
        self.is_super = is_super
        if is_super:
            layers: list[nn.Module] = [
                nn.Conv2d(2 * dim, 2 * dim, 7, padding=3, groups=2 * dim, bias=False),
                nn.Conv2d(2 * dim, 4 * dim, 1), nn.ReLU(),
                nn.Conv2d(4 * dim, dim, 1, bias=False),
            ]  # fmt: skip
        else:
            layers = [conv3(2 * dim, dim), nn.ReLU(), conv3(dim, dim), nn.ReLU(), conv3(dim, dim)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """Apply the block to frames x (B, T, C, h, w), whose shape it keeps."""
        first = memory.get(self, torch.zeros_like(x[:, :1]))
        pairs = torch.cat([x, torch.cat([first, x[:, :-1]], dim=1)], dim=2)
        memory[self] = x[:, -1:]
        y = per_group(self.conv, pairs) + x
        return y if self.is_super else F.relu(y)


class MergeFrames(nn.Module):
    """Every `stride` neighbouring frames become one, by a 1x1 convolution over their channels."""

    def __init__(self, dim: int, stride: int):
        super().__init__()
        self.stride, self.conv = stride, nn.Conv2d(stride * dim, dim, 1, bias=False)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """(B, T, C, h, w) -> (B, T / stride, C, h, w)."""
        return per_group(self.conv, x.unflatten(1, (-1, self.stride)).flatten(2, 3))


class SplitFrames(nn.Module):
    """Every frame becomes `stride` frames, by a 1x1 convolution to their channels."""

    def __init__(self, dim: int, stride: int):
        super().__init__()
        self.stride, self.conv = stride, nn.Conv2d(dim, stride * dim, 1, bias=False)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """(B, T, C, h, w) -> (B, T * stride, C, h, w)."""
        return per_group(self.conv, x).unflatten(2, (self.stride, -1)).flatten(1, 2)


class SoftClamp(nn.Module):
    """Bounds latents smoothly to [-3, 3]."""

    def forward(self, x: Tensor) -> Tensor:
        """Bound x of any shape."""
        return 3 * torch.tanh(x / 3)


def conv3(dim_in: int, dim_out: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size, up to its stride."""
    return nn.Conv2d(dim_in, dim_out, 3, stride=stride, padding=1, bias=bias)


def encoder_of(channels: int, patch: int, width: int, strides: Sequence[int]) -> nn.Sequential:
    """The encoder of frames of 3 * patch^2 channels: three stages that halve the size. strides: of the stages, in time."""
    layers: list[nn.Module] = [conv3(3 * patch**2, width), nn.ReLU()]
    for stride in strides:
        layers += [MergeFrames(width, stride), conv3(width, width, stride=2, bias=False)]
        layers += [MemoryBlock(width) for _ in range(3)]
    return nn.Sequential(*layers, conv3(width, channels))


def decoder_of(channels: int, patch: int, widths: Sequence[int], strides: Sequence[int]) -> nn.Sequential:
    """The decoder to frames of 3 * patch^2 channels: three stages that double the size. strides: of the stages, in time."""
    layers: list[nn.Module] = [SoftClamp(), conv3(channels, widths[0]), nn.ReLU()]
    for width, after, stride in zip(widths[:-1], widths[1:], strides, strict=True):
        layers += [MemoryBlock(width) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), SplitFrames(width, stride), conv3(width, after, bias=False)]
    return nn.Sequential(*layers, nn.ReLU(), conv3(widths[-1], 3 * patch**2))


def super_decoder_of(channels: int, patch: int, widths: Sequence[int], strides: Sequence[int]) -> nn.Sequential:
    """The larger decoder of the weights named `super`, in the same terms."""
    layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 1, bias=False)]
    for width, after, stride in zip(widths[:-1], widths[1:], strides, strict=True):
        layers += [MemoryBlock(width, is_super=True) for _ in range(3)]
        layers += [conv3(width, 4 * after), nn.ReLU(), nn.PixelShuffle(2), SplitFrames(after, stride)]
    return nn.Sequential(*layers, conv3(widths[-1], 3 * patch**2))


def run(layers: nn.Sequential, x: Tensor, memory: Memory) -> Tensor:
    """Apply layers to frames x (B, T, C, h, w) after those that left `memory`, which they change."""
    for layer in layers:
        x = layer(x, memory) if isinstance(layer, MemoryBlock | MergeFrames | SplitFrames) else per_group(layer, x)
    return x


class TAEHV(ModelMixin, VideoVAE, ConfigMixin):
    """A TAEHV autoencoder, with the names of its released weights.

    channels: of latents. patch_size: pixels per side that are stacked to channels. encoder_strides, decoder_strides: in
    time, of the three stages. is_super: the larger decoder.
    """

    name = "TAEHV"
    causal = False
    resumable = True
    image_is_first_frame = False

    @register_to_config
    def __init__(
        self,
        channels: int = 16,
        patch_size: int = 1,
        encoder_width: int = 64,
        decoder_widths: Sequence[int] = (256, 128, 64, 64),
        encoder_strides: Sequence[int] = (2, 2, 1),
        decoder_strides: Sequence[int] = (1, 2, 2),
        is_super: bool = False,
    ):
        super().__init__()
        in_time, out_time = (torch.Size(strides).numel() for strides in (encoder_strides, decoder_strides))
        if in_time != out_time:
            raise ValueError(
                f"the encoder merges {in_time} frames and the decoder makes {out_time}; use weights whose numbers agree."
            )
        self.channels, self.patch_size = channels, patch_size
        self.stride = (in_time, 8 * patch_size, 8 * patch_size)
        self.encoder = encoder_of(channels, patch_size, encoder_width, encoder_strides)
        build = super_decoder_of if is_super else decoder_of
        self.decoder = build(channels, patch_size, decoder_widths, decoder_strides)

    @staticmethod
    def config_of(shapes: Mapping[str, Sequence[int]]) -> dict | None:
        """The arguments of the autoencoder that has weights of these shapes by name; None for weights of another kind."""
        encoder = [shapes.get(f"encoder.{i}.conv.weight", ()) for i in (2, 7, 12)]
        is_super = len(shapes.get("decoder.1.conv.0.weight", ())) == 4
        decoder = [shapes.get(f"decoder.{i}.conv.weight", ()) for i in ((7, 14, 21) if is_super else (7, 13, 19))]
        ends = [shapes.get(key, ()) for key in ("encoder.0.weight", "encoder.17.weight", "decoder.22.weight")]
        if not all(len(found) == 4 for found in (*encoder, *decoder, *ends)):
            return None
        widths = [shapes["decoder.0.weight"][0]] if is_super else []
        for i in (4, 11, 18) if is_super else (1, 8, 14, 20):
            widths.append(shapes[f"decoder.{i}.weight"][0] // (4 if is_super else 1))
        found = {
            "channels": ends[1][0],
            "patch_size": round((ends[0][1] / 3) ** 0.5),
            "encoder_width": ends[0][0],
            "decoder_widths": widths,
            "encoder_strides": [shape[1] // shape[0] for shape in encoder],
            "decoder_strides": [shape[0] // shape[1] for shape in decoder],
            "is_super": is_super,
        }
        if (found["channels"], found["patch_size"]) == (24, 2):
            raise ValueError(
                "these are TAEHV's weights for MiniMax H3, which cuts clips into parts of 17 frames; use one for another model."
            )
        return found

    @apply_forward_hook
    def _encode(self, pixels: Tensor) -> Tensor:
        frames = (pixels.transpose(1, 2) + 1) / 2
        padding = frames[:, -1:].expand(-1, -frames.shape[1] % self.stride[0], -1, -1, -1)
        frames = F.pixel_unshuffle(torch.cat([frames, padding], dim=1), self.patch_size)
        memory: Memory = {}
        parts = frames.split(self.stride[0] * groups_at_once(pixels, cost=_COST), dim=1)
        return torch.cat([run(self.encoder, part, memory) for part in parts], dim=1).transpose(1, 2)

    def _frames(self, latents: Tensor, memory: Memory) -> Tensor:
        frames = F.pixel_shuffle(run(self.decoder, latents.transpose(1, 2), memory), self.patch_size)
        return 2 * frames.clamp(0, 1).transpose(1, 2) - 1

    @apply_forward_hook
    def _decode(self, latents: Tensor) -> Tensor:
        memory: Memory = {}
        parts = latents.split(groups_at_once(latents, self.stride, cost=_COST), dim=2)
        return torch.cat([self._frames(part, memory) for part in parts], dim=2)[:, :, self.stride[0] - 1 :]

    @apply_forward_hook
    def decode_next(self, latents: Tensor, state: DecoderState | None = None) -> tuple[Tensor, DecoderState]:
        """Decode as `VideoVAE.decode_next`; the state is what the blocks remember."""
        memory = dict(state or {})
        frames = self._frames(latents, memory)
        return frames[:, :, self.stride[0] - 1 :] if state is None else frames, memory

"""LeanVAE, a causal video autoencoder of wavelets and neighbourhood-aware blocks (github.com/westlake-repl/LeanVAE).

Cheng and Yuan, "LeanVAE: An Ultra-Efficient Reconstruction VAE for Video Diffusion Models". Haar wavelets halve the first
frame in space, and all others in space and time; patches of the smooth part and of the details are tokens of two widths.
A latent is a linear projection of a token, from which a few steps of ISTA, a solver of sparse coding, recover the token.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from einops import rearrange
from torch import Tensor, nn

from stdit.vae.base import DecoderState, VideoVAE
from stdit.vae.tiny import groups_at_once

_COST = 8  # of a group in memory, beside one of the tiny VAE
Memory = dict[nn.Module, Tensor]  # convolution -> its input (B, D, 2, h, w) at the last two frames
# Axes that a wavelet halves in the first frame and in others, in the order in which its bands are stored.
_AXES = {"image": (4, 3), "video": (2, 3, 4)}


def haar(x: Tensor, axes: Sequence[int]) -> Tensor:
    """The sums and differences of neighbours along each axis of x (B, C, T, H, W), as 2^n groups of channels."""
    bands = [x]
    for axis in axes:
        pairs = [band.unflatten(axis, (-1, 2)).unbind(axis + 1) for band in bands]
        bands = [band for even, odd in pairs for band in (even + odd, even - odd)]
    return torch.cat(bands, dim=1)


def inverse_haar(x: Tensor, axes: Sequence[int]) -> Tensor:
    """The pixels of which `haar` made x."""
    bands = list(x.chunk(2 ** len(axes), dim=1))
    for axis in reversed(axes):
        pairs = zip(bands[::2], bands[1::2], strict=True)
        bands = [torch.stack([(s + d) / 2, (s - d) / 2], axis + 1).flatten(axis, axis + 1) for s, d in pairs]
    return bands[0]


class CausalDepthwise(nn.Module):
    """A 3x3x3 convolution by channel over tokens (B, T, h, w, D) and the two frames before; zeros lie around the clip."""

    def __init__(self, dim: int):
        super().__init__()
        self.ds_conv = nn.Conv3d(dim, dim, 3, groups=dim)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """Convolve x; the memory has the frames before, and the last ones afterwards."""
        x = x.movedim(-1, 1)
        before = memory.get(self)
        x = F.pad(x, (0, 0, 0, 0, 2, 0)) if before is None else torch.cat([before, x], dim=2)
        memory[self] = x[:, :, -2:]
        return self.ds_conv(F.pad(x, (1, 1, 1, 1))).movedim(1, -1)


class GatedGELU(nn.Module):
    """GEGLU: the first half of the channels, times the GELU of the second."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., 2 D) -> (..., D)."""
        value, gate = x.chunk(2, dim=-1)
        return F.gelu(gate) * value


def feed_forward(dim: int) -> nn.Sequential:
    """Normalise, widen with a gate, and project back; the fourth layer is the place of a dropout in training."""
    inner = int(4 * (2 / 3) * dim)
    first, last = nn.Linear(dim, 2 * inner, bias=False), nn.Linear(inner, dim, bias=False)
    return nn.Sequential(*(nn.LayerNorm(dim), first, GatedGELU(), nn.Identity(), last))


class Neighbourhood(nn.Module):
    """Layers of a causal convolution and a feed-forward network each, with or without residual connections."""

    def __init__(self, dim: int, layers: int, residual: bool):
        super().__init__()
        self.residual = residual
        self.dconv_layer = nn.ModuleList(CausalDepthwise(dim) for _ in range(layers))
        self.ffd_layer = nn.ModuleList(feed_forward(dim) for _ in range(layers))

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """Apply the layers to tokens x (B, T, h, w, D)."""
        for mix, transform in zip(self.dconv_layer, self.ffd_layer, strict=True):
            x = x + mix(x, memory) if self.residual else mix(x, memory)
            x = x + transform(x) if self.residual else transform(x)
        return x


class Tokens(nn.Module):
    """The part that encoder and decoder share: layers by width, and over both widths together.

    patch: coefficients per token in (time, height, width).
    """

    def __init__(self, widths: Sequence[int], layers: Sequence[int], patch: Sequence[int]):
        super().__init__()
        self.widths, self.patch = widths, tuple(patch)
        self.low_layer = Neighbourhood(widths[0], layers[0], residual=True)
        self.high_layer = Neighbourhood(widths[1], layers[0], residual=True)
        self.fusion_layer = Neighbourhood(sum(widths), layers[1], residual=True)

    def sizes(self) -> Iterable[tuple[str, int, int]]:
        """(name of a projection, its width, coefficients of a token) of both kinds of frames and parts."""
        time, height, width = self.patch
        for kind, frames, details in (("image", 1, 3), ("video", time, 7)):
            yield f"{kind}_low_proj", self.widths[0], 3 * frames * height * width
            yield f"{kind}_high_proj", self.widths[1], 3 * frames * height * width * details


class Encoder(Tokens):
    """The encoder of wavelet coefficients to tokens (B, T, h, w, low + high)."""

    def __init__(self, widths: Sequence[int], layers: Sequence[int], patch: Sequence[int]):
        super().__init__(widths, layers, patch)
        for name, width, size in self.sizes():
            self.add_module(name, nn.Sequential(nn.Identity(), nn.Linear(size, width)))

    def forward(self, x: Tensor, kind: str, memory: Memory) -> Tensor:
        """x: the coefficients of the first frame (B, 12, 1, H, W), or of others (B, 24, T, H, W); kind: "image" or "video"."""
        low, high = self._embed(x, kind)
        tokens = torch.cat([self.low_layer(low, memory), self.high_layer(high, memory)], dim=-1)
        return self.fusion_layer(tokens, memory)

    def _embed(self, x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        time, height, width = self.patch if kind == "video" else (1, *self.patch[1:])
        smooth, details = (
            rearrange(part, "b c (t f) (h y) (w x) -> b t h w (c f y x)", f=time, y=height, x=width)
            for part in (x[:, :3], x[:, 3:])
        )
        return getattr(self, f"{kind}_low_proj")(smooth), getattr(self, f"{kind}_high_proj")(details)


class Decoder(Tokens):
    """The decoder of tokens to wavelet coefficients."""

    def __init__(self, widths: Sequence[int], layers: Sequence[int], patch: Sequence[int]):
        super().__init__(widths, layers, patch)
        for name, width, size in self.sizes():
            self.add_module(name, nn.Sequential(nn.Linear(width, size)))

    def forward(self, x: Tensor, kind: str, memory: Memory) -> Tensor:
        """x: tokens (B, T, h, w, D) of the first frame, or of others -> their coefficients; kind: "image" or "video"."""
        low, high = self.fusion_layer(x, memory).split(list(self.widths), dim=-1)
        return self._coefficients(self.low_layer(low, memory), self.high_layer(high, memory), kind)

    def _coefficients(self, low: Tensor, high: Tensor, kind: str) -> Tensor:
        time, height, width = self.patch if kind == "video" else (1, *self.patch[1:])
        parts = getattr(self, f"{kind}_low_proj")(low), getattr(self, f"{kind}_high_proj")(high)
        return torch.cat(
            [
                rearrange(part, "b t h w (c f y x) -> b c (t f) (h y) (w x)", f=time, y=height, x=width)
                for part in parts
            ],
            dim=1,
        )


class Bottleneck(nn.Module):
    """The projection of tokens to latents, and its inversion by unrolled steps of ISTA with learned transforms.

    A step descends on |phi x - y|^2, transforms the tokens, sets what is small to zero, and transforms back.
    """

    def __init__(self, dim: int, channels: int, steps: int, layers: int):
        super().__init__()
        self.phi = nn.Parameter(torch.randn(channels, dim) / dim**0.5)
        self.Q = nn.Parameter(self.phi.detach().T.clone())
        self.forward_l = nn.ModuleList(Neighbourhood(dim, layers, residual=False) for _ in range(steps))
        self.backward_l = nn.ModuleList(Neighbourhood(dim, layers, residual=False) for _ in range(steps))
        self.weights = nn.ParameterList(nn.Parameter(torch.ones(())) for _ in range(steps))
        self.threshold = nn.ParameterList(nn.Parameter(torch.full((1,), 0.01)) for _ in range(steps))

    def project(self, x: Tensor) -> Tensor:
        """Tokens (B, T, h, w, D) -> latents (B, T, h, w, C)."""
        return x @ self.phi.T

    def recover(self, y: Tensor, memory: Memory) -> Tensor:
        """Latents (B, T, h, w, C) -> tokens (B, T, h, w, D)."""
        x = y @ self.Q.T
        layers = zip(self.weights, self.threshold, self.forward_l, self.backward_l, strict=True)
        for weight, threshold, transform, back in layers:
            x = x - weight * ((x @ self.phi.T - y) @ self.phi)
            x = x + back(soft_threshold(transform(x, memory), threshold), memory)
        return x


def soft_threshold(x: Tensor, threshold: Tensor) -> Tensor:
    """Move x towards zero by `threshold`, not beyond it."""
    return torch.sign(x) * F.relu(torch.abs(x) - threshold)


class LeanVAE(ModelMixin, VideoVAE, ConfigMixin):
    """A LeanVAE, with the names of its released weights.

    channels: of latents. widths: of tokens, smooth part and details. layers: by width, and over both. steps, step_layers:
    of ISTA. patch_size: wavelet coefficients per token. pixel_range: largest absolute value of its pixels, 0.5 for the
    released weights. latents_mean, latents_std: of the raw latents, per channel or one number for all; those of the VAE
    that it was aligned with, for weights that were (where pixel_range is 1).
    """

    name = "LeanVAE"
    causal = True
    resumable = True
    latent_mean: Tensor
    latent_std: Tensor

    @register_to_config
    def __init__(
        self,
        channels: int = 4,
        widths: Sequence[int] = (128, 384),
        layers: Sequence[int] = (2, 4),
        steps: int = 2,
        step_layers: int = 2,
        patch_size: Sequence[int] = (2, 4, 4),
        pixel_range: float = 0.5,
        latents_mean: Sequence[float] = (0.0,),
        latents_std: Sequence[float] = (1.0,),
    ):
        super().__init__()
        for key, values in (("latents_mean", latents_mean), ("latents_std", latents_std)):
            if len(values) not in (1, channels):
                raise ValueError(f"{key} has {len(values)} numbers for {channels} channels; give one for each, or one.")
        self.channels, self.pixel_range = channels, pixel_range
        self.stride = (2 * patch_size[0], 2 * patch_size[1], 2 * patch_size[2])
        self.latent_bottleneck = Bottleneck(sum(widths), channels, steps, step_layers)
        self.encoder = Encoder(widths, layers, patch_size)
        self.decoder = Decoder(widths, layers, patch_size)
        self.register_buffer("latent_mean", torch.tensor(list(latents_mean)).float(), persistent=False)
        self.register_buffer("latent_std", torch.tensor(list(latents_std)).float(), persistent=False)

    @staticmethod
    def config_of(shapes: Mapping[str, Sequence[int]]) -> dict | None:
        """The arguments of the autoencoder that has weights of these shapes by name; None for weights of another kind."""
        keys = [f"encoder.{name}_proj.1.weight" for name in ("image_low", "video_low", "video_high")]
        image, video, details = (shapes.get(key, ()) for key in keys)
        phi = shapes.get("latent_bottleneck.phi", ())
        if not all(len(shape) == 2 for shape in (image, video, details, phi)):
            return None
        side = round((image[1] / 3) ** 0.5)

        def count(name: str) -> int:
            """The number of items in a list of layers or parameters."""
            start = f"{name}."
            return len({key[len(start) :].partition(".")[0] for key in shapes if key.startswith(start)})

        return {
            "channels": phi[0],
            "widths": [video[0], details[0]],
            "layers": [count("encoder.low_layer.dconv_layer"), count("encoder.fusion_layer.dconv_layer")],
            "steps": count("latent_bottleneck.threshold"),
            "step_layers": count("latent_bottleneck.forward_l.0.dconv_layer"),
            "patch_size": [video[1] // image[1], side, side],
            # The factor by which the authors' own Latte scales the latents of four channels.
            "latents_std": [1 / 0.7744 if phi[0] == 4 else 1.0],
        }

    def _hash(self, counts: Callable[[str], bool]) -> str:
        """Of the range of pixels and the statistics too, on which latents depend."""
        settings = [self.pixel_range, self.latent_mean.tolist(), self.latent_std.tolist()]
        return hashlib.sha256(f"{super()._hash(counts)} {settings}".encode()).hexdigest()[:16]

    @apply_forward_hook
    def _encode(self, pixels: Tensor) -> Tensor:
        memory: Memory = {}
        x = pixels.to(self.dtype) * self.pixel_range
        tokens = [
            self.encoder(haar(part, _AXES[kind]), kind, memory)
            for kind, part in _parts(x, self.stride[0] * groups_at_once(pixels, cost=_COST))
        ]
        raw = self.latent_bottleneck.project(torch.cat(tokens, dim=1)).movedim(-1, 1).float()
        return (raw - _per_channel(self.latent_mean)) / _per_channel(self.latent_std)

    def _pixels(self, latents: Tensor, kind: str, memory: Memory) -> Tensor:
        raw = latents.float() * _per_channel(self.latent_std) + _per_channel(self.latent_mean)
        tokens = self.latent_bottleneck.recover(raw.to(self.dtype).movedim(1, -1), memory)
        return inverse_haar(self.decoder(tokens, kind, memory), _AXES[kind]) / self.pixel_range

    @apply_forward_hook
    def _decode(self, latents: Tensor) -> Tensor:
        memory: Memory = {}
        parts = _parts(latents, groups_at_once(latents, self.stride, cost=_COST))
        return torch.cat([self._pixels(part, kind, memory) for kind, part in parts], dim=2)

    @apply_forward_hook
    def decode_next(self, latents: Tensor, state: DecoderState | None = None) -> tuple[Tensor, DecoderState]:
        """Decode as `VideoVAE.decode_next`; the state is the input of every convolution over time."""
        memory = dict(state or {})
        return self._pixels(latents, "image" if state is None else "video", memory), memory


def _parts(x: Tensor, count: int) -> list[tuple[str, Tensor]]:
    """The first frame of x (B, C, T, h, w), and up to `count` others at a time, each with its kind."""
    rest = x[:, :, 1:].split(count, dim=2) if x.shape[2] > 1 else ()
    return [("image", x[:, :, :1]), *(("video", part) for part in rest)]


def _per_channel(values: Tensor) -> Tensor:
    """(C,) or (1,) -> a shape that broadcasts over latents (B, C, T, h, w)."""
    return values.float()[:, None, None, None]

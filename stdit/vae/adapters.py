"""Adapters from the autoencoders of diffusers to `VideoVAE`, with the normalisation that each of them defines."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from stdit import legacy
from stdit.files import read_json
from stdit.hub import check_reachable, resolve_source
from stdit.vae.base import DecoderState, VideoVAE
from stdit.vae.released import RELEASED, find_released, load_released
from stdit.vae.tiny import TinyVAE
from stdit.variants import pick
from stdit.weights import check_fits

# Frames of more pixels than this (1080p has 2.0, 720p 0.9 million) are coded in tiles, as diffusers' autoencoders do it.
TILED_PIXELS = 1024 * 1024
# An image VAE codes this many pixels at a time (64 frames of 512 x 512), since diffusers' takes all frames at once.
MOST_PIXELS = 64 * 512 * 512
# Clips of more pixels than this (256 frames of 512 x 512) are coded some frames after others by LTX's autoencoder, in
# tiles of so many frames that begin so many after each other; the other video autoencoders of diffusers do it anyway.
LONG_PIXELS = 256 * 512 * 512
TILE_FRAMES, TILE_STEP = 64, 48
_SWITCHES = ("use_tiling", "use_framewise_encoding", "use_framewise_decoding")
_FRAMES = {"tile_sample_min_num_frames": TILE_FRAMES, "tile_sample_stride_num_frames": TILE_STEP}
_SMALLEST_TILE = 256  # pixels; AutoencoderKL's tiles have the size that its config was trained at, which may be tiny

WEIGHTS = Path(__file__).parent / "weights"
# The classes that are no wrapped ones of diffusers.
OWN: dict[str, Any] = {"TinyVAE": TinyVAE, **RELEASED}


class VAESpec(NamedTuple):
    """How to use one autoencoder class of diffusers as a `VideoVAE`.

    The functions take the autoencoder. The flags are those of `VideoVAE`.
    """

    stride: Callable[[Any], tuple[int, int, int]]
    channels: Callable[[Any], int]
    statistics: Callable[[Any], tuple[Tensor, Tensor]]  # mean and std of raw latents, per channel or of size 1
    per_frame: bool = False  # an image VAE, which encodes every frame by itself
    causal: bool = True
    temporal_granularity: int = 0
    image_is_first_frame: bool = True
    temporal_tiles: bool = False  # whether long clips are coded in tiles in time only where that is switched on


def _scaling_statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Normalised latents are z * scaling_factor, or (z - shift_factor) * scaling_factor."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return torch.tensor([shift]), torch.tensor([1 / vae.config.scaling_factor])


def _wan_statistics(vae: Any) -> tuple[Tensor, Tensor]:
    return torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)


def _ltx_statistics(vae: Any) -> tuple[Tensor, Tensor]:
    return vae.latents_mean.detach().cpu(), vae.latents_std.detach().cpu() / vae.config.scaling_factor


def _wan_stride(vae: Any) -> tuple[int, int, int]:
    space = 2 ** (len(vae.config.dim_mult) - 1) * (vae.config.patch_size or 1)
    return 2 ** sum(vae.config.temperal_downsample), space, space


VAE_SPECS = {
    "AutoencoderKL": VAESpec(
        lambda v: (1, *(2 ** (len(v.config.block_out_channels) - 1),) * 2),
        lambda v: v.config.latent_channels,
        _scaling_statistics,
        per_frame=True,
    ),
    "AutoencoderKLWan": VAESpec(_wan_stride, lambda v: v.config.z_dim, _wan_statistics),
    "AutoencoderKLCogVideoX": VAESpec(
        lambda v: (int(v.config.temporal_compression_ratio), *(2 ** (len(v.config.block_out_channels) - 1),) * 2),
        lambda v: v.config.latent_channels,
        _scaling_statistics,
        causal=False,
        temporal_granularity=8,  # with an even number of latent frames it decodes a different number of frames
        image_is_first_frame=False,
    ),
    "AutoencoderKLHunyuanVideo": VAESpec(
        lambda v: (v.temporal_compression_ratio, v.spatial_compression_ratio, v.spatial_compression_ratio),
        lambda v: v.config.latent_channels,
        _scaling_statistics,
        causal=False,
        image_is_first_frame=False,
    ),
    "AutoencoderKLLTXVideo": VAESpec(
        lambda v: (v.temporal_compression_ratio, v.spatial_compression_ratio, v.spatial_compression_ratio),
        lambda v: v.config.latent_channels,
        _ltx_statistics,
        temporal_tiles=True,
    ),
}


class DiffusersVAE(VideoVAE):
    """A diffusers autoencoder as a `VideoVAE`; an image VAE is applied frame by frame."""

    vae: Any  # an nn.Module with the methods and the config of its class
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.name = type(vae).__name__
        spec = pick(VAE_SPECS, self.name, "VAE class")
        self.vae, self.spec = vae, spec
        self.stride, self.channels = spec.stride(vae), spec.channels(vae)
        self.causal, self.temporal_granularity = spec.causal, spec.temporal_granularity
        self.image_is_first_frame = spec.image_is_first_frame
        mean, std = spec.statistics(vae)
        self.register_buffer("latent_mean", mean.float(), persistent=False)
        self.register_buffer("latent_std", std.float(), persistent=False)

    has_posterior = True

    def _encode(self, pixels: Tensor) -> Tensor:
        (mean,) = self._encode_parts(pixels, "mean")
        return (mean.float() - _per_channel(self.latent_mean, mean)) / _per_channel(self.latent_std, mean)

    def _encode_moments(self, pixels: Tensor) -> Tensor:
        mean, std = self._encode_parts(pixels, "mean", "std")
        scale = _per_channel(self.latent_std, mean)
        return torch.cat([(mean.float() - _per_channel(self.latent_mean, mean)) / scale, std.float() / scale], dim=1)

    def _encode_parts(self, pixels: Tensor, *names: str) -> list[Tensor]:
        """Attributes of the posterior of pixels, as the VAE gives them."""
        batch, x = len(pixels), pixels.to(self.dtype)
        with self._tiled(pixels.shape[-3:]):
            if not self.spec.per_frame:
                found = self.vae.encode(x).latent_dist
                return [getattr(found, name) for name in names]
            frames = rearrange(x, "b c t h w -> (b t) c h w").split(_together(pixels.shape[-2:]))
            parts = [self.vae.encode(part).latent_dist for part in frames]
        raw = [torch.cat([getattr(part, name) for part in parts]) for name in names]
        return [rearrange(one, "(b t) c h w -> b c t h w", b=batch) for one in raw]

    @contextmanager
    def _tiled(self, size: Sequence[int]) -> Iterator[None]:
        """A context manager in which large frames and long clips are coded in tiles, or all if the user wants it.

        size: (F, H, W) of a clip, whose frames are large above `TILED_PIXELS`, and which is long above `LONG_PIXELS`.
        """
        before = {name: getattr(self.vae, name) for name in _SWITCHES if hasattr(self.vae, name)}
        if self.spec.temporal_tiles and math.prod(size) > LONG_PIXELS and not self.vae.use_framewise_decoding:
            before |= {name: getattr(self.vae, name) for name in _FRAMES}
            self.vae.use_framewise_encoding = self.vae.use_framewise_decoding = True
            for name, frames in _FRAMES.items():
                setattr(self.vae, name, frames)
        if size[-2] * size[-1] > TILED_PIXELS and not self.vae.use_tiling:
            if getattr(self.vae, "tile_sample_min_size", _SMALLEST_TILE) < _SMALLEST_TILE:
                self.vae.tile_sample_min_size = _SMALLEST_TILE
                self.vae.tile_latent_min_size = _SMALLEST_TILE // self.stride[1]
            self.vae.use_tiling = True
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self.vae, name, value)

    @property
    def resumable(self) -> bool:  # type: ignore[override]
        """Whether clips can be decoded frame by frame: those of an image VAE."""
        return self.spec.per_frame

    def decode_next(self, latents: Tensor, state: DecoderState | None = None) -> tuple[Tensor, DecoderState]:
        """Decode as `VideoVAE.decode_next`; an image VAE remembers nothing."""
        return (self.decode(latents), {}) if self.resumable else super().decode_next(latents, state)

    def _decode(self, latents: Tensor) -> Tensor:
        mean, std = _per_channel(self.latent_mean, latents), _per_channel(self.latent_std, latents)
        raw = (latents.float() * std + mean).to(self.dtype)
        size = (latents.shape[-2] * self.stride[1], latents.shape[-1] * self.stride[2])
        with self._tiled((self.pixel_frames(latents.shape[2]), *size)):
            if self.spec.per_frame:
                parts = rearrange(raw, "b c t h w -> (b t) c h w").split(_together(size))
                frames = torch.cat([self.vae.decode(part).sample for part in parts])
                return rearrange(frames, "(b t) c h w -> b c t h w", b=len(latents))
            decoded = self.vae.decode(raw).sample
        if decoded.shape[2] != self.pixel_frames(latents.shape[2]):
            raise ValueError(
                f"{self.name} decodes {latents.shape[2]} latent frames to {decoded.shape[2]} frames, not to "
                f"{self.pixel_frames(latents.shape[2])}; encode 1 + a multiple of {self.temporal_granularity or self.stride[0]} frames."
            )
        return decoded


def _together(size: Sequence[int]) -> int:
    """The number of frames of a size (H, W) that an image VAE codes at a time."""
    return max(1, MOST_PIXELS // (size[0] * size[1]))


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """(C,) or (1,) -> a shape that broadcasts over latents (B, C, T, h, w), on the device of `like`.

    A pipeline moves the autoencoder alone, without this wrapper of it and the statistics in it.
    """
    return values.to(like.device)[None, :, None, None, None]


def as_video_vae(vae: nn.Module) -> VideoVAE:
    """Wrap a diffusers autoencoder as a `VideoVAE`; a `VideoVAE` is returned unchanged."""
    return vae if isinstance(vae, VideoVAE) else DiffusersVAE(vae)


def load_vae(name: str, dtype: torch.dtype = torch.float32, *, key: str = "vae.name") -> VideoVAE:
    """Load a VAE by name: "tiny", a folder with weights of a diffusers class, TAEHV's or LeanVAE's weights, or a hub id.

    TAEHV's and LeanVAE's are a .safetensors file, or the folder in which it lies alone. A hub id is "owner/name" or "owner/name/subfolder", optionally with "@revision". The network is used for a hub id
    only, and only if no folder of that name exists. The VAE is frozen and in evaluation mode. Raises ValueError with a
    message of one line if it cannot be loaded, which names `key` as the setting that gave the name.
    """
    if name == "tiny":
        return TinyVAE.from_pretrained(WEIGHTS, torch_dtype=dtype, use_safetensors=True).eval().requires_grad_(False)
    if (file := find_released(name)) is not None:
        return load_released(file, name, dtype).eval().requires_grad_(False)
    source, options = resolve_source(name, key)
    vae = _from_diffusers(source, options, name, dtype=dtype, key=key)
    return as_video_vae(vae).eval().requires_grad_(False)


def _from_diffusers(source: str, options: dict[str, Any], name: str, *, dtype: torch.dtype, key: str) -> nn.Module:
    """Load the autoencoder of a folder or hub id as the class that its config names."""
    import diffusers

    remedy = f"{key}=tiny works without any download"
    try:
        check_reachable(source, "config.json", options)
        read_json(Path(source) / "config.json")  # bounded, as diffusers' reading is not
        config = diffusers.AutoencoderKL.load_config(source, **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"VAE {name!r} was not found and cannot be fetched ({reason}); {remedy}.") from error
    class_name = str(config.get("_class_name", "unknown"))
    if class_name not in OWN:
        pick(VAE_SPECS, class_name, "VAE class")
    cls: Any = OWN.get(class_name) or getattr(diffusers, class_name)
    check_fits(Path(source), lambda: cls.from_config(config))
    try:
        return cls.from_pretrained(source, torch_dtype=dtype, use_safetensors=True, **options)
    except OSError as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"the weights of VAE {name!r} cannot be loaded ({reason}); {remedy}.") from error


__getattr__ = legacy.aliases(__name__)

"""diffusers' autoencoders behind stdit's contract, each with its own normalisation."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from stdit.hub import check_reachable, resolve_source
from stdit.vae.base import VideoVAE, each_frame
from stdit.vae.tiny import TinyVAE
from stdit.variants import pick

WEIGHTS = Path(__file__).parent / "weights"


class Kind(NamedTuple):
    """What stdit must know of one diffusers class; the functions take the autoencoder."""

    stride: Callable[[Any], tuple[int, int, int]]
    channels: Callable[[Any], int]
    statistics: Callable[[Any], tuple[Tensor, Tensor]]  # mean and std of raw latents, per channel or one
    per_frame: bool = False
    causal: bool = True
    temporal_granularity: int = 0
    image_is_first_frame: bool = True


def _scaling(vae: nn.Module) -> tuple[Tensor, Tensor]:
    """z * scaling_factor, or (z - shift_factor) * scaling_factor."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return torch.tensor([shift]), torch.tensor([1 / vae.config.scaling_factor])


def _wan_statistics(vae: nn.Module) -> tuple[Tensor, Tensor]:
    return torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)


def _ltx_statistics(vae: nn.Module) -> tuple[Tensor, Tensor]:
    return vae.latents_mean.detach().cpu(), vae.latents_std.detach().cpu() / vae.config.scaling_factor


def _wan_stride(vae: nn.Module) -> tuple[int, int, int]:
    space = 2 ** (len(vae.config.dim_mult) - 1) * (vae.config.patch_size or 1)
    return 2 ** sum(vae.config.temperal_downsample), space, space


VAE_SPECS = {
    "AutoencoderKL": Kind(
        lambda v: (1, *(2 ** (len(v.config.block_out_channels) - 1),) * 2),
        lambda v: v.config.latent_channels,
        _scaling,
        per_frame=True,
    ),
    "AutoencoderKLWan": Kind(_wan_stride, lambda v: v.config.z_dim, _wan_statistics),
    "AutoencoderKLCogVideoX": Kind(
        lambda v: (int(v.config.temporal_compression_ratio), *(2 ** (len(v.config.block_out_channels) - 1),) * 2),
        lambda v: v.config.latent_channels,
        _scaling,
        causal=False,
        temporal_granularity=8,  # an even number of latent frames decodes to other frames than were encoded
        image_is_first_frame=False,
    ),
    "AutoencoderKLHunyuanVideo": Kind(
        lambda v: (v.temporal_compression_ratio, v.spatial_compression_ratio, v.spatial_compression_ratio),
        lambda v: v.config.latent_channels,
        _scaling,
        causal=False,
        image_is_first_frame=False,
    ),
    "AutoencoderKLLTXVideo": Kind(
        lambda v: (v.temporal_compression_ratio, v.spatial_compression_ratio, v.spatial_compression_ratio),
        lambda v: v.config.latent_channels,
        _ltx_statistics,
    ),
}


class DiffusersVAE(VideoVAE):
    """A diffusers autoencoder as a `VideoVAE`. One that knows images only runs frame by frame."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.name = type(vae).__name__
        kind = pick(VAE_SPECS, self.name, "VAE class")
        self.vae, self.kind = vae, kind
        self.stride, self.channels = kind.stride(vae), kind.channels(vae)
        self.causal, self.temporal_granularity, self.image_is_first_frame = (
            kind.causal,
            kind.temporal_granularity,
            kind.image_is_first_frame,
        )
        mean, std = kind.statistics(vae)
        self.register_buffer("latent_mean", mean.float(), persistent=False)
        self.register_buffer("latent_std", std.float(), persistent=False)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def _encode(self, pixels: Tensor) -> Tensor:
        batch, x = len(pixels), pixels.to(self.dtype)
        if self.kind.per_frame:
            raw = self.vae.encode(rearrange(x, "b c t h w -> (b t) c h w")).latent_dist.mode()
            raw = rearrange(raw, "(b t) c h w -> b c t h w", b=batch)
        else:
            raw = self.vae.encode(x).latent_dist.mode()
        return (raw.float() - _channels(self.latent_mean)) / _channels(self.latent_std)

    def decode_stream(self, latents: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        if not self.kind.per_frame:
            yield from super().decode_stream(latents)
            return
        for frame in each_frame(latents):
            yield self.decode(frame)

    def _decode(self, latents: Tensor) -> Tensor:
        raw = (latents.float() * _channels(self.latent_std) + _channels(self.latent_mean)).to(self.dtype)
        if self.kind.per_frame:
            frames = self.vae.decode(rearrange(raw, "b c t h w -> (b t) c h w")).sample
            return rearrange(frames, "(b t) c h w -> b c t h w", b=len(latents))
        decoded = self.vae.decode(raw).sample
        if decoded.shape[2] != self.pixel_frames(latents.shape[2]):
            raise ValueError(
                f"{self.name} decodes {latents.shape[2]} latent frames to {decoded.shape[2]} pictures, not to "
                f"{self.pixel_frames(latents.shape[2])}; encode 1 + a multiple of {self.temporal_granularity or self.stride[0]} frames."
            )
        return decoded


def _channels(values: Tensor) -> Tensor:
    return values[None, :, None, None, None]


def as_video_vae(vae: nn.Module) -> VideoVAE:
    """Any known autoencoder as a `VideoVAE` (itself, if it is one)."""
    return vae if isinstance(vae, VideoVAE) else DiffusersVAE(vae)


def load_vae(name: str, dtype: torch.dtype = torch.float32) -> VideoVAE:
    """The VAE of a name: "tiny", a folder of diffusers weights, or a hub id.

    A hub id is "owner/name", "owner/name/subfolder", with "@revision" if wanted; it is the only thing that reaches for
    the network, and only if no such folder exists. Frozen, in evaluation mode. ValueError in one line otherwise.
    """
    if name == "tiny":
        return TinyVAE.from_pretrained(WEIGHTS, torch_dtype=dtype, use_safetensors=True).eval().requires_grad_(False)
    source, options = resolve_source(name, "vae.name")
    vae = _from_diffusers(source, options, name, dtype)
    return as_video_vae(vae).eval().requires_grad_(False)


def _from_diffusers(source: str, options: dict, name: str, dtype: torch.dtype) -> nn.Module:
    import diffusers

    offline = "vae.name=tiny works without any download"
    try:
        check_reachable(source, "config.json", options)
        config = diffusers.AutoencoderKL.load_config(source, **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"The VAE {name!r} is not here and cannot be fetched ({reason}); {offline}.") from error
    kind = config.get("_class_name", "unknown")
    if kind == "TinyVAE":
        return TinyVAE.from_pretrained(source, torch_dtype=dtype, use_safetensors=True, **options)
    pick(VAE_SPECS, kind, "VAE class")
    try:
        return getattr(diffusers, kind).from_pretrained(source, torch_dtype=dtype, use_safetensors=True, **options)
    except OSError as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"The weights of VAE {name!r} cannot be loaded ({reason}); {offline}.") from error

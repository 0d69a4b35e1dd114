"""The interface of every video VAE, from pixels to normalised latents and back, and the arithmetic of their shapes."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stdit import legacy

# Parts of the names of weights that only decode: latents do not depend on them, so they may be trained further.
_DECODER = {"decoder", "post_quant_conv"}
# Fingerprints of version 0.1.0 that covered a decoder which ships no more, and what the same encoder has now.
_WITH_EARLIER_DECODER = {"a980c6890d92b274": "6925f4ce8261ee80"}


DecoderState = Mapping[Any, Tensor]  # what a decoder remembers of the frames before


class VAEGeometry:
    """The shapes of a video VAE's latents, without its weights.

    A clip is one first frame followed by groups of `stride[0]` frames; each group, and the first frame alone, is one
    latent frame. stride: pixels per latent in (time, height, width). temporal_granularity: clips have
    1 + k * temporal_granularity frames; 0 means the temporal stride.
    """

    name: str = "vae"
    stride: tuple[int, int, int]
    channels: int
    temporal_granularity: int = 0

    def __init__(self, name: str, stride: tuple[int, int, int], channels: int, temporal_granularity: int = 0):
        self.name, self.stride, self.channels = name, stride, channels
        self.temporal_granularity = temporal_granularity

    def latent_frames(self, num_frames: int) -> int:
        """The number of latent frames of `num_frames` pixel frames; ValueError with the nearest counts that fit."""
        stride, step = self.stride[0], self.temporal_granularity or self.stride[0]
        if num_frames < 1:
            raise ValueError(f"num_frames must be >= 1, got num_frames={num_frames}; use 1 for an image.")
        if (num_frames - 1) % step:
            lower = (num_frames - 1) // step * step + 1
            raise ValueError(
                f"num_frames={num_frames} does not fit VAE {self.name!r} of temporal stride {stride}: it needs "
                f"1 + a multiple of {step}. Use {lower} or {lower + step}."
            )
        return (num_frames - 1) // stride + 1

    def pixel_frames(self, latent_frames: int) -> int:
        """The number of pixel frames that `latent_frames` decode to."""
        return self.stride[0] * (latent_frames - 1) + 1

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """The size (h, w) of the latents of (H, W) pixels; ValueError with the nearest sizes that fit."""
        for name, value, stride in (("height", height, self.stride[1]), ("width", width, self.stride[2])):
            if value < 1 or value % stride:
                lower = max(stride, value // stride * stride)
                upper = lower if value < stride else lower + stride
                choice = f"{lower}" if lower == upper else f"{lower} or {upper}"
                raise ValueError(
                    f"{name}={value} does not fit VAE {self.name!r}: it needs a multiple of {stride}. Use {choice}."
                )
        return height // self.stride[1], width // self.stride[2]

    def latent_shape(
        self, num_frames: int, height: int, width: int, patch: tuple[int, int, int] = (1, 1, 1)
    ) -> tuple[int, int, int]:
        """The shape (T, h, w) of a clip's latents; ValueError with the nearest values that fit.

        patch: the model's patch size, by which T, h and w must be divisible.
        """
        shape = (self.latent_frames(num_frames), *self.latent_size(height, width))
        requested = (num_frames, height, width)
        for i, name in enumerate(("num_frames", "height", "width")):
            if shape[i] % patch[i]:
                lower, upper = shape[i] // patch[i] * patch[i], -(-shape[i] // patch[i]) * patch[i]
                fits = [self.pixel_frames(n) if i == 0 else n * self.stride[i] for n in (lower, upper) if n]
                raise ValueError(
                    f"{name}={requested[i]} gives {shape[i]} latents, which patches of {patch[i]} do not divide. "
                    f"Use {' or '.join(map(str, fits))}."
                )
        return shape


class VideoVAE(nn.Module, VAEGeometry, ABC):
    """A video VAE, which maps pixels (B, 3, F, H, W) in [-1, 1] to latents (B, C, T, h, w) and back.

    Latents are normalised to about zero mean and unit variance per channel on natural clips. A subclass sets `stride`
    and `channels` and implements `_encode` and `_decode`; its shapes are those of `VAEGeometry`.
    """

    causal: bool = True  # no latent frame depends on later pixels
    resumable: bool = False  # clips can be decoded frame by frame: `decode_next`
    reentrant: bool = False  # several threads can encode at a time
    has_posterior: bool = False  # a clip has a distribution of latents: `encode_moments`
    image_is_first_frame: bool = True  # encode(clip[:, :, :1]) equals encode(clip)[:, :, :1]

    @property
    def device(self) -> torch.device:
        """The device of the weights, to which pixels and latents must be moved."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the weights, which pixels and latents must have."""
        return next(self.parameters()).dtype

    @abstractmethod
    def _encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels whose shape `encode` has checked."""

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor:
        """Decode latents whose shape `decode` has checked."""

    def _encode_moments(self, pixels: Tensor) -> Tensor:
        """Encode pixels whose shape `encode_moments` has checked; of VAEs with `has_posterior`."""
        raise ValueError(f"VAE {self.name!r} has no posterior, one clip has one latent; use its mean: `encode`.")

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, F, H, W) in [-1, 1] to normalised latents (B, C, T, h, w), the mean of the posterior.

        Raises ValueError for a frame count or a size that the VAE would crop.
        """
        self._check_pixels(pixels)
        return self._encode(pixels)

    def encode_moments(self, pixels: Tensor) -> Tensor:
        """Encode pixels as `encode`, to mean and standard deviation of the posterior (B, 2 C, T, h, w), both normalised.

        Raises ValueError also for a VAE without a posterior (`has_posterior`).
        """
        self._check_pixels(pixels)
        return self._encode_moments(pixels)

    def _check_pixels(self, pixels: Tensor) -> None:
        if pixels.ndim != 5 or pixels.shape[1] != 3:
            raise ValueError(
                f"encode got a tensor of shape {tuple(pixels.shape)}: pixels are (B, 3, F, H, W); "
                "give an image as one frame, (B, 3, 1, H, W)."
            )
        self.latent_frames(pixels.shape[2])
        self.latent_size(*pixels.shape[3:])

    def encode_segment(self, pixels: Tensor, *, moments: bool = False) -> Tensor:
        """Encode a segment from the middle of a clip independently of the frames before it.

        pixels: (B, 3, n * stride[0], H, W), whole groups -> (B, C, n, h, w). The segment's first frame is repeated in
        front as the start of a clip, and the latent of that copy is dropped. Training encodes known frames in the same
        way. moments: by `encode_moments`.
        """
        groups = pixels.shape[2] // self.stride[0]
        padding = -pixels.shape[2] % (self.temporal_granularity or self.stride[0])
        pixels = torch.cat([pixels[:, :, :1], pixels, pixels[:, :, -1:].expand(-1, -1, padding, -1, -1)], dim=2)
        return (self.encode_moments if moments else self.encode)(pixels)[:, :, 1 : 1 + groups]

    def frames_of_latent(self, pixels: Tensor, latent_frame: int) -> Tensor:
        """The frames (B, 3, f, H, W) of `pixels` that one latent frame encodes: f = 1 for the first, else `stride[0]`."""
        end = self.pixel_frames(latent_frame + 1)
        return pixels[:, :, max(0, end - self.stride[0]) : end]

    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents (B, C, T, h, w) to pixels (B, 3, F, H, W) in about [-1, 1]."""
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise ValueError(
                f"decode got a tensor of shape {tuple(latents.shape)}: the latents of VAE {self.name!r} are "
                f"(B, {self.channels}, T, h, w); use latents encoded by this VAE."
            )
        return self._decode(latents)

    def decode_next(self, latents: Tensor, state: DecoderState | None = None) -> tuple[Tensor, DecoderState]:
        """Decode the next latent frame (B, C, 1, h, w) of a clip to its pixels (B, 3, f, H, W).

        state: what the call before it returned, None for the first frame of a clip; it is not changed, so that two clips can
        go on from one. ValueError if the decoder cannot be resumed between frames (`resumable`).
        """
        raise ValueError(
            f"VAE {self.name!r} decodes whole clips only; use a VAE whose decoder is causal, such as tiny."
        )

    def decode_stream(self, latents: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode group by group: yield pixels (B, 3, f, H, W), first 1 frame, then `stride[0]` at a time.

        latents: (B, C, T, h, w), or an iterable of its frames (B, C, 1, h, w). A VAE whose decoder cannot be resumed
        between groups yields the whole clip once, at the end.
        """
        if not self.resumable:
            yield self.decode(torch.cat(list(_split_frames(latents)), dim=2))
            return
        state = None
        for frame in _split_frames(latents):
            pixels, state = self.decode_next(frame, state)
            yield pixels

    def fingerprint(self) -> str:
        """A hash of all that makes the latents, 16 hexadecimal digits: of class name and weights but for the decoder's."""
        return self._hash(lambda key: _DECODER.isdisjoint(key.split(".")))

    def has_fingerprint(self, value: str) -> bool:
        """Whether a recorded fingerprint is that of this VAE; before version 0.2 it covered the decoder too."""
        own = self.fingerprint()
        return value in (own, self._hash(lambda key: True)) or _WITH_EARLIER_DECODER.get(value) == own

    def _hash(self, counts: Callable[[str], bool]) -> str:
        digest = hashlib.sha256(type(self).__name__.encode())
        for key, value in sorted(self.state_dict().items()):
            if counts(key):
                digest.update(key.encode() + str(tuple(value.shape)).encode())
                digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def _split_frames(latents: Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    """Split latents (B, C, T, h, w) into frames (B, C, 1, h, w); an iterable of such frames is returned unchanged."""
    return latents.split(1, dim=2) if isinstance(latents, Tensor) else latents


__getattr__ = legacy.aliases(__name__)

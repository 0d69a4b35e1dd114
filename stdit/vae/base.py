"""The contract every video VAE keeps: pixels to normalised latents and back, and the arithmetic of both."""

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


class VideoVAE(nn.Module):
    """A video VAE behind one face: pixels (B, 3, F, H, W) in [-1, 1] <-> latents (B, C, T, h, w).

    Latents are normalised: about zero mean and unit variance per channel on natural clips. A clip is one first
    frame followed by whole groups of `stride[0]` frames; `causal`: no latent frame depends on later pixels.
    """

    stride: tuple[int, int, int]
    channels: int
    causal: bool = True
    temporal_granularity: int = 0  # frames come 1 + k * temporal_granularity; 0: the temporal stride
    image_is_first_frame: bool = True  # encode(clip[:, :, :1]) is encode(clip)[:, :, :1]
    name: str = "vae"

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the weights."""
        return next(self.parameters()).dtype

    @abstractmethod
    def _encode(self, pixels: Tensor) -> Tensor: ...

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor: ...

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, F, H, W) pixels in [-1, 1] -> (B, C, T, h, w) normalised latents (the posterior's mean).

        Raises ValueError for a frame count or a size that the VAE would crop.
        """
        if pixels.ndim != 5 or pixels.shape[1] != 3:
            raise ValueError(
                f"encode got a tensor of shape {tuple(pixels.shape)}: pixels are (B, 3, F, H, W); "
                "give an image as one frame, (B, 3, 1, H, W)."
            )
        self.latent_frames(pixels.shape[2])
        self.latent_size(*pixels.shape[3:])
        return self._encode(pixels)

    def encode_segment(self, pixels: Tensor) -> Tensor:
        """(B, 3, n * stride[0], H, W), whole groups from inside a clip -> (B, C, n, h, w), whatever came before them.

        They are encoded behind their repeated first frame, which then is left out. Training sees known frames so too.
        """
        groups = pixels.shape[2] // self.stride[0]
        missing = -pixels.shape[2] % (self.temporal_granularity or self.stride[0])
        pixels = torch.cat([pixels[:, :, :1], pixels, pixels[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
        return self.encode(pixels)[:, :, 1 : 1 + groups]

    def group(self, pixels: Tensor, latent_frame: int) -> Tensor:
        """The pixel frames (B, 3, f, H, W) that a latent frame holds."""
        end = self.pixel_frames(latent_frame + 1)
        return pixels[:, :, max(0, end - self.stride[0]) : end]

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, T, h, w) normalised latents -> (B, 3, F, H, W) pixels, about [-1, 1]."""
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise ValueError(
                f"decode got a tensor of shape {tuple(latents.shape)}: the latents of VAE {self.name!r} are "
                f"(B, {self.channels}, T, h, w); use latents encoded by this VAE."
            )
        return self._decode(latents)

    def decode_stream(self, latents: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode group by group: yields (B, 3, f, H, W), first 1 frame, then `stride[0]` at a time.

        latents: (B, C, T, h, w), or its frames (B, C, 1, h, w) as they come. A VAE whose decoder cannot go on where it
        stopped yields everything at once, at the end.
        """
        yield self.decode(torch.cat(list(each_frame(latents)), dim=2))

    def latent_frames(self, num_frames: int) -> int:
        """How many latent frames hold `num_frames` pixel frames; ValueError with the nearest that fit."""
        stride, step = self.stride[0], self.temporal_granularity or self.stride[0]
        if num_frames < 1:
            raise ValueError(f"num_frames={num_frames} is not a clip: use 1 for an image or more for a video.")
        if (num_frames - 1) % step:
            lower = (num_frames - 1) // step * step + 1
            raise ValueError(
                f"num_frames={num_frames} does not fit VAE {self.name!r} of temporal stride {stride}: it needs "
                f"1 + a multiple of {step}. Use {lower} or {lower + step}."
            )
        return (num_frames - 1) // stride + 1

    def pixel_frames(self, latent_frames: int) -> int:
        """How many pixel frames `latent_frames` decode to."""
        return self.stride[0] * (latent_frames - 1) + 1

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) pixels -> (h, w) latents; ValueError with the nearest sizes that divide."""
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
        """(T, h, w) of a clip's latents; ValueError, with what fits, if VAE or patches cannot hold it."""
        shape = (self.latent_frames(num_frames), *self.latent_size(height, width))
        asked, strides = (num_frames, height, width), self.stride
        for i, name in enumerate(("num_frames", "height", "width")):
            if shape[i] % patch[i]:
                lower, upper = shape[i] // patch[i] * patch[i], -(-shape[i] // patch[i]) * patch[i]
                fits = [self.pixel_frames(n) if i == 0 else n * strides[i] for n in (lower, upper) if n]
                raise ValueError(
                    f"{name}={asked[i]} gives {shape[i]} latents, which patches of {patch[i]} do not divide. "
                    f"Use {' or '.join(map(str, fits))}."
                )
        return shape

    def fingerprint(self) -> str:
        """What latents depend on: class, configuration and weights, in 16 hexadecimal digits."""
        digest = hashlib.sha256(type(self).__name__.encode())
        for key, value in sorted(self.state_dict().items()):
            digest.update(key.encode() + str(tuple(value.shape)).encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def each_frame(latents: Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    """Latents (B, C, T, h, w), or what already comes frame by frame, as frames (B, C, 1, h, w)."""
    return latents.split(1, dim=2) if isinstance(latents, Tensor) else latents

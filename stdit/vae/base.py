"""The contract every video VAE keeps: pixels to normalised latents and back, and the arithmetic of both."""

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class VideoVAE(nn.Module):
    """A video VAE behind one face: pixels (B, 3, F, H, W) in [-1, 1] <-> latents (B, C, T, h, w).

    Latents are normalised: about zero mean and unit variance per channel on natural clips.
    `causal` says that a clip is one first frame followed by whole groups of `stride[0]` frames (1 + k * stride),
    and that its first frame alone gives the first latent frame.
    """

    stride: tuple[int, int, int]
    channels: int
    causal: bool = True
    name: str = "vae"

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

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, T, h, w) normalised latents -> (B, 3, F, H, W) pixels, about [-1, 1]."""
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise ValueError(
                f"decode got a tensor of shape {tuple(latents.shape)}: the latents of VAE {self.name!r} are "
                f"(B, {self.channels}, T, h, w); use latents encoded by this VAE."
            )
        return self._decode(latents)

    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode group by group: yields (B, 3, f, H, W), first 1 frame, then `stride[0]` at a time.

        A VAE whose decoder is not causal yields everything at once.
        """
        yield self.decode(latents)

    def latent_frames(self, num_frames: int) -> int:
        """How many latent frames hold `num_frames` pixel frames; ValueError with the nearest that fit."""
        stride = self.stride[0]
        if num_frames < 1:
            raise ValueError(f"num_frames={num_frames} is not a clip: use 1 for an image or more for a video.")
        if not self.causal:
            if num_frames % stride:
                lower = num_frames // stride * stride
                raise ValueError(self._frames_message(num_frames, f"a multiple of {stride}", lower or stride))
            return num_frames // stride
        if (num_frames - 1) % stride:
            lower = (num_frames - 1) // stride * stride + 1
            raise ValueError(self._frames_message(num_frames, f"1 + a multiple of {stride}", lower))
        return (num_frames - 1) // stride + 1

    def _frames_message(self, num_frames: int, needed: str, lower: int) -> str:
        return (
            f"num_frames={num_frames} does not fit VAE {self.name!r} of temporal stride {self.stride[0]}: it needs "
            f"{needed}. Use {lower} or {lower + self.stride[0]}."
        )

    def pixel_frames(self, latent_frames: int) -> int:
        """How many pixel frames `latent_frames` decode to."""
        return self.stride[0] * (latent_frames - 1) + 1 if self.causal else self.stride[0] * latent_frames

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

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

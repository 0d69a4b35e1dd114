"""Converts latents to tokens and back."""

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor

Patch = tuple[int, int, int]


def patchify(x: Tensor, patch: Patch) -> Tensor:
    """Split latents (B, C, T*pt, H*ph, W*pw) into tokens (B, T, H*W, C*pt*ph*pw), channel-first inside a patch."""
    pt, ph, pw = patch
    return rearrange(x, "b c (t pt) (h ph) (w pw) -> b t (h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)


def unpatchify(x: Tensor, patch: Patch, height: int) -> Tensor:
    """Join tokens (B, T, H*W, pt*ph*pw*C) to latents (B, C, T*pt, H*ph, W*pw); `height` is H in patches.

    Inside a patch DiT's final layer is channel-last, unlike its embedding; its released weights depend on it.
    """
    pt, ph, pw = patch
    return rearrange(x, "b t (h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)", h=height, pt=pt, ph=ph, pw=pw)


def token_grid(shape: Sequence[int], patch: Patch) -> tuple[int, int, int]:
    """Size (T, H, W) of a latent in patches; ValueError with the nearest valid size if one does not divide."""
    for name, value, size in zip(("frames", "height", "width"), shape, patch, strict=True):
        if value < 1 or value % size:
            nearest = max(size, round(value / size) * size)
            raise ValueError(
                f"latent {name}={value} does not divide into patches of {size} (patch_size={tuple(patch)}). "
                f"Use {nearest}, or another patch size."
            )
    return shape[0] // patch[0], shape[1] // patch[1], shape[2] // patch[2]

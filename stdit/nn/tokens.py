"""Latents to tokens and back."""

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor

Patch = tuple[int, int, int]


def patchify(x: Tensor, patch: Patch) -> Tensor:
    """(B, C, T*pt, H*ph, W*pw) latents -> (B, T, H*W, C*pt*ph*pw) tokens, channel-first inside a patch."""
    pt, ph, pw = patch
    return rearrange(x, "b c (t pt) (h ph) (w pw) -> b t (h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)


def unpatchify(x: Tensor, patch: Patch, height: int) -> Tensor:
    """(B, T, H*W, pt*ph*pw*C) -> (B, C, T*pt, H*ph, W*pw); `height` is H in patches.

    DiT's head is channel-last inside a patch, unlike its embedding, and so are its released weights.
    """
    pt, ph, pw = patch
    return rearrange(x, "b t (h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)", h=height, pt=pt, ph=ph, pw=pw)


def token_grid(shape: Sequence[int], patch: Patch) -> tuple[int, int, int]:
    """(T, H, W) of a latent in patches; ValueError naming the nearest size where one does not divide."""
    for name, value, size in zip(("frames", "height", "width"), shape, patch, strict=True):
        if value < 1 or value % size:
            nearest = max(size, round(value / size) * size)
            raise ValueError(
                f"latent {name}={value} does not divide into patches of {size} (patch_size={tuple(patch)}). "
                f"Use {nearest}, or another patch size."
            )
    return shape[0] // patch[0], shape[1] // patch[1], shape[2] // patch[2]

"""Clips against their originals: PSNR and SSIM."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def psnr(made: Tensor, original: Tensor) -> float:
    """Peak signal-to-noise ratio of all pixels together, in dB; pixels in [-1, 1]."""
    return decibel((made.float() - original.float()).square().mean())


def decibel(mean_square: Tensor) -> float:
    return 10 * math.log10(4 / max(float(mean_square), 1e-12))


def ssim(made: Tensor, original: Tensor) -> float:
    """Structural similarity, mean over frames: (B, 3, F, H, W) in [-1, 1], Gaussian window of 11 pixels, sigma 1.5.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity". ValueError for frames smaller than the window.
    """
    if min(made.shape[3:]) < 11:
        raise ValueError(f"frames of {made.shape[3]} x {made.shape[4]} are smaller than SSIM's window of 11 pixels.")
    x, y = ((clip.double().transpose(1, 2).flatten(0, 1) + 1) / 2 for clip in (made, original))
    taps = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = torch.outer(taps, taps) / taps.sum() ** 2

    def blur(images: Tensor) -> Tensor:
        return F.conv2d(images, window.to(images.device).expand(images.shape[1], 1, 11, 11), groups=images.shape[1])

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    shared = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2  # for intensities from 0 to 1
    score = (2 * mean_x * mean_y + c1) * (2 * shared + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(score.mean())

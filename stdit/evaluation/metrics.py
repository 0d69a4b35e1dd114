"""PSNR and SSIM of clips against their originals."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def psnr(generated: Tensor, original: Tensor) -> float:
    """The peak signal-to-noise ratio of all pixels together, in dB; pixels in [-1, 1]."""
    return decibel((generated.float() - original.float()).square().mean())


def squared_errors(generated: Tensor, original: Tensor) -> Tensor:
    """The mean squared error (B,) of each clip; pixels (B, ...)."""
    return (generated.float() - original.float()).square().flatten(1).mean(1)


def decibel(mean_square: Tensor) -> float:
    """The PSNR, in dB, of a mean squared error; the peak-to-peak range of [-1, 1] is 2."""
    return 10 * math.log10(4 / max(float(mean_square), 1e-12))  # equal clips: 126 dB, not infinity


def ssim(generated: Tensor, original: Tensor) -> float:
    """The mean structural similarity (SSIM) of frames, with a Gaussian window of 11 pixels and sigma 1.5.

    Both clips are (B, 3, F, H, W) in [-1, 1]. Wang et al., "Image Quality Assessment: From Error Visibility to
    Structural Similarity". Raises ValueError for frames smaller than the window.
    """
    if min(generated.shape[3:]) < 11:
        raise ValueError(
            f"frames of {generated.shape[3]} x {generated.shape[4]} are smaller than SSIM's window of 11 pixels; use larger ones."
        )
    x, y = ((clip.double().transpose(1, 2).flatten(0, 1) + 1) / 2 for clip in (generated, original))
    taps = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = torch.outer(taps, taps) / taps.sum() ** 2

    def blur(images: Tensor) -> Tensor:
        return F.conv2d(images, window.to(images.device).expand(images.shape[1], 1, 11, 11), groups=images.shape[1])

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    shared = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2  # of the paper, for intensities from 0 to 1
    score = (2 * mean_x * mean_y + c1) * (2 * shared + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(score.mean())

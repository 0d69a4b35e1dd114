"""The variational bound that trains the variance (Nichol and Dhariwal, "Improved DDPM"; DiT's L_vlb)."""

import math

import torch
from torch import Tensor

from stdit.diffusion.paths import Path, like
from stdit.diffusion.predictions import Estimate
from stdit.precision import wide


def posterior(path: Path, x: Tensor, clean: Tensor, now: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of q(x_after | x_now, clean) for after < now, and the largest sensible variance.

    All (B, C, T, h, w) or broadcastable, in `wide` precision. For DDPM the largest is beta. Where after is 0 the variance is 0.
    """
    alpha, sigma = path.alpha_sigma(wide(like(now, x)))
    alpha_after, sigma_after = path.alpha_sigma(wide(like(after, x)))
    ratio = alpha / alpha_after
    largest = sigma**2 - ratio**2 * sigma_after**2
    safe = (sigma**2).clamp(min=1e-20)
    mean = (ratio * sigma_after**2 / safe) * wide(x) + (alpha_after * largest / safe) * wide(clean)
    return mean, largest * sigma_after**2 / safe, largest


def learned_log_variance(variance: Tensor, smallest: Tensor, largest: Tensor) -> Tensor:
    """Interpolate log variances: at -1 the smallest (the posterior's), at 1 the largest (beta)."""
    fraction = (wide(variance) + 1) / 2
    return fraction * largest.log() + (1 - fraction) * smallest.log()


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL divergence between two diagonal normals, in nats."""
    difference = log_variance2 - log_variance1
    return 0.5 * (difference - 1 + (-difference).exp() + (mean1 - mean2) ** 2 * (-log_variance2).exp())


def discretized_normal_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """Log-likelihood of data in [-1, 1] quantized to 256 values, in nats."""
    inverse = (-log_scales).exp()
    upper = _cdf(inverse * (x - means + 1 / 255))
    lower = _cdf(inverse * (x - means - 1 / 255))
    middle = (upper - lower).clamp(min=1e-12).log()
    edge = torch.where(x > 0.999, (1 - lower).clamp(min=1e-12).log(), middle)
    return torch.where(x < -0.999, upper.clamp(min=1e-12).log(), edge)


def _cdf(x: Tensor) -> Tensor:
    # The tanh approximation in which DiT's loss is defined.
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def variational_bound(
    path: Path, x: Tensor, clean: Tensor, estimate: Estimate, levels: Tensor, one_step: float
) -> Tensor:
    """One term of the bound in bits per element, (B, C, T, h, w): KL to the posterior; at the last step the likelihood.

    estimate: an `Estimate` with variance. levels: (B, T). one_step: the distance of neighbouring levels.
    """
    after = (levels - one_step).clamp(min=0)
    true_mean, true_variance, largest = posterior(path, x, clean, now=levels, after=after)
    mean = posterior(path, x, estimate.clean, now=levels, after=after)[0]
    # The posterior of the last step has variance 0; the next step's is used instead, as in DiT.
    _, floor, _ = posterior(path, x[:1, :1, :1, :1, :1], x[:1, :1, :1, :1, :1], *_second_step(one_step, x.device))
    smallest = torch.where(like(after, x) > 0, true_variance, floor)
    # Known frames, at level 0, have no loss, but the logarithm of 0 would make the gradient of all others not finite.
    largest = torch.where(like(levels, x) > 0, largest, floor)
    assert estimate.variance is not None
    log_variance = learned_log_variance(estimate.variance, smallest, largest)
    kl = normal_kl(true_mean, smallest.log(), mean, log_variance)
    likelihood = -discretized_normal_log_likelihood(wide(clean), mean, 0.5 * log_variance)
    return torch.where(like(after, x) > 0, kl, likelihood) / math.log(2)


def _second_step(one_step: float, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor([[2 * one_step]], device=device), torch.tensor([[one_step]], device=device)

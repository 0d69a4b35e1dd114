"""Fréchet and kernel distances between distributions of features, such as FID and KID, FVD and KVD."""

from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch
from torch import Tensor


@dataclass
class Gaussian:
    """Mean and covariance of features (N, D), accumulated in parts as float64 sums that merge over processes.

    Sums are relative to the first feature (`origin`), so that a large mean costs no precision.
    """

    count: int = 0
    origin: Tensor | None = None
    total: Tensor | None = None
    outer: Tensor | None = None

    def add(self, features: Tensor) -> Self:
        """Accumulate features (N, D); ValueError for numbers that are not finite."""
        features = features.detach().cpu().double()
        if not features.isfinite().all():
            raise ValueError("features have numbers that are not finite; check the clips they were extracted from.")
        if self.origin is None or self.total is None or self.outer is None:
            self.origin = features[0].clone()
            self.total = torch.zeros_like(self.origin)
            self.outer = torch.zeros(len(self.origin), len(self.origin), dtype=torch.float64)
        centred = features - self.origin
        self.count += len(features)
        self.total += centred.sum(0)
        self.outer += centred.T @ centred
        return self

    def merge(self, other: "Gaussian") -> "Gaussian":
        """The Gaussian of the features of both together."""
        if other.origin is None or other.total is None or other.outer is None:
            return self
        if self.origin is None or self.total is None or self.outer is None:
            return other
        shift = other.origin - self.origin
        cross = torch.outer(shift, other.total)
        return Gaussian(
            count=self.count + other.count,
            origin=self.origin,
            total=self.total + other.total + other.count * shift,
            outer=self.outer + other.outer + cross + cross.T + other.count * torch.outer(shift, shift),
        )

    @property
    def mean(self) -> Tensor:
        """The mean (D,) of the features."""
        assert self.origin is not None and self.total is not None
        return self.origin + self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """The covariance (D, D), divided by N - 1 as in numpy.cov and published scores; ValueError below 2 features."""
        if self.count < 2 or self.total is None or self.outer is None:
            raise ValueError(f"a covariance needs 2 clips, got {self.count}; give 2 or more.")
        return (self.outer - torch.outer(self.total, self.total) / self.count) / (self.count - 1)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The Fréchet distance of two Gaussians, by eigenvalues of symmetric matrices in float64.

    It is |mean - mean'|^2 + tr(C + C' - 2 (C C')^(1/2)) (Dowson and Landau, "The Fréchet distance between multivariate
    normal distributions"). With fewer clips than features it is biased upward: compare it at equal counts only.
    """
    root = _root(a.covariance)
    # C C' and root C' root have the same eigenvalues, and the latter is symmetric.
    eigenvalues = torch.linalg.eigvalsh(root @ b.covariance @ root)
    trace = a.covariance.trace() + b.covariance.trace() - 2 * eigenvalues.clamp(min=0).sqrt().sum()
    return float((a.mean - b.mean).square().sum() + trace)


def _root(matrix: Tensor) -> Tensor:
    """Square root of a symmetric positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


@dataclass
class Features:
    """All features, for the kernel distance; those of several processes can be merged."""

    parts: list[Tensor] = field(default_factory=list)

    def add(self, features: Tensor) -> Self:
        """Append features (N, D) as float64 on the CPU."""
        self.parts.append(features.detach().cpu().double())
        return self

    def merge(self, other: "Features") -> "Features":
        """The features of both together."""
        return Features([*self.parts, *other.parts])

    def concatenated(self) -> Tensor:
        """All features as one tensor (N, D)."""
        return torch.cat(self.parts)


class PolynomialKernel(NamedTuple):
    """The kernel (x.y / D + offset)^degree, and how its distance is written.

    unbiased: leave the products of features with themselves out of the means. factor: of the distance.
    """

    degree: int
    offset: float
    unbiased: bool = True
    factor: float = 1.0


# Binkowski et al., "Demystifying MMD GANs" (KID with Inception's features, KVD with I3D's).
KID = PolynomialKernel(3, 1.0)
# Luo et al., "Beyond FVD: Enhanced Evaluation Metrics for Video Generation Quality" (JEDi with V-JEPA's features).
JEDI = PolynomialKernel(2, 0.0, unbiased=False, factor=100.0)


def kernel_distance(a: Tensor, b: Tensor, kernel: PolynomialKernel = KID) -> float:
    """The squared maximum mean discrepancy of features (N, D) and (M, D); an unbiased one may be below 0."""
    if min(len(a), len(b)) < 2:
        raise ValueError(f"the kernel distance needs 2 or more clips of each, got {len(a)} and {len(b)}; give more.")
    a, b = a.double(), b.double()

    def products(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + kernel.offset) ** kernel.degree

    def within(x: Tensor) -> Tensor:
        found = products(x, x)
        return (found.sum() - found.trace()) / (len(x) * (len(x) - 1)) if kernel.unbiased else found.mean()

    return kernel.factor * float(within(a) + within(b) - 2 * products(a, b).mean())

"""From clips to vectors: what a distance between distributions is measured in. The extractor is part of its name."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stdit.evaluation.frechet import Features, Gaussian, frechet_distance, kernel_distance
from stdit.vae import load_vae


class Extractor(NamedTuple):
    """A function from pixels (B, 3, F, H, W) in [-1, 1] to features (N, D), and the names its distances may bear."""

    name: str
    run: Callable[[Tensor], Tensor]
    frechet: str = "Fréchet distance"
    kernel: str = "kernel distance"


class Distances(NamedTuple):
    frechet: float
    kernel: float
    clips: int
    names: tuple[str, str]
    extractor: str


def _frames(pixels: Tensor) -> Tensor:
    """(B, 3, F, H, W) in [-1, 1] -> (B F, 3, H, W) uint8."""
    images = pixels.transpose(1, 2).flatten(0, 1)
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _vae(path: str) -> Extractor:
    """Of every channel: mean, spread, and how much neighbours in y, x and time differ. Edges and motion count, since mean
    and spread alone take noise of the right colours for better than objects (dev/LOG.md)."""
    vae = load_vae(path or "tiny")

    @torch.no_grad()
    def run(pixels: Tensor) -> Tensor:
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).float()
        parts = [latents.mean((2, 3, 4)), latents.std((2, 3, 4))]
        for axis in (3, 4, *([2] if latents.shape[2] > 1 else [])):
            parts.append(latents.diff(dim=axis).abs().mean((2, 3, 4)))
        return torch.cat(parts, 1)

    return Extractor(f"latents of the VAE {vae.name!r}", run)


def _scripted(path: str, call: Callable[[Any, Tensor], Tensor], **names: str) -> Extractor:
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"the extractor {path!r} does not exist; give the path of a TorchScript file.")
    try:
        network = torch.jit.load(file, map_location="cpu").eval()
    except RuntimeError as error:
        raise ValueError(f"{path!r} is not a TorchScript file ({str(error).splitlines()[0]}).") from error
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:12]

    @torch.no_grad()
    def run(pixels: Tensor) -> Tensor:
        features = call(network, pixels)
        if features.ndim != 2:
            raise ValueError(f"{path!r} gave a tensor of shape {tuple(features.shape)}; features are (N, D).")
        return features

    return Extractor(f"{file.name}, sha256 {digest}", run, **names)


EXTRACTORS: dict[str, Callable[[str], Extractor]] = {
    # The files of StyleGAN's and StyleGAN-V's metrics, and the way these call them.
    "inception": lambda path: _scripted(
        path, lambda net, x: net(_frames(x), return_features=True), frechet="FID", kernel="KID"
    ),
    "i3d": lambda path: _scripted(
        path,
        lambda net, x: net(x, rescale=False, resize=True, return_features=True),
        frechet="FVD",
        kernel="KVD",
    ),
    "script": lambda path: _scripted(path, lambda net, x: net(x)),
    "vae": _vae,
}


def load_extractor(choice: str = "vae") -> Extractor:
    """`vae` (the tiny VAE), `vae=PATH`, `inception=FILE`, `i3d=FILE`, or `script=FILE`, which takes (B, 3, F, H, W).

    Raises ValueError for what is not there. No weights are fetched.
    """
    kind, _, path = choice.partition("=")
    if kind not in EXTRACTORS or (kind != "vae" and not path):
        raise ValueError(f"features {choice!r}: write vae, or one of inception=FILE, i3d=FILE, script=FILE.")
    return EXTRACTORS[kind](path)


def describe(clips: Iterable[Tensor], extractor: Extractor) -> tuple[Gaussian, Features]:
    """Features of batches (B, 3, F, H, W), summed for the Fréchet distance and kept for the kernel distance."""
    gaussian, kept = Gaussian(), Features()
    for batch in clips:
        features = extractor.run(batch)
        gaussian.add(features)
        kept.add(features)
    return gaussian, kept


def distances(made: Iterable[Tensor], real: Iterable[Tensor], extractor: Extractor) -> Distances:
    """How far the made clips are from the real ones, as a distribution."""
    (a, kept_a), (b, kept_b) = describe(made, extractor), describe(real, extractor)
    return Distances(
        frechet_distance(a, b),
        kernel_distance(kept_a.all, kept_b.all),
        a.count,
        (extractor.frechet, extractor.kernel),
        extractor.name,
    )

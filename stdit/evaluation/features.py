"""Feature extractors, and distances between distributions of clips, which are named after their extractor."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stdit.evaluation.frechet import JEDI, KID, Features, Gaussian, PolynomialKernel, frechet_distance, kernel_distance
from stdit.evaluation.vjepa import load_vjepa2
from stdit.pixels import to_bytes
from stdit.vae import load_vae


class Extractor(NamedTuple):
    """A feature extractor, from pixels (B, 3, F, H, W) in [-1, 1] to features (N, D).

    frechet, kernel: the names of its distances. polynomial: the kernel of the latter.
    """

    name: str
    run: Callable[[Tensor], Tensor]
    frechet: str = "Fréchet distance"
    kernel: str = "kernel distance"
    polynomial: PolynomialKernel = KID


class Distances(NamedTuple):
    """Distances of generated clips from real ones.

    clips: the number of features of generated clips. names: those of the two distances.
    """

    frechet: float
    kernel: float
    clips: int
    names: tuple[str, str]
    extractor: str


def _frames(pixels: Tensor) -> Tensor:
    """(B, 3, F, H, W) in [-1, 1] -> (B F, 3, H, W) uint8."""
    return to_bytes(pixels).flatten(0, 1).movedim(-1, 1).contiguous()


def _vae(path: str) -> Extractor:
    """Statistics of a VAE's latent channels: mean, standard deviation, mean difference of neighbours in y, x and time.

    The differences measure edges and motion: by mean and deviation alone, noise of the right colours is nearer to real
    clips than objects are (dev/LOG.md).
    """
    vae = load_vae(path or "tiny")

    @torch.no_grad()
    def run(pixels: Tensor) -> Tensor:
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).float()
        parts = [latents.mean((2, 3, 4)), latents.std((2, 3, 4))]
        for axis in (3, 4, *([2] if latents.shape[2] > 1 else [])):
            parts.append(latents.diff(dim=axis).abs().mean((2, 3, 4)))
        return torch.cat(parts, 1)

    return Extractor(f"latents of the VAE {vae.name!r}", run)


def _scripted(path: str, call: Callable[[Any, Tensor], Tensor], **names: Any) -> Extractor:
    """A TorchScript file on the CPU, called by `call`; ValueError if it is not one, or does not return (N, D)."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"the extractor {path!r} does not exist; give the path of a TorchScript file.")
    try:
        network = torch.jit.load(file, map_location="cpu").eval()
    except RuntimeError as error:
        raise ValueError(
            f"{path!r} is not a TorchScript file ({str(error).splitlines()[0]}); save one with torch.jit.save."
        ) from error
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:12]

    @torch.no_grad()
    def run(pixels: Tensor) -> Tensor:
        features = call(network, pixels)
        if features.ndim != 2:
            raise ValueError(
                f"{path!r} returned a tensor of shape {tuple(features.shape)}; features are (N, D), so flatten them in the file."
            )
        return features

    return Extractor(f"{file.name}, sha256 {digest}", run, **names)


def _vjepa2(path: str) -> Extractor:
    """JEDi was defined with the first V-JEPA; with another encoder its scale is another."""
    name, run = load_vjepa2(path)
    return Extractor(name, run, kernel="JEDi with V-JEPA 2", polynomial=JEDI)


EXTRACTORS: dict[str, Callable[[str], Extractor]] = {
    # The files of the metrics of StyleGAN and StyleGAN-V, called with the same arguments as there.
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
    "vjepa2": _vjepa2,
    "vae": _vae,
}


def load_extractor(choice: str = "vae") -> Extractor:
    """Load an extractor: `vae` (the tiny VAE), `vae=PATH`, `inception=FILE`, `i3d=FILE`, `script=FILE`, or `vjepa2=FOLDER`.

    A script takes pixels (B, 3, F, H, W). Raises ValueError for an unknown choice or a missing file. Nothing is
    downloaded.
    """
    kind, _, path = choice.partition("=")
    if kind not in EXTRACTORS or (kind != "vae" and not path):
        raise ValueError(
            f"features {choice!r} are unknown; write vae, or one of inception=FILE, i3d=FILE, script=FILE, vjepa2=FOLDER."
        )
    return EXTRACTORS[kind](path)


def extract_features(clips: Iterable[Tensor], extractor: Extractor) -> tuple[Gaussian, Features]:
    """Extract the features of batches (B, 3, F, H, W): their Gaussian, and all of them for the kernel distance."""
    gaussian, collected = Gaussian(), Features()
    for batch in clips:
        features = extractor.run(batch)
        gaussian.add(features)
        collected.add(features)
    return gaussian, collected


def distances(generated: Iterable[Tensor], real: Iterable[Tensor], extractor: Extractor) -> Distances:
    """Measure the distances of generated from real clips, both given in batches (B, 3, F, H, W) in [-1, 1]."""
    gaussian, features = extract_features(generated, extractor)
    real_gaussian, real_features = extract_features(real, extractor)
    return Distances(
        frechet=frechet_distance(gaussian, real_gaussian),
        kernel=kernel_distance(features.concatenated(), real_features.concatenated(), extractor.polynomial),
        clips=gaussian.count,
        names=(extractor.frechet, extractor.kernel),
        extractor=extractor.name,
    )

"""Training the tiny VAE: clips held in memory at several sizes, batches that are a pure function of (seed, step)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stdit.data.shapes import draw, random_clip
from stdit.vae.tiny import TinyVAE, TinyVAEConfig


@dataclass
class VAEDataConfig:
    root: str = "data/clips"
    manifest: str = "clips.csv"
    images: list[str] = field(default_factory=list)  # idx files of grey images
    hold_out: list[str] = field(default_factory=list)  # values of the manifest's `group` column
    short_sides: list[int] = field(default_factory=lambda: [64, 80, 96, 128, 160])
    share_shapes: float = 0.15
    share_images: float = 0.05


@dataclass
class VAETrainConfig:
    steps: int = 18300
    decay_steps: int = 18300
    warmup_steps: int = 100
    lr: float = 4e-3
    optimizer: Literal["muon", "adamw"] = "muon"  # 3.9 dB ahead after 300 steps, one rate each
    ema_decay: float = 0.999
    latent_noise: float = 0.05  # the decoder learns to bear noise, so that latents stay smooth
    scale_weight: float = (
        0.5  # latents at half size decode to pixels at half size (EQ-VAE), which makes them easier to generate
    )
    latent_weight: float = 1e-4  # keeps raw latents near unit size (a KL term of fixed variance)
    l1_weight: float = 0.02
    flicker_weight: float = 0.25  # squared error of frame differences
    checkpoint_every: int = 500
    log_every: int = 50


@dataclass
class VAEConfig:
    """Everything `tools/train_vae.py` reads."""

    name: str = "vae_tiny"
    seed: int = 0
    data: VAEDataConfig = field(default_factory=VAEDataConfig)
    model: TinyVAEConfig = field(default_factory=TinyVAEConfig)
    train: VAETrainConfig = field(default_factory=VAETrainConfig)


# (frames, size, clips) of a batch and its share of the steps: mostly small and short, about equal in pixels.
BATCHES = (((9, 64, 16), 0.55), ((17, 64, 8), 0.2), ((17, 128, 2), 0.15), ((9, 96, 7), 0.1))


class ClipPool:
    """Real clips as uint8 (F, H, W, 3), each at several sizes; plus grey images (N, 28, 28)."""

    def __init__(self, clips: Sequence[dict[int, np.ndarray]], images: np.ndarray | None, config: VAEDataConfig):
        self.clips, self.images, self.config = clips, images, config

    def batch(self, seed: int, step: int) -> Tensor:
        """(B, 3, F, S, S) in [-1, 1], the same for the same seed and step whatever came before."""
        rng = np.random.default_rng((seed, step))
        shares = np.array([share for _, share in BATCHES])
        frames, size, count = BATCHES[rng.choice(len(BATCHES), p=shares / shares.sum())][0]
        clips = np.stack([self._one(rng, frames, size) for _ in range(count)])
        return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1

    def _one(self, rng: np.random.Generator, frames: int, size: int) -> np.ndarray:
        draw_of = rng.random()
        if draw_of < self.config.share_shapes:
            motion = "bounce" if rng.random() < 0.5 else "straight"
            return draw(random_clip(rng, frames=frames, frame_size=size, motion=motion))
        if self.images is not None and draw_of < self.config.share_shapes + self.config.share_images:
            return self._image(rng, frames, size)
        return self._real(rng, frames, size)

    def _real(self, rng: np.random.Generator, frames: int, size: int) -> np.ndarray:
        while True:  # until the clip drawn is large and long enough
            pyramid = self.clips[rng.integers(len(self.clips))]
            sides = [side for side in pyramid if side >= size]
            if sides and len(clip := pyramid[rng.choice(sides)]) >= frames:
                break
        step = min(rng.choice([1, 1, 1, 2, 3]), max(1, (len(clip) - 1) // (frames - 1)))
        span = (frames - 1) * step + 1
        t = rng.integers(len(clip) - span + 1)
        y, x = (rng.integers(n - size + 1) for n in clip.shape[1:3])
        crop = clip[t : t + span : step, y : y + size, x : x + size]
        if rng.random() < 0.5:
            crop = crop[:, :, ::-1]
        if rng.random() < 0.3:
            crop = crop[::-1]
        if rng.random() < 0.15:
            crop = crop.swapaxes(1, 2)
        if rng.random() < 0.2:
            crop = crop[..., rng.permutation(3)]
        if rng.random() < 0.3:
            gain, offset = rng.uniform(0.7, 1.3), rng.uniform(-30, 30)
            crop = np.clip(crop * np.float32(gain) + np.float32(offset), 0, 255).astype(np.uint8)
        return crop

    def _image(self, rng: np.random.Generator, frames: int, size: int) -> np.ndarray:
        image = torch.from_numpy(self.images[rng.integers(len(self.images))]).float()[None, None]
        image = F.interpolate(image, (size, size), mode="bilinear", align_corners=False)[0, 0]
        shift = rng.integers(-2, 3, 2)
        moving = [torch.roll(image, (int(f * shift[0]), int(f * shift[1])), (0, 1)) for f in range(frames)]
        tint = rng.uniform(0.3, 1, 3).astype(np.float32)
        return (torch.stack(moving).numpy()[..., None] * tint).astype(np.uint8)


def vae_loss(vae: TinyVAE, pixels: Tensor, noise: Tensor, config: VAETrainConfig) -> tuple[Tensor, dict[str, float]]:
    """Squared error, a little absolute error (flat ground stays flat), flicker, agreement over scales, the latents' size."""
    raw = vae.encode_raw(pixels)
    # Statistics in raw space, so that noise keeps its share whatever the scale of the latents becomes.
    decoded = vae.decode_raw(raw + config.latent_noise * noise).float()
    error = decoded - pixels
    mse = error.square().mean()
    flicker = error.diff(dim=2).square().mean()
    half = decoded_half(vae, raw) - F.avg_pool3d(pixels, (1, 2, 2))
    size = raw.float().square().mean()
    loss = mse + config.l1_weight * error.abs().mean() + config.flicker_weight * flicker + config.latent_weight * size
    loss = loss + config.scale_weight * half.square().mean()
    return loss, {
        "mse": mse.item(),
        "flicker": flicker.item(),
        "latent": size.item(),
        "half": half.square().mean().item(),
    }


def decoded_half(vae: TinyVAE, raw: Tensor) -> Tensor:
    """Pixels at half the height and width, decoded from latents averaged over 2 x 2."""
    return vae.decode_raw(F.avg_pool3d(raw, (1, 2, 2))).float()


def psnr(clips: Sequence[tuple[Tensor, Tensor]]) -> float:
    """PSNR in dB of the squared error averaged over clips, for pixels in [-1, 1]."""
    errors = [(a.float().clamp(-1, 1) - b.float()).square().mean().item() for a, b in clips]
    return 10 * float(np.log10(4 / np.mean(errors)))

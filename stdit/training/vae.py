"""Training of the tiny VAE: its config, batches as a pure function of (seed, step), the loss, and the loop."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stdit.data.shapes import draw, random_clip
from stdit.pixels import to_float
from stdit.ranges import check_ranges
from stdit.training.config import LoopConfig
from stdit.training.loop import StepLosses, TrainingLoop
from stdit.training.metrics import Breakdown
from stdit.vae.tiny import TinyVAE, TinyVAEConfig


@dataclass
class VAEDataConfig:
    """The training data of the VAE: clips of a manifest (CSV with `path` and `group`), grey images, and drawn shapes."""

    root: str = "data/clips"  # folder of the clips
    manifest: str = "clips.csv"  # CSV file in it, with the columns path and group, or an index made of one
    images: list[str] = field(default_factory=list)  # idx files of grey images
    hold_out: list[str] = field(default_factory=list)  # values of the column group whose clips are not trained on
    short_sides: list[int] = field(default_factory=lambda: [64, 80, 96, 128, 160])  # short sides of the clips in pixels
    share_shapes: float = 0.15  # fraction of the clips that are drawn shapes
    share_images: float = 0.05  # fraction of the clips that are grey images
    augment: bool = True  # mirror, transpose, reverse and recolour clips at random; false: for a VAE of one world

    def __post_init__(self) -> None:
        check_ranges("data", self, {"short_sides": "[1, inf)", "share_shapes": "[0, 1]", "share_images": "[0, 1]"})


@dataclass
class VAETrainConfig(LoopConfig):
    """Settings of the VAE's training: those of every training loop, and the weights of the terms of its loss."""

    steps: int = 18300
    decay_steps: int | None = 18300
    warmup_steps: int = 100
    lr: float = 4e-3
    optimizer: Literal["adamw", "muon"] = "muon"  # muon: 3.9 dB ahead of adamw after 300 steps
    ema_decay: float = 0.999
    checkpoint_every: int = 500
    preview_every: int = 1000
    latent_noise: float = 0.05  # standard deviation of noise on latents in training, so that the decoder tolerates it
    noisy_share: float = 0.0  # share of the clips with more noise than that, as generated latents have
    most_noise: float = 0.4  # largest standard deviation of their noise
    decoder_only: bool = False  # with init_from: encoder and latents stay as they are
    scale_weight: float = 0.5  # weight of the error at half size, which makes latents easier to generate (EQ-VAE)
    latent_weight: float = 1e-4  # weight of squared latents, which keeps them near unit size (KL of fixed variance)
    l1_weight: float = 0.02  # weight of the absolute error
    flicker_weight: float = 0.25  # weight of the squared error of frame differences
    motion_weight: float = 0.0  # further weight of the squared error where a pixel differs from its mean over the clip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.average_lengths:
            raise ValueError(
                f"train.average_lengths={self.average_lengths} has no use here: stdit average makes models of stdit train, and no VAEs; "
                "leave it out."
            )
        weights = ("latent_noise", "scale_weight", "latent_weight", "l1_weight", "flicker_weight", "motion_weight")
        check_ranges(
            "train", self, {**dict.fromkeys(weights, "[0, inf)"), "noisy_share": "[0, 1]", "most_noise": "[0, inf)"}
        )


@dataclass
class VAEConfig:
    """The config of `stdit train-vae`."""

    name: str = "vae_tiny"  # name of the run
    seed: int = 0  # seed of weights and data
    data: VAEDataConfig = field(default_factory=VAEDataConfig)  # clips, images and drawn shapes
    model: TinyVAEConfig = field(default_factory=TinyVAEConfig)  # sizes of the VAE
    init_from: str | None = None  # "tiny", or the folder of a tiny VAE whose weights training starts from
    train: VAETrainConfig = field(default_factory=VAETrainConfig)  # steps, optimizer and weights of the loss

    def __post_init__(self) -> None:
        check_ranges("", self, {"seed": "[0, 4294967295]"})
        if self.train.decoder_only and self.init_from is None:
            raise ValueError(
                "train.decoder_only=true needs a trained encoder; set init_from=tiny, or the folder of a VAE."
            )


# ((frames, size, clips) of a batch, probability): mostly small and short; batches have similar numbers of pixels.
BATCH_SHAPES = (((9, 64, 16), 0.55), ((17, 64, 8), 0.2), ((17, 128, 2), 0.15), ((9, 96, 7), 0.1))


def _fits(clips: Sequence[dict[int, np.ndarray]], frames: int, size: int) -> bool:
    """Whether a batch of such clips can be cut from the clips of a pool."""
    return any(side >= size and len(clip) >= frames for sizes in clips for side, clip in sizes.items())


class ClipPool:
    """The training data in memory: clips (F, H, W, 3) uint8, each at several sizes, and grey images (N, 28, 28).

    Shapes of batches that no clip is large or long enough for are not drawn.
    """

    def __init__(self, clips: Sequence[dict[int, np.ndarray]], images: np.ndarray | None, config: VAEDataConfig):
        self.clips, self.images, self.config = clips, images, config
        whole = config.share_shapes >= 1
        self.shapes = [one for one in BATCH_SHAPES if whole or _fits(clips, *one[0][:2])]
        if not self.shapes:
            frames, size = min(shape[:2] for shape, _ in BATCH_SHAPES)
            raise ValueError(
                f"no clip of {config.manifest!r} has {frames} frames with a short side of {size} pixels (of "
                "data.short_sides); add such clips, or set data.share_shapes=1 to train on drawn shapes only."
            )

    def batch(self, seed: int, step: int) -> Tensor:
        """Draw a batch (B, 3, F, S, S) in [-1, 1], a pure function of seed and step."""
        rng = np.random.default_rng((seed, step))
        shares = np.array([share for _, share in self.shapes])
        frames, size, count = self.shapes[rng.choice(len(self.shapes), p=shares / shares.sum())][0]
        clips = np.stack([self._draw(rng, frames, size) for _ in range(count)])
        return to_float(clips)

    def _draw(self, rng: np.random.Generator, frames: int, size: int) -> np.ndarray:
        u = rng.random()
        if u < self.config.share_shapes:
            motion = "bounce" if rng.random() < 0.5 else "straight"
            return draw(random_clip(rng, frames=frames, frame_size=size, motion=motion))
        if self.images is not None and u < self.config.share_shapes + self.config.share_images:
            return self._image(rng, frames, size)
        return self._real(rng, frames, size)

    def _real(self, rng: np.random.Generator, frames: int, size: int) -> np.ndarray:
        while True:  # repeat until a clip is large and long enough
            pyramid = self.clips[int(rng.integers(len(self.clips)))]
            sides = [side for side in pyramid if side >= size]
            if sides and len(clip := pyramid[rng.choice(sides)]) >= frames:
                break
        step = min(rng.choice([1, 1, 1, 2, 3]), max(1, (len(clip) - 1) // (frames - 1)))
        span = (frames - 1) * step + 1
        t = rng.integers(len(clip) - span + 1)
        y, x = (rng.integers(n - size + 1) for n in clip.shape[1:3])
        crop = clip[t : t + span : step, y : y + size, x : x + size]
        if not self.config.augment:
            return crop
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
        assert self.images is not None
        image = torch.from_numpy(self.images[rng.integers(len(self.images))]).float()[None, None]
        image = F.interpolate(image, (size, size), mode="bilinear", align_corners=False)[0, 0]
        shift = rng.integers(-2, 3, 2)
        moving = [torch.roll(image, (int(f * shift[0]), int(f * shift[1])), (0, 1)) for f in range(frames)]
        tint = rng.uniform(0.3, 1, 3).astype(np.float32)
        return (torch.stack(moving).numpy()[..., None] * tint).astype(np.uint8)


_HALVING_NOISE = 0.2  # standard deviation of noise at which a clip counts half

TERMS = Breakdown(
    "loss and its terms, without their weights",
    ["mse", "flicker", "latent", "half"],
    ["squared error", "flicker", "squared latents", "squared error at half size"],
)


def vae_loss(
    vae: TinyVAE, pixels: Tensor, noise: Tensor, levels: Tensor, config: VAETrainConfig
) -> tuple[Tensor, Tensor]:
    """Compute the loss, and its `TERMS` (4,) without their weights. levels: standard deviations (B,) of the noise.

    The loss has the squared error (more of it where something moves, if asked), a little absolute error (so that flat areas
    stay flat), the error of frame differences, the error at half size, and the size of latents. Clips of much noise, which
    cannot be decoded well, count less.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and not config.decoder_only):
        raw = vae.encode_raw(pixels)
    per_clip = levels.view(-1, 1, 1, 1, 1)
    weight = torch.where(per_clip > config.latent_noise, 1 / (1 + (per_clip / _HALVING_NOISE) ** 2), 1)
    # Noise is added to raw latents, whose size `latent_weight` keeps near 1, or whose size is known.
    decoded = vae.decode_raw(raw + per_clip * vae.latent_std.view(1, -1, 1, 1, 1) * noise).float()
    error = decoded - pixels
    mse = (weight * error.square()).mean()
    loss = (
        mse
        if not config.motion_weight
        else (weight * (1 + config.motion_weight * motion(pixels)) * error.square()).mean()
    )
    flicker = (weight * error.diff(dim=2).square()).mean()
    size = raw.float().square().mean()
    l1 = (weight * error.abs()).mean()
    loss = loss + config.l1_weight * l1 + config.flicker_weight * flicker + config.latent_weight * size
    half = torch.zeros((), device=pixels.device)
    if config.scale_weight:
        half = (decoded_half(vae, raw) - F.avg_pool3d(pixels, (1, 2, 2))).square().mean()
        loss = loss + config.scale_weight * half
    return loss, torch.stack([mse, flicker, size, half]).detach()


def motion(pixels: Tensor) -> Tensor:
    """How far pixels (B, 3, F, H, W) are from their mean over the clip, in the channel that is farthest: (B, 1, F, H, W)."""
    return (pixels - pixels.mean(dim=2, keepdim=True)).abs().amax(dim=1, keepdim=True)


def decoded_half(vae: TinyVAE, raw: Tensor) -> Tensor:
    """Decode latents averaged over 2 x 2 to pixels at half the height and width."""
    return vae.decode_raw(F.avg_pool3d(raw, (1, 2, 2))).float()


def noise_levels(config: VAETrainConfig, count: int, generator: torch.Generator) -> Tensor:
    """Draw the standard deviation (count,) of the noise on the latents of each clip."""
    chance, level = torch.rand(2, count, generator=generator)
    return torch.where(chance < config.noisy_share, config.most_noise * level, config.latent_noise)


class VAEBatch(NamedTuple):
    """A batch of the VAE's training.

    pixels: (B, 3, F, S, S) in [-1, 1]. noise: for the latents; levels: (B,) its standard deviations. keys, total: as in `stdit.training.fit.StepBatch`.
    """

    pixels: Tensor
    noise: Tensor
    levels: Tensor
    keys: list[tuple[int, int, int]]
    total: int


def vae_batches(pool: ClipPool, vae: TinyVAE, config: VAEConfig, start_step: int) -> Iterator[VAEBatch]:
    """Yield endless batches from `start_step` on, each a pure function of (seed, step)."""
    step, seed = start_step, config.seed
    while True:
        pixels = pool.batch(seed, step)
        count = len(pixels)
        shape = (count, vae.channels, vae.latent_frames(pixels.shape[2]), *vae.latent_size(*pixels.shape[3:]))
        # With a factor that exceeds any number of steps, runs of different seeds share no noise.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        noise = torch.randn(shape, generator=generator)
        levels = noise_levels(config.train, count, generator)
        yield VAEBatch(pixels, noise, levels, keys=[(seed, step, slot) for slot in range(count)], total=count)
        step += 1


@dataclass
class VAETrainer(TrainingLoop):
    """The training run of the tiny VAE, in one process, since its loss bypasses the module's forward, which DDP needs."""

    config: VAETrainConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accelerator.num_processes > 1:
            raise ValueError(
                f"The VAE is trained in 1 process, got {self.accelerator.num_processes}; start it without a launcher."
            )

    @property
    def breakdown(self) -> Breakdown:
        """The terms of the loss."""
        return TERMS

    def losses(self, model: nn.Module, batch: VAEBatch) -> StepLosses:
        """Compute the loss of a batch, which is the same for each of its clips."""
        device = self.accelerator.device
        with self.accelerator.autocast():
            pixels, noise, levels = (part.to(device) for part in (batch.pixels, batch.noise, batch.levels))
            loss, terms = vae_loss(self.model, pixels, noise, levels=levels, config=self.config)
        return StepLosses(loss.expand(batch.total), torch.stack([terms, torch.ones_like(terms)]))


def psnr(clips: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The PSNR in dB of the squared error, averaged over pairs of clips with pixels in [-1, 1]."""
    errors = [(a.float().clamp(-1, 1) - b.float()).square().mean().item() for a, b in clips]
    return 10 * float(np.log10(4 / np.mean(errors)))

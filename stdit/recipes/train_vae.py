"""Train the tiny VAE; stops and resumes exactly; writes previews and the weights that ship with the package.

stdit train-vae configs/vae_tiny.yaml data.root=path/to/clips
stdit train-vae configs/vae_tiny.yaml --export stdit/vae/weights
"""

import csv
import json
import signal
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from stdit.config import load_typed
from stdit.data.idx import read_idx
from stdit.data.transforms import resize_short_side
from stdit.data.video_io import VideoReader
from stdit.data.video_write import write_contact_sheet
from stdit.precision import autocast
from stdit.recipes.entry import command_parser
from stdit.training.optim import build_optimizers, learning_rate, set_learning_rate
from stdit.training.state import flatten_optimizer, load_checkpoint, restore_optimizer, save_checkpoint
from stdit.training.vae import ClipPool, VAEConfig, psnr, vae_loss
from stdit.vae.tiny import TinyVAE


def read_clips(config: VAEConfig) -> tuple[list[dict[int, np.ndarray]], list[np.ndarray]]:
    """Training clips as pyramids of sizes, and held-out clips as they are (F, H, W, 3)."""
    root = Path(config.data.root)
    with open(root / config.data.manifest, newline="") as stream:
        rows = list(csv.DictReader(stream))
    training, held_out = [], []
    for row in tqdm(rows, desc="reading clips", unit="clip"):
        with VideoReader(root / row["path"]) as reader:
            frames = reader.get_frames(range(len(reader)))
        if row["group"] in config.data.hold_out:
            held_out.append(frames)
        else:
            sides = [side for side in config.data.short_sides if side <= min(frames.shape[1:3])]
            training.append({side: resize_short_side(frames, side) for side in sides})
    return training, held_out


def center_crop(frames: np.ndarray, size: int, count: int = 17) -> torch.Tensor:
    small = resize_short_side(frames[:count], size)
    y, x = (small.shape[1] - size) // 2, (small.shape[2] - size) // 2
    crop = torch.from_numpy(small[:, y : y + size, x : x + size].copy())
    return crop.permute(3, 0, 1, 2)[None].float() / 127.5 - 1


@torch.no_grad()
def evaluate(vae: TinyVAE, held_out: list[np.ndarray]) -> dict[str, float]:
    """PSNR on held-out clips: 17 frames, centre crop, at 128 and at 64 pixels."""
    scores = {}
    for size in (128, 64):
        clips = [center_crop(frames, size) for frames in held_out if len(frames) >= 17]
        scores[f"psnr_{size}"] = psnr([(vae.decode(vae.encode(clip)), clip) for clip in clips])
    return scores


@torch.no_grad()
def preview(vae: TinyVAE, held_out: list[np.ndarray], path: Path) -> None:
    """Rows of originals and reconstructions, every fourth frame."""
    clips = [center_crop(frames, 128) for frames in held_out if len(frames) >= 17][::2]
    both = [side for clip in clips for side in (clip[0, :, ::4], vae.decode(vae.encode(clip))[0, :, ::4])]
    write_contact_sheet(path, both)


@torch.no_grad()
def measure_latents(vae: TinyVAE, pool: ClipPool, seed: int) -> None:
    """Set the statistics that make latents zero mean and unit variance on the training data."""
    raw = torch.cat(
        [vae.encode_raw(pool.batch(seed, -1 - i & 0xFFFF)).transpose(0, 1).flatten(1) for i in range(64)], 1
    )
    vae.latent_mean.copy_(raw.mean(1))
    vae.latent_std.copy_(raw.std(1))


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("train-vae", __doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--export", metavar="DIR", help="write the averaged weights in 16 bits to DIR and stop")
    args = parser.parse_intermixed_args(argv)
    config = load_typed(VAEConfig, args.config, args.overrides)
    train, folder, output = config.train, Path("checkpoints") / config.name, Path("output") / config.name

    torch.manual_seed(config.seed)
    vae, average = TinyVAE(**asdict(config.model)), TinyVAE(**asdict(config.model))
    average.load_state_dict(vae.state_dict())
    optimizers = build_optimizers(vae, train.optimizer, train.lr)
    step = 0
    if checkpoint := load_checkpoint(folder):
        step = checkpoint.step
        vae.load_state_dict(checkpoint.tensors["model"])
        average.load_state_dict(checkpoint.tensors["ema"])
        for i, optimizer in enumerate(optimizers):
            restore_optimizer(optimizer, checkpoint.tensors[f"optimizer_{i}"], checkpoint.info["optimizers"][i])
        print(f"resumed from {checkpoint.path}")

    clips, held_out = read_clips(config)
    images = np.concatenate([read_idx(path) for path in config.data.images]) if config.data.images else None
    pool = ClipPool(clips, images, config.data)
    output.mkdir(parents=True, exist_ok=True)
    if args.export:
        measure_latents(average, pool, config.seed)
        scores = evaluate(average, held_out)
        preview(average, held_out, output / "reconstructions.png")
        average.half().save_pretrained(args.export)
        record = {"step": step, "config": asdict(config), **scores}
        data = record["config"]["data"]  # names, not places on this machine
        data["root"], data["images"] = Path(data["root"]).name, [Path(path).name for path in data["images"]]
        (Path(args.export) / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        print(scores)
        return 0

    def save() -> None:
        states = [flatten_optimizer(optimizer) for optimizer in optimizers]
        tensors = {"model": vae.state_dict(), "ema": average.state_dict()}
        tensors |= {f"optimizer_{i}": state for i, (state, _) in enumerate(states)}
        save_checkpoint(folder, step, tensors, {"optimizers": [numbers for _, numbers in states]})

    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    started, progress = time.time(), tqdm(total=train.steps, initial=step, unit="step", mininterval=5)
    while step < train.steps and not stop:
        pixels = pool.batch(config.seed, step)
        shape = (len(pixels), vae.channels, vae.latent_frames(pixels.shape[2]), *vae.latent_size(*pixels.shape[3:]))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(config.seed * 1_000_003 + step))
        with autocast("auto", "cpu"):
            loss, record = vae_loss(vae, pixels, noise, train)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0, error_if_nonfinite=True)
        lr = learning_rate(step, train.lr, train.warmup_steps, train.decay_steps)
        set_learning_rate(optimizers, lr)
        for optimizer in optimizers:
            optimizer.step()
        vae.zero_grad()
        step += 1
        decay = min(train.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), vae.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        progress.update()
        if step % train.log_every == 0:
            progress.set_postfix({key: f"{value:.4f}" for key, value in record.items()})
            with open(output / "training_metrics.csv", "a", newline="") as stream:
                csv.writer(stream).writerow([step, loss.item(), *record.values(), lr, time.time() - started])
        if step % train.checkpoint_every == 0 or step == train.steps:
            save()
        if step % (2 * train.checkpoint_every) == 0 or step == train.steps:
            with autocast("auto", "cpu"):
                scores = evaluate(average, held_out)
                preview(average, held_out, output / "reconstructions.png")
            progress.write(f"step {step}: " + ", ".join(f"{key} {value:.2f}" for key, value in scores.items()))
    progress.close()
    if stop:
        save()
        return 143
    return 0

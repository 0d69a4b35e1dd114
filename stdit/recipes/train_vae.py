"""Train the tiny VAE; the same command resumes. `--export` writes the weights that ship with the package.

stdit train-vae vae_tiny data.root=path/to/clips
stdit train-vae vae_tiny --export stdit/vae/weights
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from stdit.config import load_typed, to_plain
from stdit.data.clips import VideoClips
from stdit.data.config import DataConfig
from stdit.data.datasets import build_dataset
from stdit.data.folders import is_file
from stdit.data.identity import hash_of, relative_name, size_of
from stdit.data.idx import read_idx
from stdit.data.manifest import Row
from stdit.data.stores import allow
from stdit.data.transforms import cover_size, resize_short_side
from stdit.data.video_io import VideoReader
from stdit.data.video_write import write_contact_sheet
from stdit.files import write_json
from stdit.pixels import to_float
from stdit.progress import Progress
from stdit.recipes.build import build_accelerator
from stdit.recipes.entry import command, command_parser
from stdit.training.fit import Stopped, swap_ema
from stdit.training.optim import build_optimizers
from stdit.training.previews import Previews
from stdit.training.results import check_finite
from stdit.training.resume import find_checkpoint, set_aside
from stdit.training.run import RunFolders
from stdit.training.vae import ClipPool, VAEConfig, VAETrainer, psnr, vae_batches
from stdit.vae import load_vae
from stdit.vae.tiny import TinyVAE, TinyVAEConfig

EVALUATED_FRAMES, EVALUATED_SIZES = 17, (128, 64)  # of the held-out clips
_MEASURED = 16  # training clips on which PSNR is measured where none are held out


def read_rows(config: VAEConfig) -> list[Row]:
    """The rows of the manifest, or of an index without the files that could not be read when it was made."""
    data = config.data
    allow(data.root)
    within = Path(data.root) / data.manifest
    manifest = within if is_file(within) or not is_file(Path(data.manifest)) else data.manifest
    dataset = build_dataset(DataConfig(root=data.root, manifest=str(manifest), source="videos", index=None))
    assert isinstance(dataset, VideoClips)
    index = dataset.index
    return [row for i, row in enumerate(dataset.rows) if index is None or index.refused(i) is None]


def data_fingerprint(config: VAEConfig) -> dict[str, str]:
    """Hashes of the clips and images that the VAE is trained on, by their names, sizes and groups."""
    root, rows = Path(config.data.root), read_rows(config)
    clips = [(relative_name(row.path, root), size_of(row.path), row.columns.get("group")) for row in rows]
    images = [(Path(path).name, size_of(Path(path))) for path in config.data.images]
    return {"files": hash_of(clips), "images": hash_of(images)}


def read_clips(config: VAEConfig) -> tuple[list[dict[int, np.ndarray]], list[np.ndarray]]:
    """Read the training clips, as dicts of short side -> frames, and the beginnings of the held-out clips (F, H, W, 3).

    Frames are reduced while they are read, so that a clip takes the memory of its largest short side. If none are held out,
    the latter are the first of the training clips, which is said.
    """
    rows = read_rows(config)
    if config.data.hold_out and not any("group" in row.columns for row in rows):
        raise ValueError(
            f"{config.data.manifest} has no column 'group' for data.hold_out={config.data.hold_out}; add it, or use hold_out=[]."
        )
    apart = [row.columns.get("group") in config.data.hold_out for row in rows]
    if all(apart) and config.data.share_shapes < 1:
        raise ValueError(
            f"data.hold_out={config.data.hold_out} leaves none of the {len(rows)} clips of {config.data.manifest!r} to train on; hold "
            "out fewer, or set data.share_shapes=1 to train on drawn shapes only."
        )
    training, held_out = [], []
    for row, is_held_out in zip(Progress(rows, desc="reading clips", unit="clip"), apart, strict=True):
        with VideoReader(row.path) as reader:
            if is_held_out:
                first = range(min(len(reader), EVALUATED_FRAMES))
                held_out.append(_read_reduced(reader, first, EVALUATED_SIZES[0]))
                continue
            sides = [side for side in config.data.short_sides if side <= min(reader.size)]
            frames = _read_reduced(reader, range(len(reader)), max(sides)) if sides else np.empty(0)
        training.append({side: resize_short_side(frames, side) for side in sides})
    if not held_out:
        whole = [sizes[max(sizes)] for sizes in training if sizes]
        held_out = [frames for frames in whole if len(frames) >= EVALUATED_FRAMES][:_MEASURED]
        print(f"no clip is held out (data.hold_out): PSNR is measured on {len(held_out)} clips of the training")
    return training, held_out


def _read_reduced(reader: VideoReader, frames: range, side: int) -> np.ndarray:
    """Frames of a video with a short side of at most `side`."""
    size = cover_size(reader.size, (side, side)) if side < min(reader.size) else None
    return reader.get_frames(frames, size=size)


def center_crop(frames: np.ndarray, size: int, count: int = EVALUATED_FRAMES) -> torch.Tensor:
    """Scale and crop the first `count` frames (F, H, W, 3) to a square: (1, 3, F, size, size) in [-1, 1]."""
    small = resize_short_side(frames[:count], size)
    y, x = (small.shape[1] - size) // 2, (small.shape[2] - size) // 2
    return to_float(small[:, y : y + size, x : x + size])[None]


def _reconstruct(vae: TinyVAE, clip: torch.Tensor) -> torch.Tensor:
    return vae.decode(vae.encode(clip.to(vae.device))).float().cpu()


def evaluated_sizes(held_out: list[np.ndarray]) -> list[int]:
    """Those of `EVALUATED_SIZES` that a held-out clip has, largest first; the smallest if none has one."""
    largest = max(min(frames.shape[1:3]) for frames in held_out) if held_out else 0
    return [size for size in EVALUATED_SIZES if size <= largest] or [EVALUATED_SIZES[-1]]


@torch.no_grad()
def evaluate(vae: TinyVAE, held_out: list[np.ndarray]) -> dict[str, float]:
    """Measure the PSNR in dB on held-out clips: 17 frames, centre crop, at 128 pixels if they have so many, and at 64."""
    scores = {}
    for size in evaluated_sizes(held_out):
        clips = [center_crop(frames, size) for frames in held_out if len(frames) >= EVALUATED_FRAMES]
        scores[f"psnr_{size}"] = psnr([(_reconstruct(vae, clip), clip) for clip in clips])
    return scores


@torch.no_grad()
def write_preview(vae: TinyVAE, held_out: list[np.ndarray], path: Path) -> None:
    """Write a picture with rows of originals and reconstructions, every fourth frame."""
    size = evaluated_sizes(held_out)[0]
    clips = [center_crop(frames, size) for frames in held_out if len(frames) >= EVALUATED_FRAMES][::2]
    rows = [row for clip in clips for row in (clip[0, :, ::4], _reconstruct(vae, clip)[0, :, ::4])]
    write_contact_sheet(path, rows)


@torch.no_grad()
def measure_latents(vae: TinyVAE, pool: ClipPool, seed: int) -> None:
    """Set the statistics that give latents zero mean and unit variance on the training data."""
    # Steps down from 65535, which training does not reach, so that these 64 batches are not those of training.
    batches = (pool.batch(seed, -1 - i & 0xFFFF).to(vae.device) for i in range(64))
    raw = torch.cat([vae.encode_raw(batch).transpose(0, 1).flatten(1) for batch in batches], 1)
    vae.latent_mean.copy_(raw.mean(1))
    vae.latent_std.copy_(raw.std(1))


def build_vae(config: VAEConfig) -> TinyVAE:
    """Make the VAE of a config, or load the one that training starts from; ValueError if that is of another kind."""
    if config.init_from is None:
        return TinyVAE(**asdict(config.model))
    vae = load_vae(config.init_from, key="init_from")
    if not isinstance(vae, TinyVAE):
        raise ValueError(
            f"init_from={config.init_from!r} is a VAE of diffusers; give the folder of a tiny VAE, or tiny."
        )
    if asdict(config.model) not in (asdict(TinyVAEConfig()), {key: vae.config[key] for key in asdict(config.model)}):
        raise ValueError(f"model.* has other sizes than the VAE of init_from={config.init_from!r}; leave model.* out.")
    vae.requires_grad_(True).train()
    if config.train.decoder_only:
        vae.encoder.requires_grad_(False)
    return vae


def export(trainer: VAETrainer, config: VAEConfig, pool: ClipPool, held_out: list[np.ndarray], folder: Path) -> dict:
    """Write the EMA weights in 16 bits, with a record of the training; returns the PSNR on held-out clips."""
    with swap_ema(trainer.model, trainer.ema):
        if not config.train.decoder_only:
            measure_latents(trainer.model, pool, config.seed)
        check_finite(trainer.model, f"{folder} was not written; resume an older checkpoint with a lower train.lr")
        scores = evaluate(trainer.model, held_out)
        write_preview(trainer.model, held_out, trainer.folders.output / "reconstructions.png")
        copy.deepcopy(trainer.model).half().save_pretrained(folder)
    settings = asdict(config)
    data = settings["data"]  # file names only, not the folders of this machine
    data["root"], data["images"] = Path(data["root"]).name, [Path(path).name for path in data["images"]]
    write_json(folder / "training.json", {"step": trainer.step, "config": settings, **scores})
    return scores


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train, or export the weights with --export; returns the exit code."""
    parser = command_parser("train-vae", __doc__)
    parser.add_argument("config", help="a path, or the name of a config in the package")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--export", metavar="DIR", type=Path, help="write the EMA weights in 16 bits to DIR and stop")
    args = parser.parse_intermixed_args(argv)
    config = load_typed(VAEConfig, args.config, args.overrides)

    accelerator = build_accelerator(config.train.precision)
    folders = RunFolders(config.name)
    folders.lock()
    try:
        torch.manual_seed(config.seed)
        vae = build_vae(config).to(accelerator.device)
        optimizers = build_optimizers(vae, config.train.optimizer, config.train.lr, config.train.weight_decay)
        resolved = {**to_plain(config), "data_fingerprint": data_fingerprint(config)}
        trainer = VAETrainer(accelerator, folders, vae, optimizers, config=config.train, resolved=resolved)
        checkpoint = find_checkpoint(config.train, folders, resolved, to_plain(VAEConfig()))
        set_aside(config.train, folders, checkpoint)
        if checkpoint is not None:
            trainer.restore(checkpoint)
            print(f"resumed from {checkpoint.path}")
        elif args.export:
            raise ValueError(f"{folders.checkpoints} holds no checkpoint to export; train first, without --export.")
        clips, held_out = read_clips(config)
        images = np.concatenate([read_idx(path) for path in config.data.images]) if config.data.images else None
        pool = ClipPool(clips, images, config.data)
        if args.export:
            print(export(trainer, config, pool, held_out, folder=args.export))
            return 0
        return _train(trainer, config, pool, held_out)
    finally:
        folders.unlock()


def _train(trainer: VAETrainer, config: VAEConfig, pool: ClipPool, held_out: list[np.ndarray]) -> int:
    """Train to the last step, or until a signal; returns the exit code."""

    sheet = trainer.folders.output / "reconstructions.png"

    def reconstruct(vae: TinyVAE, _: Sequence[int] = (0,)) -> list[dict]:
        with trainer.accelerator.autocast():
            write_preview(vae, held_out, sheet)
            return [evaluate(vae, held_out)]

    def say(scores: list[dict], step: int) -> dict[str, Path]:
        Progress.write(f"step {step}: " + ", ".join(f"{key} {value:.2f}" for key, value in scores[0].items()))
        return {"reconstructions": sheet}

    trainer.folders.write_config(config)
    try:
        trainer.previews = Previews(1, reconstruct, say)
        trainer.fit(vae_batches(pool, trainer.model, config, trainer.step))
    except Stopped as stopped:
        print(stopped)
        return stopped.code
    with swap_ema(trainer.model, trainer.ema):
        say(reconstruct(trainer.model), trainer.step)
    return 0

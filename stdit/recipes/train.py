"""Train a diffusion transformer on videos or images; run the same command again to resume.

accelerate launch tools/train.py configs/video.yaml
stdit train configs/image_xl2.yaml data.root=path/to/images
stdit train configs/quickstart.yaml train.steps=100 --print-config
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from omegaconf import OmegaConf
from tqdm import tqdm

from stdit.checkpoint.inflate import inflate, inflated_arguments
from stdit.config import Config, load_typed, to_plain
from stdit.data.datasets import CachedLatents, Dataset, build_dataset
from stdit.data.loader import batches
from stdit.data.samplers import BatchSampler, BucketSampler, PackedSampler, Size, UniformSampler, assign
from stdit.data.video_io import VideoError
from stdit.diffusion.objective import Objective, build_objective
from stdit.model.config import model_arguments
from stdit.model.stdit import STDiT
from stdit.model.trunks import TRUNKS
from stdit.model.unet import UNet
from stdit.precision import resolve
from stdit.recipes import entry
from stdit.recipes.entry import command_parser
from stdit.text import CaptionCache, load_text_encoder
from stdit.training.fit import Stopped, Trainer, averaged
from stdit.training.optim import build_optimizers
from stdit.training.results import export, preview, write_results
from stdit.training.resume import find_checkpoint
from stdit.training.run import RunFolders
from stdit.vae import VideoVAE, load_vae


def build_captions(config: Config, dataset: Dataset, device: torch.device, main: bool) -> CaptionCache | None:
    """The captions of the data as tokens on disk; ValueError if it has none."""
    if config.text.encoder is None:
        return None
    texts = [dataset.caption(i) for i in range(len(dataset))]
    if not any(texts):
        raise ValueError(
            f"text.encoder={config.text.encoder} but no clip of {config.data.root!r} has a caption; give a manifest with "
            "them (and cache latents again), or leave text.encoder out."
        )
    encoder = load_text_encoder(config.text.encoder, device)
    cache = CaptionCache(Path(config.text.cache), encoder)
    if main:
        cache.add(encoder, texts)
    return cache


def build_model(
    config: Config, vae: VideoVAE, dataset: Dataset, objective: Objective, caption_channels: int | None = None
) -> STDiT | UNet:
    """The network, after checking that classes and sizes fit together; model.num_classes=0 leaves labels out."""
    classes = dataset.num_classes if config.model.num_classes is None else config.model.num_classes
    if dataset.num_classes > classes > 0:
        raise ValueError(
            f"model.num_classes={classes} is too few: the data has labels up to {dataset.num_classes - 1}. "
            f"Use model.num_classes={dataset.num_classes}, or null."
        )
    if classes and not dataset.num_classes:
        raise ValueError(
            f"model.num_classes={classes} but the data has no labels; use model.num_classes=0, folders by class or a manifest with labels."
        )
    names = dataset.class_names if classes == dataset.num_classes else None
    told = {
        "in_channels": vae.channels, "num_classes": classes, "learn_sigma": objective.learns_sigma, "class_names": names,
        "caption_channels": caption_channels,
    }  # fmt: skip
    if config.model.network == "unet":
        shape = vae.latent_shape(config.data.num_frames, config.data.height, config.data.width)
        return UNet(**told, sample_size=shape, channels=config.model.unet_channels, layers=config.model.unet_layers)
    arguments = model_arguments(config.model)
    image = STDiT.from_pretrained(config.init_from.path) if config.init_from.path else None
    if image is not None:
        arguments |= inflated_arguments(image, arguments, config.model.depth, config.init_from)
    shape = vae.latent_shape(config.data.num_frames, config.data.height, config.data.width, arguments["patch_size"])
    model = STDiT(**{**arguments, **told, "sample_size": shape})
    if image is not None:
        print(f"from {config.init_from.path}: {inflate(image, model, config.init_from).keeps}")
    if config.model.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def check_batch(config: Config, processes: int) -> None:
    train = config.train
    if config.data.sizes:
        return
    micro = train.micro_batch or -(-train.batch_size // processes)
    if train.batch_size % (micro * processes):
        raise ValueError(
            f"train.batch_size={train.batch_size} is not a multiple of {processes} process(es) times "
            f"train.micro_batch={micro}; use {max(1, round(train.batch_size / (micro * processes))) * micro * processes}."
        )


def build_order(
    config: Config, dataset: Dataset, vae: VideoVAE, patch: tuple[int, int, int], processes: int
) -> BatchSampler:
    """Which clips make up a step: so many of one size, or by a budget of tokens where the data has many sizes."""
    data, train = config.data, config.train
    if not data.sizes:
        if train.tokens is not None:
            raise ValueError(f"train.tokens={train.tokens} is for data.sizes; use train.batch_size, or give sizes.")
        return UniformSampler(config.seed, len(dataset), train.batch_size)
    if train.tokens is None or train.micro_batch is not None:
        raise ValueError("data.sizes need train.tokens, patches of a step, and train.micro_batch=null.")
    if data.packing and "region" in config.objective.active_mask_probs:
        raise ValueError("data.packing=true takes levels by frame; set objective.mask_probs.region=0.")
    sizes = [Size(*size) for size in data.sizes]
    grids = [vae.latent_shape(*size, patch) for size in sizes]
    costs = [math.prod(n // p for n, p in zip(grid, patch, strict=True)) for grid in grids]
    shapes = []
    for index in tqdm(range(len(dataset)), desc="measuring clips", unit="clip", disable=None):
        try:
            shapes.append(dataset.shape(index))
        except VideoError as error:
            shapes.append((0, 1, 1))  # fits nowhere
            print(f"left out: {error}")
    order = (PackedSampler if data.packing else BucketSampler)(
        config.seed, assign(shapes, sizes, config.seed), sizes, costs, train.tokens, processes
    )
    for size, cost in zip(sizes, costs, strict=True):
        print(f"  {size.frames} x {size.height} x {size.width}: {len(order.others(size))} clips of {cost} tokens")
    return order


def check_cache(dataset: Dataset, vae: VideoVAE) -> None:
    if isinstance(dataset, CachedLatents) and dataset.info["vae_fingerprint"] != vae.fingerprint():
        raise ValueError(
            f"the latents in {str(dataset.root)!r} were made with VAE {dataset.info['vae']!r} of other weights than vae.name={vae.name!r}; use that one, or cache again."
        )


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("train", __doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    args = parser.parse_intermixed_args(argv)
    config = load_typed(Config, args.config, args.overrides)
    if args.print_config:
        print(OmegaConf.to_yaml(OmegaConf.structured(config)))
        return 0

    began = time.time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # said outright, or two processes on CPUs would be two runs of one
        mixed_precision={"bf16": "bf16", "fp32": "no"}[resolve(config.train.precision, device)],
        # What the last joint block makes of the text, and a mask's parts without a mask, get no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=TRUNKS[config.model.trunk].idle)],
    )
    check_batch(config, accelerator.num_processes)
    dataset = build_dataset(config.data)
    vae = load_vae(config.vae.name).to(accelerator.device)
    check_cache(dataset, vae)
    objective = build_objective(config.objective)
    set_seed(config.seed)
    with accelerator.main_process_first():
        captions = build_captions(config, dataset, accelerator.device, accelerator.is_main_process)
    channels = None if captions is None else captions.channels
    model = build_model(config, vae, dataset, objective, channels).to(accelerator.device)
    folders = RunFolders(config.name)
    if accelerator.is_main_process:
        folders.claim()
    accelerator.wait_for_everyone()
    order = build_order(config, dataset, vae, model.patch_size, accelerator.num_processes)
    resolved = {**to_plain(config), "vae_fingerprint": vae.fingerprint()}
    checkpoint = find_checkpoint(config.train, folders, resolved, to_plain(Config()), accelerator.is_main_process)
    accelerator.wait_for_everyone()

    trainer = Trainer(
        accelerator, folders, model,
        build_optimizers(model, config.train.optimizer, config.train.lr, config.train.weight_decay),
        objective, vae, model.num_classes, config.train, resolved,
        len(dataset), config.data.max_bad_fraction,
        preview=lambda m, step: preview(m, vae, config, folders, step, dataset), captions=captions,
    )  # fmt: skip
    if checkpoint is not None:
        trainer.restore(checkpoint)
        accelerator.print(f"resumed from {checkpoint.path}")
    if accelerator.is_main_process:
        folders.write_config(config)
    accelerator.print(
        f"{config.name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(dataset)} samples, "
        f"{model.num_classes} classes, {accelerator.num_processes} process(es) on {accelerator.device}, "
        f"{accelerator.mixed_precision if accelerator.mixed_precision != 'no' else 'fp32'}; step {trainer.step} of {config.train.steps}"
    )
    loader = batches(
        dataset, config.seed, config.train.batch_size, trainer.step, config.train.micro_batch,
        accelerator.process_index, accelerator.num_processes, config.data.workers, order,
    )  # fmt: skip
    code = 0
    try:
        trainer.fit(loader)
    except Stopped as stopped:
        accelerator.print(str(stopped))
        code = stopped.code
    if accelerator.is_main_process:
        if not code:
            with averaged(model, trainer.ema):
                export(model, vae, config, folders)
                write_results(model, vae, config, folders, dataset)
        folders.write_summary(
            {
                "name": config.name, "step": trainer.step, "finished": not code, "training_seconds": round(trainer.seconds, 1),
                "seconds_this_time": round(time.time() - began, 1), "parameters": sum(p.numel() for p in model.parameters()),
                "samples_in_data": len(dataset), "skipped_steps": trainer.skipped, "unreadable_files": trainer.bad,
                "processes": accelerator.num_processes, "device": str(accelerator.device), "precision": accelerator.mixed_precision,
                "vae": config.vae.name, "vae_fingerprint": resolved["vae_fingerprint"], "torch": torch.__version__,
            }
        )  # fmt: skip
        folders.release()
        if not code:
            print(
                f"model: {folders.model}   samples: {folders.samples}   curves: {folders.output / 'training_curves.png'}"
            )
    return code


def run(argv: Sequence[str] | None = None) -> int:
    """`main`, with an error that a user can cause printed as one line."""
    return entry.run(main, argv)

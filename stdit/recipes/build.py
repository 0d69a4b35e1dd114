"""Build the parts of a training run from its config: model, captions, order of clips, accelerator."""

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from tqdm import tqdm

from stdit.checkpoint.inflate import inflate, inflated_arguments
from stdit.config import Config
from stdit.data.datasets import CachedLatents, Dataset
from stdit.data.samplers import BatchSampler, BucketSampler, ClipSize, PackedSampler, UniformSampler, assign_buckets
from stdit.data.video_io import VideoError
from stdit.diffusion.objective import Objective
from stdit.model.config import model_arguments
from stdit.model.stdit import STDiT
from stdit.model.unet import UNet
from stdit.precision import Precision, resolve
from stdit.recipes.models import default_device
from stdit.text import CaptionCache, load_text_encoder
from stdit.vae import VideoVAE


def build_accelerator(precision: Precision, unused_parameters: bool = False) -> Accelerator:
    """Accelerate's view of this process. unused_parameters: whether a step may leave some without a gradient (DDP must know)."""
    device = default_device()
    AcceleratorState._reset_state()  # an earlier run in this process may have had a different precision
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # else two processes on CPUs would be two runs of one process
        mixed_precision={"bf16": "bf16", "fp32": "no"}[resolve(precision, device)],
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused_parameters)],
    )


def build_captions(config: Config, dataset: Dataset, device: torch.device, *, main: bool) -> CaptionCache | None:
    """The encoded captions of the data, kept on disk; None without a text encoder. ValueError if no clip has a caption.

    main: whether this is the process that encodes and writes.
    """
    if config.text.encoder is None:
        return None
    texts = [dataset.record(i)["caption"] for i in range(len(dataset))]
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
    """The network of a config. ValueError if its classes do not fit the data; model.num_classes=0 means no labels."""
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
    given = {
        "in_channels": vae.channels, "num_classes": classes, "learn_sigma": objective.learns_sigma, "class_names": names,
        "caption_channels": caption_channels,
    }  # fmt: skip
    if config.model.network == "unet":
        shape = vae.latent_shape(config.data.num_frames, config.data.height, config.data.width)
        return UNet(**given, sample_size=shape, channels=config.model.unet_channels, layers=config.model.unet_layers)
    arguments = model_arguments(config.model)
    image = STDiT.from_pretrained(config.init_from.path) if config.init_from.path else None
    if image is not None:
        arguments |= inflated_arguments(image, arguments, config.model.depth, config.init_from)
    shape = vae.latent_shape(config.data.num_frames, config.data.height, config.data.width, arguments["patch_size"])
    model = STDiT(**{**arguments, **given, "sample_size": shape})
    if image is not None:
        print(f"from {config.init_from.path}: {inflate(image, model, config.init_from).keeps}")
    if config.model.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def check_batch(config: Config, processes: int) -> None:
    """ValueError unless `train.batch_size` divides into micro-batches of all processes."""
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
    config: Config, dataset: Dataset, vae: VideoVAE, *, patch: tuple[int, int, int], processes: int
) -> BatchSampler:
    """The order of clips: `batch_size` clips per step, or a budget of tokens per step where data.sizes has several sizes."""
    data, train = config.data, config.train
    if not data.sizes:
        if train.tokens is not None:
            raise ValueError(f"train.tokens={train.tokens} is for data.sizes; use train.batch_size, or give sizes.")
        return UniformSampler(config.seed, len(dataset), train.batch_size)
    if train.tokens is None or train.micro_batch is not None:
        raise ValueError("data.sizes need train.tokens, patches of a step, and train.micro_batch=null.")
    if data.packing and "region" in config.objective.active_mask_probs:
        raise ValueError("data.packing=true takes levels by frame; set objective.mask_probs.region=0.")
    sizes = [ClipSize(*size) for size in data.sizes]
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
        config.seed, assign_buckets(shapes, sizes, config.seed), sizes, costs, tokens=train.tokens, processes=processes
    )
    for size, cost in zip(sizes, costs, strict=True):
        print(f"  {size.frames} x {size.height} x {size.width}: {len(order.candidates(size))} clips of {cost} tokens")
    return order


def check_cache(dataset: Dataset, vae: VideoVAE) -> None:
    """ValueError if cached latents were made with a different VAE."""
    if isinstance(dataset, CachedLatents) and dataset.info["vae_fingerprint"] != vae.fingerprint():
        raise ValueError(
            f"the latents in {str(dataset.root)!r} were made with VAE {dataset.info['vae']!r} of other weights than vae.name={vae.name!r}; use that one, or cache again."
        )

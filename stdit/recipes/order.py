"""Build the order of a run's clips: which samples make up a step."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from stdit.config import Config
from stdit.data.datasets import Dataset
from stdit.data.samplers import (
    NO_BUCKET,
    BatchSampler,
    BlockedSampler,
    BucketSampler,
    ClipSize,
    PackedSampler,
    UniformSampler,
    WeightedSampler,
    assign_buckets,
)
from stdit.data.video_io import VideoError
from stdit.progress import Progress
from stdit.rng import keyed_rng
from stdit.vae import VideoVAE

# Makes the sampler of the samples [first, end) of a dataset, from a seed and the number of clips in a batch of one size.
MakeSampler = Callable[[int, int, int, int], BatchSampler]


def build_order(
    config: Config, dataset: Dataset, vae: VideoVAE, *, patch: tuple[int, int, int], processes: int
) -> BatchSampler:
    """Build the sampler of batches: `batch_size` clips, or with `data.sizes` `tokens` patches, per step.

    Of several data sets each has its sampler. They are drawn from by their weights, clip by clip, or with `data.sizes`
    step by step.
    """
    make = (
        _of_sizes(config, dataset, vae, patch=patch, processes=processes)
        if config.data.sizes
        else _of_one_size(config, dataset)
    )
    counts = getattr(dataset, "parts", None) or [len(dataset)]
    ends = [0, *np.cumsum(counts).tolist()]
    if len(counts) == 1:
        return make(config.seed, 0, len(dataset), config.train.batch_size)
    names = [one.root or one.source for one in config.data.datasets]
    if 0 in counts:
        raise ValueError(f"no clip of {names[counts.index(0)]!r} is left to train on; hold out fewer, or leave it out.")
    seeds = [int(keyed_rng("order", config.seed, number, 7).integers(2**62)) for number in range(len(counts))]
    samplers = [make(seed, first, end, 1) for seed, (first, end) in zip(seeds, pairwise(ends), strict=True)]
    weights = [one.weight for one in config.data.datasets]
    for name, count, weight in zip(names, counts, weights, strict=True):
        print(f"  {name}: {count} clips, {weight / sum(weights):.1%} of what is drawn")
    draws = 1 if config.data.sizes else config.train.batch_size
    return WeightedSampler(config.seed, samplers, ends[:-1], weights, draws=draws)


def _of_one_size(config: Config, dataset: Dataset) -> MakeSampler:
    """Samplers of clips of the config's size."""
    data, train = config.data, config.train
    if train.tokens is not None:
        raise ValueError(
            f"train.tokens={train.tokens} has no effect without data.sizes; use train.batch_size, or give data.sizes."
        )
    if data.order == "uniform":
        return lambda seed, first, end, batch: UniformSampler(seed, end - first, batch)
    shards = _shards(config, dataset)
    begins = np.concatenate([[0], np.cumsum(shards)])[:-1]

    def blocked(seed: int, first: int, end: int, batch: int) -> BatchSampler:
        whole = (first, end) == (0, len(dataset))
        own = [count for count, begin in zip(shards, begins, strict=True) if count and first <= begin < end]
        return BlockedSampler(seed, shards if whole else own, data.order_window, batch)

    return blocked


def _of_sizes(
    config: Config, dataset: Dataset, vae: VideoVAE, *, patch: tuple[int, int, int], processes: int
) -> MakeSampler:
    """Samplers of clips of the sizes in `data.sizes`."""
    data, train = config.data, config.train
    if data.order == "blocked":
        raise ValueError("data.order=blocked does not go with data.sizes; use data.order=uniform.")
    if train.tokens is None or train.micro_batch is not None:
        raise ValueError(
            "data.sizes needs train.tokens, the number of patches in a step; set it, and train.micro_batch=null."
        )
    if data.packing and "region" in config.objective.active_mask_probs:
        raise ValueError(
            "data.packing=true supports noise levels per frame, not per patch; set objective.mask_probs.region=0."
        )
    tokens = train.tokens
    sizes = [ClipSize(*size) for size in data.sizes]
    grids = [vae.latent_shape(*size, patch) for size in sizes]
    costs = [math.prod(n // p for n, p in zip(grid, patch, strict=True)) for grid in grids]
    shapes, buckets = measure(dataset, sizes, config.seed)
    _tell_short(shapes, sizes, buckets)
    for number, (size, cost) in enumerate(zip(sizes, costs, strict=True)):
        count = int((buckets == number).sum())
        print(f"  {size.frames} x {size.height} x {size.width}: {count} clips of {cost} tokens")
    kind = PackedSampler if data.packing else BucketSampler
    return lambda seed, first, end, batch: kind(
        seed, buckets[first:end], sizes, costs, tokens=tokens, processes=processes
    )


def _shards(config: Config, dataset: Dataset) -> list[int]:
    """The number of samples in each shard of a dataset; ValueError for one that is not in shards."""
    counts = getattr(dataset, "shards", None)
    if not counts:
        raise ValueError(
            f"data.order=blocked is for data in shards (source=latents or tar), which {config.data.root!r} is not; use "
            "data.order=uniform."
        )
    return counts


def measure(
    dataset: Dataset, sizes: Sequence[ClipSize], seed: int, keys: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The (frames, height, width) of every clip (N, 3), and the bucket it is assigned to (N,). keys: see `assign_buckets`."""
    known = dataset.shapes() if hasattr(dataset, "shapes") else None
    if known is not None and getattr(dataset, "fixed_sizes", False):  # cached latents, which cannot be cut
        equal = (known[:, None] == np.array(sizes)[None]).all(-1)
        return known, np.where(equal.any(1), equal.argmax(1), NO_BUCKET)
    if known is not None:
        return known, assign_buckets(known, sizes, seed, keys)
    shapes = []
    for index in Progress(range(len(dataset)), desc="measuring clips", unit="clip", disable=None):
        try:
            shapes.append(dataset.shape(index))
        except VideoError as error:
            shapes.append((0, 1, 1))  # fits no bucket
            print(f"clip left out: {error}")
    return np.array(shapes).reshape(-1, 3), assign_buckets(shapes, sizes, seed, keys)


def _tell_short(shapes: np.ndarray, sizes: Sequence[ClipSize], buckets: np.ndarray) -> None:
    """Say how many clips are too short for the sizes of several frames, and what becomes of them."""
    single = np.array([size.frames == 1 for size in sizes] + [False])  # the last entry is that of NO_BUCKET
    stills = int(((shapes[:, 0] > 1) & single[buckets]).sum())
    left_out = int(((shapes[:, 0] > 0) & (buckets == NO_BUCKET)).sum())
    for count, what in ((stills, "are trained as single frames"), (left_out, "are left out")):
        if count:
            print(
                f"{count} clips are shorter than every size of several frames in data.sizes and {what}; add a shorter size."
            )

"""The steps that a plan counts: which sizes they are of, how many clips they have, and how often each comes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stdit.config import Config
from stdit.data.config import DataConfig
from stdit.data.datasets import Dataset, build_dataset
from stdit.data.folders import is_file
from stdit.data.holdout import split
from stdit.data.index import SUFFIX
from stdit.data.indexed import find_index, read_index
from stdit.data.samplers import NO_BUCKET, BucketSampler, ClipSize
from stdit.model.cost import Shape
from stdit.recipes.order import measure
from stdit.vae import VAEGeometry
from stdit.warn import warn_user


class StepKind(NamedTuple):
    """The steps of one size.

    latent: (T, h, w) of a clip. tokens: of a clip. clips: of a step, on all devices. share: of all steps. known: clips of the
    data that have this size, None if these are not known.
    """

    size: ClipSize
    latent: Shape
    tokens: int
    clips: int
    share: float
    known: int | None


class KnownData(NamedTuple):
    """Data whose rows are known at once, from an index or a cache of latents. trained: the clips that are not held out."""

    dataset: Dataset
    trained: Dataset


def known_data(config: Config) -> KnownData | None:
    """The data of a config if they are known at once, else None. Data that training would refuse are told in a warning."""
    train = config.train
    try:
        dataset = _known_dataset(config.data)
        if dataset is None or not (train.holdout or train.holdout_values):
            return None if dataset is None else KnownData(dataset, dataset)
        return KnownData(dataset, split(dataset, train.holdout, train.holdout_column, train.holdout_values)[0])
    except (ValueError, OSError) as error:
        warn_user(f"training refuses these data: {error}")
        return None


def _known_dataset(data: DataConfig) -> Dataset | None:
    if data.datasets or data.source == "shapes":
        return None
    manifest, root = data.manifest or "", Path(data.root)
    is_index = manifest.endswith(SUFFIX) and any(path.is_file() for path in (Path(manifest), root / manifest))
    if is_index or (not manifest and is_file(root / "cache.json")):
        return build_dataset(data)
    found = find_index(data)
    return None if found is None else read_index(data, found)


def step_kinds(
    config: Config, vae: VAEGeometry, *, patch: Shape, processes: int, dataset: Dataset | None
) -> list[StepKind]:
    """The kinds of steps of a config, the one with the most tokens first; without a dataset all sizes come equally often.

    processes: groups of devices, each of which has clips of its own. dataset: the clips to train on. Of packs, which have clips of
    all sizes, the kinds are of one size each, the longest first, and the shares are those of tokens.
    """
    data, train = config.data, config.train
    if data.sizes and (train.tokens is None or train.micro_batch is not None):
        warn_user("training refuses these settings: data.sizes needs train.tokens, and train.micro_batch=null.")
    if not data.sizes or train.tokens is None:
        size = ClipSize(data.num_frames, data.height, data.width)
        latent, tokens = _grid(size, vae, patch)
        known = None if dataset is None else len(dataset)
        return [StepKind(size, latent, tokens, clips=train.batch_size, share=1.0, known=known)]
    sizes = [ClipSize(*size) for size in data.sizes]
    grids = [_grid(size, vae, patch) for size in sizes]
    costs = [tokens for _, tokens in grids]
    if data.packing and max(costs) > train.tokens // processes:
        warn_user(
            f"training refuses these settings: a clip of {max(costs)} tokens does not fit into a pack of {train.tokens // processes}."
        )
    buckets = np.arange(len(sizes)) if dataset is None else measure(dataset, sizes, config.seed)[1]
    counts = np.bincount(buckets[buckets != NO_BUCKET], minlength=len(sizes))
    if not counts.sum():
        raise ValueError("no clip of the data is as long as one of data.sizes; add a shorter size.")
    if dataset is None or data.packing:
        clips = [max(1, train.tokens // (cost * processes)) * processes for cost in costs]
        weights = counts * np.array(costs) if data.packing else counts
    else:
        sampler = BucketSampler(config.seed, buckets, sizes, costs, tokens=train.tokens, processes=processes)
        clips, weights = sampler.batch_sizes, np.diff(sampler.begins)
    shares = weights / weights.sum()
    kinds = [
        StepKind(
            size,
            latent,
            tokens,
            clips=clips[i],
            share=float(shares[i]),
            known=None if dataset is None else int(counts[i]),
        )
        for i, (size, (latent, tokens)) in enumerate(zip(sizes, grids, strict=True))
        if shares[i]
    ]
    if data.packing:
        return sorted(kinds, key=lambda kind: kind.tokens, reverse=True)
    return sorted(kinds, key=lambda kind: (kind.clips * kind.tokens, kind.tokens), reverse=True)


def _grid(size: ClipSize, vae: VAEGeometry, patch: Shape) -> tuple[Shape, int]:
    """The latent shape of a clip, and its tokens."""
    latent = vae.latent_shape(*size, patch)
    return latent, math.prod(n // p for n, p in zip(latent, patch, strict=True))


def usable_clips(config: Config, known: KnownData, kinds: Sequence[StepKind]) -> tuple[int, int, int]:
    """How many clips cannot be read, how many are shorter than the shortest size, and how many are left to train on."""
    index = getattr(known.dataset, "index", None)
    if index is None:
        return 0, 0, len(known.trained)
    frames = index.shapes(config.data.fps)[:, 0]
    short = (frames > 0) & (frames < min(kind.size.frames for kind in kinds))
    usable = (frames > 0) & ~short
    chosen = getattr(known.trained, "indices", slice(None))
    return int((frames == 0).sum()), int(short.sum()), int(usable[chosen].sum())


def data_lines(config: Config, known: KnownData | None, kinds: Sequence[StepKind]) -> list[str]:
    """Lines with the clips of the data, and with those of each size."""
    data, lines = config.data, []
    if known is not None:
        lines.append(f"data          {_counted(config, known, kinds)}")
    if data.sizes and config.train.tokens is not None:
        for kind in kinds:
            size = f"{kind.size.frames} x {kind.size.height} x {kind.size.width}"
            count = "" if kind.known is None else f"{kind.known:,} clips, "
            share = "of the tokens" if data.packing else "of steps"
            most = "at most " if data.packing else ""
            lines.append(
                f"  {size:<18}{count}{kind.tokens:,} tokens each; {most}{kind.clips:,} in a step, {kind.share:.0%} {share}"
            )
    return lines


def _counted(config: Config, known: KnownData, kinds: Sequence[StepKind]) -> str:
    """How many clips the data have, how many of them training leaves out, and how often it draws each of the others."""
    data, dataset = config.data, known.dataset
    unread, short, count = usable_clips(config, known, kinds)
    index = getattr(dataset, "index", None)
    said = f"{len(dataset):,} clips of {data.manifest or data.root if index is None else index.path}"
    if index is not None:
        said += f", {float(np.asarray(index.columns['last']).sum()) / 3600:,.1f} hours"
    said += f"; {unread:,} cannot be read" * bool(unread)
    said += f"; {short:,} are shorter than {min(kind.size.frames for kind in kinds)} frames" * bool(short)
    held_out = len(dataset) - len(known.trained)
    said += f"; {held_out:,} are held out" * bool(held_out)
    if not count:
        return f"{said}; none is left to train on"
    drawn = config.train.steps * sum(kind.share * kind.clips for kind in kinds) / count
    return f"{said}; each of the others is drawn {drawn:,.1f} times in {config.train.steps:,} steps"

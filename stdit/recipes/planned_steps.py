"""The steps that a plan counts: which sizes they are of, how many clips they have, and how often each comes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stdit.config import Config
from stdit.data.datasets import Dataset, build_dataset
from stdit.data.folders import is_file
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


def known_dataset(config: Config) -> Dataset | None:
    """The dataset of a config if its rows are known at once, from an index or a cache of latents; else None.

    One that training would refuse is told in a warning.
    """
    data = config.data
    if data.datasets or data.source == "shapes":
        return None
    manifest = None if data.manifest is None else Path(data.manifest)
    try:
        if manifest is not None and manifest.suffix == SUFFIX and manifest.is_file():
            return build_dataset(data)
        if manifest is None and is_file(Path(data.root) / "cache.json"):
            return build_dataset(data)
        found = find_index(data)
        return None if found is None else read_index(data, found)
    except (ValueError, OSError) as error:
        warn_user(f"training refuses these data: {error}")
        return None


def step_kinds(
    config: Config, vae: VAEGeometry, *, patch: Shape, processes: int, dataset: Dataset | None
) -> list[StepKind]:
    """The kinds of steps of a config, the one with the most tokens first; without a dataset all sizes come equally often.

    processes: groups of devices, each of which has clips of its own.
    """
    data, train = config.data, config.train
    if not data.sizes or train.tokens is None:
        size = ClipSize(data.num_frames, data.height, data.width)
        latent, tokens = _grid(size, vae, patch)
        known = None if dataset is None else len(dataset)
        return [StepKind(size, latent, tokens, clips=train.batch_size, share=1.0, known=known)]
    sizes = [ClipSize(*size) for size in data.sizes]
    grids = [_grid(size, vae, patch) for size in sizes]
    costs = [tokens for _, tokens in grids]
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
    return sorted(kinds, key=lambda kind: (kind.clips * kind.tokens, kind.tokens), reverse=True)


def _grid(size: ClipSize, vae: VAEGeometry, patch: Shape) -> tuple[Shape, int]:
    """The latent shape of a clip, and its tokens."""
    latent = vae.latent_shape(*size, patch)
    return latent, math.prod(n // p for n, p in zip(latent, patch, strict=True))


def data_lines(config: Config, dataset: Dataset | None, kinds: Sequence[StepKind]) -> list[str]:
    """Lines with the clips of the data, and with those of each size."""
    lines = []
    if dataset is not None:
        lines.append(f"data          {_counted(config, dataset, kinds)}")
    if config.data.sizes:
        for kind in kinds:
            size = f"{kind.size.frames} x {kind.size.height} x {kind.size.width}"
            count = "" if kind.known is None else f"{kind.known:,} clips, "
            lines.append(
                f"  {size:<18}{count}{kind.tokens:,} tokens each; {kind.clips:,} in a step, {kind.share:.0%} of steps"
            )
    return lines


def _counted(config: Config, dataset: Dataset, kinds: Sequence[StepKind]) -> str:
    """How many clips the data have, how many of them training leaves out, and how often it draws each of the others."""
    data = config.data
    counts = f"{len(dataset):,} clips of {data.manifest or data.root}"
    index, usable = getattr(dataset, "index", None), len(dataset)
    if index is not None:
        frames = index.shapes(data.fps)[:, 0]
        least = min(kind.size.frames for kind in kinds)
        unread, short = int((frames == 0).sum()), int(((frames > 0) & (frames < least)).sum())
        usable -= unread + short
        hours = float(np.asarray(index.columns["last"]).sum()) / 3600
        counts = f"{len(dataset):,} clips of {index.path}, {hours:,.1f} hours"
        counts += f"; {unread:,} cannot be read" * bool(unread)
        counts += f"; {short:,} are shorter than {least} frames" * bool(short)
    drawn = config.train.steps * sum(kind.share * kind.clips for kind in kinds) / max(1, usable)
    return f"{counts}; each is drawn {drawn:,.1f} times in {config.train.steps:,} steps"

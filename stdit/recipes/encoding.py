"""Clips to latents: read by threads, encoded by a VAE, with the conditions that belong to them."""

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from stdit.conditions import CONDITIONERS
from stdit.config import Config
from stdit.data.datasets import Dataset
from stdit.data.loader import conditions_of_sample
from stdit.data.samplers import ClipSize
from stdit.data.tensor_rows import draw_latents
from stdit.data.video_io import VideoError
from stdit.pixels import to_float
from stdit.precision import Precision, autocast
from stdit.rng import keyed_normal, keyed_rng
from stdit.vae import VideoVAE

_MOST_PIXELS = 1 << 22  # of clips that are encoded at a time on CPUs, which bounds the memory


class Shard(NamedTuple):
    """The latents of a part of the data.

    tensors: name -> (N, C, T, h, w), see `_encode`. indices: of the N clips in the dataset. conditions: raw
    conditions of each clip. bad: unreadable file -> the reason. waited: seconds spent waiting for data.
    """

    tensors: dict[str, torch.Tensor]
    indices: list[int]
    conditions: list[dict]
    bad: dict[str, str]
    waited: float


class Draw(NamedTuple):
    """What the random choices of a clip depend on besides the seed: a number of the clip, and which of its windows it is."""

    clip: int
    window: int


class Form(NamedTuple):
    """How clips are stored: data type of latents, the precision they are computed in, columns for hold-outs, the posterior."""

    dtype: torch.dtype = torch.float16
    precision: Precision = "auto"
    columns: tuple[str, ...] = ()
    posterior: str = "mean"

    @classmethod
    def of(cls, config: Config) -> "Form":
        """That of a config: float32 is also computed in float32, as everything is with train.precision=fp32."""
        dtype = getattr(torch, config.data.cache_dtype)
        precision = "fp32" if dtype == torch.float32 else config.train.precision
        column = config.train.holdout_column
        return cls(dtype, precision, () if column is None else (column,), config.data.cache_posterior)


def encode_shard(
    dataset: Dataset,
    vae: VideoVAE,
    indices: Sequence[int],
    *,
    draws: Sequence[Draw],
    seed: int,
    size: ClipSize | None = None,
    form: Form,
) -> Shard:
    """Read and encode clips. Threads read the next clips meanwhile, since video decoding releases Python's lock.

    draws: of each of the clips.
    """
    latents: list[dict[str, torch.Tensor]] = []
    encoded: list[int] = []
    conditions: list[dict] = []
    bad: dict[str, str] = {}
    waited = 0.0

    draw_of = dict(zip(indices, draws, strict=True))

    def read(index: int) -> dict[str, Any] | VideoError:
        try:
            sample = dataset.load(index, keyed_rng("sample", seed, *draw_of[index]), size)
            return {**sample, "stored": stored_conditions(dataset, index, sample)}
        except VideoError as error:
            return error

    chunks = [indices[i : i + 32] for i in range(0, len(indices), 32)]
    with ThreadPoolExecutor(3) as pool:
        ahead = deque([pool.submit(read, i) for i in chunk] for chunk in chunks[:4])
        for number, chunk in enumerate(chunks):
            futures = ahead.popleft()
            ahead.extend([pool.submit(read, i) for i in later] for later in chunks[number + 4 : number + 5])
            began = time.perf_counter()
            samples = dict(zip(chunk, (future.result() for future in futures), strict=True))
            waited += (time.perf_counter() - began) * (number > 0)  # nothing is encoded while the first clips are read
            bad |= {dataset.name(i): str(sample) for i, sample in samples.items() if isinstance(sample, VideoError)}
            good = {i: sample for i, sample in samples.items() if not isinstance(sample, VideoError)}
            if good:
                pixels = torch.stack([sample["pixels"] for sample in good.values()])
                keys: list[tuple[int, ...]] = [(seed, *draw_of[i]) for i in good]
                encode = _encode_each if vae.device.type == "cpu" else _encode
                latents.append(encode(vae, pixels, form, keys))
                encoded += list(good)
                conditions += [sample["stored"] for sample in good.values()]
    tensors = {name: torch.cat([part[name] for part in latents]) for name in (latents[0] if latents else ())}
    return Shard(tensors or {"latents": torch.zeros(0)}, encoded, conditions, bad=bad, waited=waited)


def stored_conditions(dataset: Dataset, index: int, sample: dict) -> dict:
    """The raw conditions that a shard stores besides labels and captions; those of the clip itself are not stored."""
    read = conditions_of_sample(dataset, index, sample)
    return {name: value for name, value in read.items() if CONDITIONERS[name].stored and value is not None}


def _encode_each(
    vae: VideoVAE, pixels: torch.Tensor, form: Form, keys: list[tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """Encode clips as `_encode`, each alone, since sums depend on the batch: a clip encoded again has the latents of before.

    A small clip is too little work for all threads of torch, so each thread encodes another clip where the VAE allows it.
    Sums depend on a clip's threads as well, so these depend on its size, and not on how many clips there are.
    """
    threads = torch.get_num_threads()
    workers = max(1, min(threads, _MOST_PIXELS // pixels[0, ..., 0].numel())) if vae.reentrant else 1

    def encode(i: int) -> dict[str, torch.Tensor]:
        return _encode(vae, pixels[i : i + 1], form, keys[i : i + 1])

    if workers == 1:
        parts = [encode(i) for i in range(len(pixels))]
    else:
        try:  # the number of threads holds for the thread that sets it, and for those that begin later
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
                parts = list(pool.map(encode, range(len(pixels))))
        finally:
            torch.set_num_threads(threads)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@torch.no_grad()
def _encode(vae: VideoVAE, pixels: torch.Tensor, form: Form, keys: list[tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Encode clips (N, F, H, W, 3) uint8 into tensors (N, C, T, h, w).

    latents: of the whole clips. reencoded: each latent frame, encoded as the start of a segment. With `posterior="moments"`
    their deviations, too. keys: what the draws of `posterior="sample"` depend on.
    """
    batch = to_float(pixels.to(vae.device)).to(vae.dtype)
    moments = form.posterior != "mean"
    with autocast(form.precision, vae.device):
        latents = vae.encode_moments(batch) if moments else vae.encode(batch)
        groups = [vae.frames_of_latent(batch, t) for t in range(1, latents.shape[2])]
        heads = (  # an image has no groups
            vae.encode_segment(torch.cat(groups), moments=moments).split(len(batch)) if groups else ()
        )
    found = {"latents": latents.cpu(), "reencoded": torch.cat([latents[:, :, :1], *heads], dim=2).cpu()}
    if moments:
        halves = {name: both.chunk(2, dim=1) for name, both in found.items()}
        found = {
            name + end: half for name, both in halves.items() for end, half in zip(("", "_std"), both, strict=True)
        }
    if form.posterior == "sample":
        found = draw_latents(found, keyed_normal("posterior", keys, tuple(found["latents"].shape[1:])))
    tensors = {name: value.to(form.dtype) for name, value in found.items()}
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError(
            f"VAE {vae.name!r} gave latents that are not finite in {form.dtype}; set data.cache_dtype=float32."
        )
    return tensors

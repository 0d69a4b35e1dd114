"""Encode the clips of a config once, so that training reads latents instead of video.

    stdit cache-latents quickstart data.root=data/shapes data.manifest=data/shapes/manifest.jsonl data.source=videos --output data/shapes_latents

Several processes can share the work (torchrun). Every shard is written under a temporary name, hashed and renamed. If
the command is run again, finished shards are not encoded again.
"""

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from stdit.conditions import CONDITIONERS
from stdit.config import Config, load_typed
from stdit.data.datasets import Dataset, build_dataset
from stdit.data.loader import conditions_of_sample
from stdit.data.video_io import VideoError
from stdit.files import atomic_write, write_text
from stdit.pixels import to_float
from stdit.precision import autocast
from stdit.recipes.entry import command, command_parser
from stdit.recipes.models import default_device
from stdit.rng import keyed_rng
from stdit.vae import VideoVAE, load_vae


class Shard(NamedTuple):
    """The latents of a part of the data.

    tensors: name -> (N, C, T, h, w) float16, see `_encode`. indices: of the N clips in the dataset. conditions: raw
    conditions of each clip. bad: unreadable file -> the reason. waited: seconds spent waiting for data.
    """

    tensors: dict[str, torch.Tensor]
    indices: list[int]
    conditions: list[dict]
    bad: dict[str, str]
    waited: float


def encode_shard(dataset: Dataset, vae: VideoVAE, indices: Sequence[int], *, seed: int) -> Shard:
    """Read and encode clips. Threads read the next clips meanwhile, since video decoding releases Python's lock."""
    latents: list[dict[str, torch.Tensor]] = []
    encoded: list[int] = []
    conditions: list[dict] = []
    bad: dict[str, str] = {}
    waited = 0.0

    def read(index: int) -> dict[str, Any] | VideoError:
        try:
            return dataset.load(index, keyed_rng("sample", seed, index))
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
            waited += (time.perf_counter() - began) * (
                number > 0
            )  # not for the first clips, which no encoding can overlap
            bad |= {dataset.name(i): str(sample) for i, sample in samples.items() if isinstance(sample, VideoError)}
            good = {i: sample for i, sample in samples.items() if not isinstance(sample, VideoError)}
            if good:
                latents.append(_encode(vae, torch.stack([sample["pixels"] for sample in good.values()])))
                encoded += list(good)
                conditions += [stored_conditions(dataset, i, sample) for i, sample in good.items()]
    tensors = {name: torch.cat([part[name] for part in latents]) for name in (latents[0] if latents else ())}
    return Shard(tensors or {"latents": torch.zeros(0)}, encoded, conditions, bad=bad, waited=waited)


def stored_conditions(dataset: Dataset, index: int, sample: dict) -> dict:
    """The raw conditions that a shard stores besides labels and captions; those of the clip itself are not stored."""
    read = conditions_of_sample(dataset, index, sample)
    return {name: value for name, value in read.items() if CONDITIONERS[name].stored and value is not None}


@torch.no_grad()
def _encode(vae: VideoVAE, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Encode clips (N, F, H, W, 3) uint8 into float16 tensors (N, C, T, h, w).

    latents: of the whole clips. reencoded: each latent frame, encoded as the start of a segment.
    """
    batch = to_float(pixels.to(vae.device)).to(vae.dtype)
    with autocast("auto", vae.device):
        latents = vae.encode(batch)
        groups = [vae.frames_of_latent(batch, t) for t in range(1, latents.shape[2])]
        heads = vae.encode_segment(torch.cat(groups)) if groups else latents[:0]
    heads = torch.cat([latents[:, :, :1], *heads.split(len(batch))], dim=2)
    if not torch.isfinite(latents).all() or not torch.isfinite(heads).all():
        raise ValueError(f"VAE {vae.name!r} gave latents that are not finite; use the VAE in float32.")
    return {"latents": latents.half().cpu(), "reencoded": heads.half().cpu()}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Encode the missing shards of this process; the last process to finish writes cache.json."""
    parser = command_parser("cache-latents", __doc__)
    parser.add_argument("config", help="a path, or the name of a config in the package")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--output", required=True, type=Path, help="folder for the latents; data.root of the training")
    parser.add_argument("--shard-size", type=int, default=1024, help="clips per file")
    args = parser.parse_intermixed_args(argv)
    config = load_typed(Config, args.config, args.overrides)
    if config.data.source == "latents":
        config.data.source = "auto"
    dataset = build_dataset(config.data)
    if args.output.resolve() == Path(config.data.root).resolve():
        raise ValueError(
            f"--output {args.output} is data.root itself; set data.root=FOLDER to the folder of the clips."
        )
    vae = load_vae(config.vae.name).to(default_device())
    vae.latent_shape(config.data.num_frames, config.data.height, config.data.width)  # raises for sizes that do not fit
    source = {key: getattr(config.data, key) for key in SOURCE_KEYS}
    head = {
        "vae": config.vae.name, "vae_fingerprint": vae.fingerprint(), "seed": config.seed, "clips": len(dataset),
        "num_classes": dataset.num_classes, "class_names": dataset.class_names, "shard_size": args.shard_size, "tensors": ["latents", "reencoded"], **source,
    }  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    check_settings(args.output, head)
    write_shards(args.output, dataset, vae, shard_size=args.shard_size, seed=config.seed)
    return write_index(args.output, head)


# The keys of the data config on which latents depend; --shard-size and seed are checked as well.
SOURCE_KEYS = ("root", "manifest", "num_frames", "height", "width", "fps", "crop")


def check_settings(output: Path, head: dict) -> None:
    """Raise ValueError if the folder has latents of other settings; a run with the same settings adds to them."""
    path = output / "settings.json"
    if not path.is_file():
        write_text(path, json.dumps(head))
    elif (found := json.loads(path.read_text())) != head:
        changed = [key for key in head if found.get(key) != head[key]]
        raise ValueError(
            f"{output} holds latents made with other settings ({', '.join(changed)}); choose another --output, or remove it."
        )


def _rank() -> tuple[int, int]:
    """The index of this process and the number of processes, as torchrun sets them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def write_shards(output: Path, dataset: Dataset, vae: VideoVAE, *, shard_size: int, seed: int) -> None:
    """Encode the shards of this process that are missing or damaged."""
    (rank, world), waited, began = _rank(), 0.0, time.perf_counter()
    starts = range(0, len(dataset), shard_size)
    for start in tqdm(starts[rank::world], unit="shard", desc="encoding", disable=rank > 0):
        name = f"latents-{start // shard_size:05d}"
        if _is_complete(output, name):
            continue
        shard = encode_shard(dataset, vae, range(start, min(start + shard_size, len(dataset))), seed=seed)
        waited += shard.waited
        file = output / f"{name}.safetensors"
        with atomic_write(file) as tmp:
            save_file(shard.tensors, tmp)
            digest = hashlib.sha256(tmp.read_bytes()).hexdigest()
        rows = [dataset.record(i) for i in shard.indices]
        record = {
            "file": file.name, "count": len(rows), "sha256": digest, "bad": shard.bad,
            "labels": [row["label"] for row in rows], "captions": [row["caption"] for row in rows], "conditions": shard.conditions,
        }  # fmt: skip
        write_text(output / f"{name}.json", json.dumps(record))
    if not rank:
        print(f"waited {waited:.1f} s of {time.perf_counter() - began:.1f} s for data")


def write_index(output: Path, head: dict) -> int:
    """Write cache.json if every shard is written, which holds in the last process to finish. Returns the exit code."""
    shards = [output / f"latents-{i:05d}.json" for i in range(-(-head["clips"] // head["shard_size"]))]
    if not all(path.is_file() for path in shards):
        print(f"process {_rank()[0]} is done; the last process to finish writes {output / 'cache.json'}")
        return 0
    records = [json.loads(path.read_text()) for path in shards]
    bad = {name: reason for record in records for name, reason in record.pop("bad").items()}
    if not any(record["count"] for record in records):
        raise ValueError(
            f"none of the {head['clips']} clips could be read; stdit check-media lists the reasons, the first is: {next(iter(bad.values()))}"
        )
    write_text(output / "cache.json", json.dumps({**head, "shards": records, "skipped": bad}))
    for reason in list(bad.values())[:10]:
        print(f"skipped a file: {reason}")
    skipped = f"; {len(bad)} skipped" if bad else ""
    print(f"{head['clips'] - len(bad)} clips as latents of {head['vae']!r} in {output}{skipped}")
    return 0


def _is_complete(output: Path, name: str) -> bool:
    """Whether a shard exists and its file matches the recorded hash."""
    record, file = output / f"{name}.json", output / f"{name}.safetensors"
    if not (record.is_file() and file.is_file()):
        return False
    return hashlib.sha256(file.read_bytes()).hexdigest() == json.loads(record.read_text())["sha256"]

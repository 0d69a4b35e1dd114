"""Encode a config's clips once, so that training reads latents instead of video.

    stdit cache-latents configs/quickstart.yaml data.root=data/shapes data.source=auto --output data/shapes_latents

Several processes may share the work (torchrun, or the same command started twice): every shard is written beside,
hashed and renamed; finished shards are kept when the command is run again.
"""

import hashlib
import json
import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from stdit.conditions import CONDITIONERS
from stdit.config import Config, load_typed
from stdit.data.datasets import build_dataset
from stdit.data.loader import conditions_of_sample
from stdit.data.video_io import VideoError
from stdit.precision import autocast
from stdit.recipes.entry import command_parser
from stdit.rng import keyed_rng
from stdit.training.run import write_text
from stdit.vae import load_vae


def encode_shard(
    dataset, vae, indices: list[int], seed: int, device: str
) -> tuple[dict[str, torch.Tensor], list[int], list[dict], dict[str, str], float]:
    """Latents and restarts (N, C, T, h, w) float16, the clips they are of, the unreadable files, and the seconds waited for data.

    Threads read the next clips while these are encoded (decoding leaves Python's lock).
    """
    latents: list[dict[str, torch.Tensor]] = []
    kept: list[int] = []
    further: list[dict] = []
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
            waited += (time.perf_counter() - began) * (number > 0)  # the first clips have nothing to hide behind
            bad |= {dataset.name(i): str(sample) for i, sample in samples.items() if isinstance(sample, VideoError)}
            good = {i: sample for i, sample in samples.items() if not isinstance(sample, VideoError)}
            if good:
                latents.append(_encode(vae, torch.stack([sample["pixels"] for sample in good.values()]), device))
                kept += list(good)
                further += [stored_conditions(dataset, i, sample) for i, sample in good.items()]
    tensors = {name: torch.cat([part[name] for part in latents]) for name in (latents[0] if latents else ())}
    return tensors or {"latents": torch.zeros(0)}, kept, further, bad, waited


def stored_conditions(dataset, index: int, sample: dict) -> dict:
    """Raw conditions that a shard keeps beside labels and captions; what follows from the clip itself is not kept."""
    read = conditions_of_sample(dataset, index, sample)
    return {name: value for name, value in read.items() if CONDITIONERS[name].stored and value is not None}


@torch.no_grad()
def _encode(vae, pixels: torch.Tensor, device: str) -> dict[str, torch.Tensor]:
    """A clip's latents, and each frame of them as it is at the head of a run of known frames."""
    batch = (pixels.to(device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1).to(vae.dtype)
    with autocast("auto", device):
        latents = vae.encode(batch)
        groups = [vae.frames_of_latent(batch, t) for t in range(1, latents.shape[2])]
        heads = vae.encode_segment(torch.cat(groups)) if groups else latents[:0]
    heads = torch.cat([latents[:, :, :1], *heads.split(len(batch))], dim=2)
    if not torch.isfinite(latents).all() or not torch.isfinite(heads).all():
        raise ValueError(f"VAE {vae.name!r} gave latents that are not finite; use it in float32.")
    return {"latents": latents.half().cpu(), "reencoded": heads.half().cpu()}


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("cache-latents", __doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--output", required=True, help="folder for the latents; set data.root to it when training")
    parser.add_argument("--shard-size", type=int, default=1024, help="clips a file")
    args = parser.parse_intermixed_args(argv)
    config = load_typed(Config, args.config, args.overrides)
    if config.data.source == "latents":
        config.data.source = "auto"
    dataset = build_dataset(config.data)
    output = Path(args.output)
    if output.resolve() == Path(config.data.root).resolve():
        raise ValueError(f"--output {output} is data.root itself; override data.root=FOLDER with the folder of clips.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = load_vae(config.vae.name).to(device)
    vae.latent_shape(config.data.num_frames, config.data.height, config.data.width)
    source = {
        key: getattr(config.data, key) for key in ("root", "manifest", "num_frames", "height", "width", "fps", "crop")
    }
    head = {
        "vae": config.vae.name, "vae_fingerprint": vae.fingerprint(), "seed": config.seed, "clips": len(dataset),
        "num_classes": dataset.num_classes, "class_names": dataset.class_names, "shard_size": args.shard_size, "tensors": ["latents", "reencoded"], **source,
    }  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    _check_same(output, head)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    waited, began = 0.0, time.perf_counter()
    starts = range(0, len(dataset), args.shard_size)
    progress = tqdm(starts[rank::world], unit="shard", desc="encoding", disable=rank > 0)
    for start in progress:
        name = f"latents-{start // args.shard_size:05d}"
        if _whole(output, name):
            continue
        indices = list(range(start, min(start + args.shard_size, len(dataset))))
        latents, kept, further, bad, seconds = encode_shard(dataset, vae, indices, config.seed, device)
        waited += seconds
        beside = output / f".{os.getpid()}-{name}.safetensors"
        save_file(latents, beside)
        digest = hashlib.sha256(beside.read_bytes()).hexdigest()
        beside.replace(output / f"{name}.safetensors")
        records = [dataset.record(i) for i in kept]
        record = {
            "file": f"{name}.safetensors", "count": len(kept), "sha256": digest, "bad": bad,
            "labels": [record["label"] for record in records], "captions": [record["caption"] for record in records],
            "conditions": further,
        }  # fmt: skip
        write_text(output / f"{name}.json", json.dumps(record))
    shards = [output / f"latents-{i:05d}.json" for i in range(len(starts))]
    if not all(path.is_file() for path in shards):
        print(f"process {rank}: done; the last process to finish writes {output / 'cache.json'}")
        return 0
    records = [json.loads(path.read_text()) for path in shards]
    bad = {name: reason for record in records for name, reason in record.pop("bad").items()}
    if not any(record["count"] for record in records):
        raise ValueError(f"none of the {len(dataset)} clips could be read; the first: {next(iter(bad.values()))}")
    write_text(output / "cache.json", json.dumps({**head, "shards": records, "skipped": bad}))
    for reason in list(bad.values())[:10]:
        print(f"skipped a file: {reason}")
    print(f"waited {waited:.1f} s of {time.perf_counter() - began:.1f} s for data")
    print(
        f"{len(dataset) - len(bad)} clips as latents of {config.vae.name!r} in {output}"
        + (f"; {len(bad)} skipped" if bad else "")
    )
    return 0


def _check_same(output: Path, head: dict) -> None:
    """A folder holds latents of one VAE and one selection; a second run with the same adds to it."""
    path = output / "settings.json"
    if not path.is_file():
        write_text(path, json.dumps(head))
    elif (made := json.loads(path.read_text())) != head:
        changed = [key for key in head if made.get(key) != head[key]]
        raise ValueError(
            f"{output} holds latents made with other settings ({', '.join(changed)}); choose another --output, or remove it."
        )


def _whole(output: Path, name: str) -> bool:
    record, file = output / f"{name}.json", output / f"{name}.safetensors"
    if not (record.is_file() and file.is_file()):
        return False
    return hashlib.sha256(file.read_bytes()).hexdigest() == json.loads(record.read_text())["sha256"]

"""Encode the clips of a config once, so that training reads latents instead of video: windows of each clip, drawn by seed.

    stdit cache-latents quickstart data.root=data/shapes data.manifest=data/shapes/manifest.jsonl data.source=videos --output data/shapes_latents

Several processes can share the work (torchrun, or the same command started twice): every shard is written under a
temporary name, hashed and renamed. With text.encoder they encode the captions too, which training finds in text.cache.
The same command, run again, encodes only clips that are new or that changed, and takes over changed labels and captions.
"""

import json
import os
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from stdit.conditions import CONDITIONERS
from stdit.config import Config, load_typed
from stdit.data.config import DataConfig
from stdit.data.datasets import Dataset, build_dataset
from stdit.data.identity import columns_of, hash_of, identity_of
from stdit.data.loader import conditions_of_sample
from stdit.data.rates import clip_rate
from stdit.data.samplers import NO_BUCKET, ClipSize
from stdit.data.variants import ClipVariants
from stdit.data.video_io import VideoError
from stdit.files import atomic_write, claimed, write_text
from stdit.hashes import difference, file_sha256
from stdit.pixels import to_float
from stdit.precision import Precision, autocast
from stdit.progress import Progress
from stdit.recipes.build import build_captions
from stdit.recipes.entry import command, command_parser
from stdit.recipes.models import default_device
from stdit.recipes.order import measure
from stdit.rng import keyed_rng
from stdit.vae import VideoVAE, load_vae


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


class Form(NamedTuple):
    """The data type of stored latents, and the precision in which they are computed."""

    dtype: torch.dtype = torch.float16
    precision: Precision = "auto"

    @classmethod
    def of(cls, config: Config) -> "Form":
        """That of a config: float32 is also computed in float32, as everything is with train.precision=fp32."""
        dtype = getattr(torch, config.data.cache_dtype)
        return cls(dtype, "fp32" if dtype == torch.float32 else config.train.precision)


class Part(NamedTuple):
    """The clips of a shard, by their numbers in the dataset, and the size of all of them (None: that of the config)."""

    indices: Sequence[int]
    size: ClipSize | None = None


def encode_shard(
    dataset: Dataset,
    vae: VideoVAE,
    indices: Sequence[int],
    *,
    seed: int,
    size: ClipSize | None = None,
    form: Form,
) -> Shard:
    """Read and encode clips. Threads read the next clips meanwhile, since video decoding releases Python's lock."""
    latents: list[dict[str, torch.Tensor]] = []
    encoded: list[int] = []
    conditions: list[dict] = []
    bad: dict[str, str] = {}
    waited = 0.0

    draw_of = getattr(dataset, "draw_of", int)  # two variants of a clip may share their draws

    def read(index: int) -> dict[str, Any] | VideoError:
        try:
            return dataset.load(index, keyed_rng("sample", seed, draw_of(index)), size)
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
                # Alone on a CPU, where it takes no longer, since sums depend on the batch: a clip that is encoded again
                # has the latents of before.
                together = 1 if vae.device.type == "cpu" else len(pixels)
                latents += [_encode(vae, part, form) for part in pixels.split(together)]
                encoded += list(good)
                conditions += [stored_conditions(dataset, i, sample) for i, sample in good.items()]
    tensors = {name: torch.cat([part[name] for part in latents]) for name in (latents[0] if latents else ())}
    return Shard(tensors or {"latents": torch.zeros(0)}, encoded, conditions, bad=bad, waited=waited)


def stored_conditions(dataset: Dataset, index: int, sample: dict) -> dict:
    """The raw conditions that a shard stores besides labels and captions; those of the clip itself are not stored."""
    read = conditions_of_sample(dataset, index, sample)
    return {name: value for name, value in read.items() if CONDITIONERS[name].stored and value is not None}


@torch.no_grad()
def _encode(vae: VideoVAE, pixels: torch.Tensor, form: Form) -> dict[str, torch.Tensor]:
    """Encode clips (N, F, H, W, 3) uint8 into tensors (N, C, T, h, w).

    latents: of the whole clips. reencoded: each latent frame, encoded as the start of a segment.
    """
    batch = to_float(pixels.to(vae.device)).to(vae.dtype)
    with autocast(form.precision, vae.device):
        latents = vae.encode(batch)
        groups = [vae.frames_of_latent(batch, t) for t in range(1, latents.shape[2])]
        heads = vae.encode_segment(torch.cat(groups)).split(len(batch)) if groups else ()  # an image has no groups
    heads = torch.cat([latents[:, :, :1], *heads], dim=2)
    tensors = {"latents": latents.to("cpu", form.dtype), "reencoded": heads.to("cpu", form.dtype)}
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError(
            f"VAE {vae.name!r} gave latents that are not finite in {form.dtype}; set data.cache_dtype=float32."
        )
    return tensors


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Encode the missing shards of this process; the last process to finish writes cache.json."""
    parser = command_parser("cache-latents", __doc__)
    parser.add_argument("config", help="a path, or the name of a config in the package")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--output", required=True, type=Path, help="folder for the latents; data.root of the training")
    parser.add_argument("--shard-size", type=int, default=1024, help="clips per file")
    parser.add_argument(
        "--freeze-augmentation",
        action="store_true",
        help="allow data.flip and data.crop=random, which are then drawn once for each clip, not anew in every epoch",
    )
    parser.add_argument("--windows", type=int, default=1, help="windows of each clip, drawn by seed")
    parser.add_argument("--mirrored", action="store_true", help="every window also mirrored, in place of data.flip")
    args = parser.parse_intermixed_args(argv)
    config = load_typed(Config, args.config, args.overrides)
    if config.data.source == "latents":
        config.data.source = "auto"
    if config.data.datasets:
        raise ValueError(
            "data.datasets is for training; cache each data set by itself (data.datasets=[] data.root=FOLDER), and then give the "
            "folders of the latents."
        )
    check_augmentation(config.data, frozen=args.freeze_augmentation)
    for name in ("shard_size", "windows"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be >= 1, got {getattr(args, name)}.")
    dataset = build_dataset(config.data)
    if args.output.resolve() == Path(config.data.root).resolve():
        raise ValueError(
            f"--output {args.output} is data.root itself; set data.root=FOLDER to the folder of the clips."
        )
    vae = load_vae(config.vae.name).to(default_device())
    sizes = config.data.sizes or [[config.data.num_frames, config.data.height, config.data.width]]
    for frames, height, width in sizes:
        vae.latent_shape(frames, height, width)  # raises for sizes that do not fit
    if args.windows > 1 or args.mirrored:
        dataset = ClipVariants(dataset, args.windows, args.mirrored)
    head = {
        "vae": config.vae.name, "vae_fingerprint": vae.fingerprint(), "seed": config.seed, "shard_size": args.shard_size,
        "tensors": ["latents", "reencoded"], **{key: getattr(config.data, key) for key in SOURCE_KEYS},
        "windows": args.windows, "mirrored": args.mirrored, "sizes": [list(size) for size in config.data.sizes],
        "dtype": config.data.cache_dtype,
    }  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    check_settings(args.output, head, vae)
    parts = divide(dataset, [ClipSize(*size) for size in config.data.sizes], args.shard_size, seed=config.seed)
    build_captions(config, dataset, default_device(), share=_rank())  # first, since it may find that there are none
    write_shards(args.output, dataset, vae, parts, seed=config.seed, form=Form.of(config))
    return write_index(args.output, head, dataset, parts, rate=clip_rate(config.data, dataset))


def divide(dataset: Dataset, sizes: Sequence[ClipSize], shard_size: int, *, seed: int) -> list[Part]:
    """The clips of each shard: `shard_size` in their order, or, with sizes, of one size each."""
    groups: list[Part] = [Part(range(len(dataset)))]
    if sizes:
        buckets = measure(dataset, sizes, seed)[1]
        groups = [Part(np.flatnonzero(buckets == number).tolist(), size) for number, size in enumerate(sizes)]
        if (short := int((buckets == NO_BUCKET).sum())) > 0:
            print(f"{short} clips are shorter than every size in data.sizes, or cannot be read, and are left out")
    if not any(len(group.indices) for group in groups):
        raise ValueError(
            "none of the clips is long enough for any of data.sizes; add a size with fewer frames (stdit check-media)."
        )
    starts = [(group, start) for group in groups for start in range(0, len(group.indices), shard_size)]
    return [Part(group.indices[start : start + shard_size], group.size) for group, start in starts]


# The keys of the data config on which latents depend; VAE, seed and --shard-size are checked as well.
SOURCE_KEYS = ("root", "manifest", "num_frames", "height", "width", "fps", "crop", "flip")


def check_augmentation(config: DataConfig, frozen: bool) -> None:
    """Refuse what a cache would make the same in every epoch, or, with `frozen`, say that it is."""
    drawn = [("data.flip=true", "data.flip=false")] * config.flip
    drawn += [("data.crop=random", "data.crop=center")] * (config.crop == "random")
    given, plain = (" ".join(choice) for choice in zip(*drawn, strict=True)) if drawn else ("", "")
    if frozen and drawn:
        print(f"{given}: drawn once for each clip and kept, not anew in every epoch")
    elif drawn:
        raise ValueError(
            f"{given} would be drawn once for each clip and then be the same in every epoch; use {plain}, train from the clips "
            "themselves, or pass --freeze-augmentation to have it so."
        )


def check_settings(output: Path, head: dict, vae: VideoVAE) -> None:
    """ValueError if the folder holds latents made with other settings; a run with the same settings adds to them."""
    path = output / "settings.json"
    if not path.is_file():
        write_text(path, json.dumps(head))
        return
    try:
        # What earlier versions did not record.
        found = {
            "flip": False,
            "windows": 1,
            "mirrored": False,
            "sizes": [],
            "dtype": "float16",
            **json.loads(path.read_text()),
        }
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); choose another --output, or remove it.") from error
    if vae.has_fingerprint(str(found.get("vae_fingerprint"))):
        found["vae_fingerprint"] = head["vae_fingerprint"]
    changed = [key for key in head if found.get(key) != head[key]]
    if changed:
        raise ValueError(
            f"{output} holds latents made with other settings ({', '.join(changed)}); choose another --output, or remove it."
        )


def _rank() -> tuple[int, int]:
    """The index of this process and the number of processes, as torchrun sets them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def write_shards(
    output: Path, dataset: Dataset, vae: VideoVAE, parts: Sequence[Part], *, seed: int, form: Form
) -> None:
    """Write the shards of this process, encoding the clips that are new or changed, and those of missing or damaged shards."""
    (rank, world), waited, began = _rank(), 0.0, time.perf_counter()
    done: Counter[str] = Counter()
    for number in Progress(range(len(parts))[rank::world], unit="shard", desc="encoding", disable=rank > 0):
        file = output / f"latents-{number:05d}.safetensors"
        with ExitStack() as claim:
            try:
                claim.enter_context(claimed([file]))
            except ValueError:  # the same command runs twice: the other process has this shard
                done["elsewhere"] += 1
                continue
            waited += _write_shard(file, dataset, vae, parts[number], seed=seed, form=form, done=done)
    if not rank:
        print(f"waited {waited:.1f} s of {time.perf_counter() - began:.1f} s for data")
    if done["elsewhere"]:
        print(f"{done['elsewhere']} shards were being written by another process")
    if done["kept"]:
        print(
            f"{done['kept']} clips kept, {done['encoded']} encoded; labels or captions of {done['annotated']} shards renewed"
        )


def _write_shard(
    file: Path, dataset: Dataset, vae: VideoVAE, part: Part, *, seed: int, form: Form, done: Counter[str]
) -> float:
    """Bring one shard up to date; counts what was done -> seconds spent waiting for data."""
    indices = part.indices
    sources = [[*source_of(dataset, i), *(part.size or ())] for i in indices]
    old = _read_record(file)
    unchanged = {
        i: old["rows"][n] for n, i in enumerate(indices) if n < len(old["rows"]) and old["sources"][n] == sources[n]
    }
    wanted = [i for i in indices if i not in unchanged]
    done.update(kept=len(unchanged), encoded=len(wanted))
    annotations = hash_of([dataset.record(i) for i in indices])
    if not wanted and len(old["rows"]) == len(indices):
        if old["annotations"] != annotations:
            done["annotated"] += 1
            record = {**old, **_annotations(dataset, [i for i in indices if unchanged[i] is not None])}
            write_text(file.with_suffix(".json"), json.dumps({**record, "annotations": annotations}))
        return 0.0
    shard = encode_shard(dataset, vae, wanted, seed=seed, size=part.size, form=form)
    record = _merge(file, old, shard, unchanged=unchanged, indices=indices)
    kept = {dataset.name(i) for i in unchanged}
    bad = {name: reason for name, reason in old["bad"].items() if name in kept}
    record |= {"bad": bad | shard.bad, "sources": sources, "annotations": annotations}
    kept_rows = [number for number, row in enumerate(record["rows"]) if row is not None]
    record |= {"clips": [sources[number][0] for number in kept_rows]}  # what variants of one clip share
    record |= {} if part.size is None else {"size": list(part.size)}
    record |= _annotations(dataset, [i for i, row in zip(indices, record["rows"], strict=True) if row is not None])
    write_text(file.with_suffix(".json"), json.dumps(record))
    return shard.waited


def source_of(dataset: Dataset, index: int) -> list:
    """What a clip's latents and stored conditions are made from: its file, what is in it, and its further columns."""
    one = identity_of(dataset, index, read=True)
    return [one.source, one.content, hash_of(columns_of(one))]


def _annotations(dataset: Dataset, indices: Sequence[int]) -> dict[str, list]:
    rows = [dataset.record(i) for i in indices]
    return {"labels": [row["label"] for row in rows], "captions": [row["caption"] for row in rows]}


def _merge(file: Path, old: dict, shard: Shard, *, unchanged: dict[int, int | None], indices: Sequence[int]) -> dict:
    """Write the tensors of a shard, those of the clips that are kept and of the new ones in the order of `indices`.

    unchanged: index of a clip -> its row in the old shard, None for a file that could not be read. The record that is returned
    has the row of every index in `rows`.
    """
    before = load_file(file) if any(row is not None for row in unchanged.values()) else {}
    new = {i: row for row, i in enumerate(shard.indices)}
    origins = {i: (before, unchanged[i], old["conditions"]) for i in unchanged if unchanged[i] is not None}
    origins |= {i: (shard.tensors, row, shard.conditions) for i, row in new.items()}
    order = [origins[i] for i in indices if i in origins]
    tensors = {
        name: torch.stack([part[name][row] for part, row, _ in order]) for name in (order[0][0] if order else ())
    }
    with atomic_write(file) as tmp:
        save_file(tensors or {"latents": torch.zeros(0)}, tmp)
        digest, size = file_sha256(tmp), tmp.stat().st_size
    numbers = iter(range(len(order)))
    return {
        "file": file.name, "count": len(order), "bytes": size, "sha256": digest,
        "conditions": [conditions[row] for _, row, conditions in order],
        "rows": [next(numbers) if i in origins else None for i in indices],
    }  # fmt: skip


# The record of a shard that is not there.
_NOTHING: dict[str, Any] = {"rows": [], "sources": [], "conditions": [], "bad": {}, "annotations": None}


def _read_record(file: Path) -> dict[str, Any]:
    """The record of a shard; one without rows if it is missing, damaged, or does not say what it was made from."""
    try:
        record = json.loads(file.with_suffix(".json").read_text())
        rows = [row for row in record["rows"] if row is not None]
        whole = (
            len(record["sources"]) == len(record["rows"]) and len(record["conditions"]) == len(rows) == record["count"]
        )
        return {**_NOTHING, **record} if whole and difference(file.parent, {file.name: record}) is None else _NOTHING
    except (OSError, ValueError, KeyError, TypeError):
        return _NOTHING


def write_index(output: Path, head: dict, dataset: Dataset, parts: Sequence[Part], *, rate: float) -> int:
    """Write cache.json once every shard is there and of this data (the last process does). rate: frames per second."""
    records = []
    for number, part in enumerate(parts):
        path = output / f"latents-{number:05d}.json"
        record = json.loads(path.read_text()) if path.is_file() else {}
        if record.get("annotations") != hash_of([dataset.record(i) for i in part.indices]):
            print(f"process {_rank()[0]} is done; the last process to finish writes {output / 'cache.json'}")
            return 0
        index = {key: value for key, value in record.items() if key not in ("rows", "annotations")}
        records.append({**index, "sources": hash_of(record["sources"])})
    bad = {name: reason for record in records for name, reason in record.pop("bad").items()}
    if not any(record["count"] for record in records):
        raise ValueError(
            f"none of the {len(dataset)} clips could be read; stdit check-media lists the reasons, the first is: {next(iter(bad.values()))}"
        )
    classes = {"num_classes": dataset.num_classes, "class_names": dataset.class_names}
    space = getattr(dataset, "action_space", None)
    classes |= {"action_space": None if space is None else space.plain}
    count = sum(record["count"] for record in records)
    head = {**head, **classes, "clips": count, "rate": rate, "shards": records, "skipped": bad}
    write_text(output / "cache.json", json.dumps(head))
    _remove_further(output, len(records))
    for reason in list(bad.values())[:10]:
        print(f"skipped a file: {reason}")
    skipped = f"; {len(bad)} skipped" if bad else ""
    print(f"{count} clips as latents of {head['vae']!r} in {output}{skipped}")
    return 0


def _remove_further(output: Path, count: int) -> None:
    """Remove shards of an earlier run on more clips."""
    names = {f"latents-{number:05d}" for number in range(count)}
    for path in output.glob("latents-*"):
        if path.stem not in names and path.stem.removeprefix("latents-").isdecimal():
            print(f"removed {path}, of clips that the data no longer has")
            path.unlink()

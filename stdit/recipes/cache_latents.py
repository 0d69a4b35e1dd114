"""Encode the clips of a config once, so that training reads latents instead of video: windows of each clip, drawn by seed.

    stdit cache-latents quickstart data.root=data/shapes data.manifest=data/shapes/manifest.jsonl data.source=videos --output data/shapes_latents

Several processes can share the work (torchrun, or the same command started twice): every shard is written under a
temporary name, hashed and renamed. With text.encoder they encode the captions too, which training finds in text.cache.
The same command, run again, encodes only clips that are new or that changed, and takes over changed labels and captions.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stdit.config import Config, load_typed
from stdit.data.actions import check_flip
from stdit.data.base import Identity
from stdit.data.config import DataConfig
from stdit.data.datasets import Dataset
from stdit.data.holdout import column_of, columns_for_holdout, split
from stdit.data.identity import hash_of, identity_of
from stdit.data.indexed import build_indexed
from stdit.data.rates import clip_rate
from stdit.data.samplers import NO_BUCKET, ClipSize
from stdit.data.variants import VARIANT, ClipVariants
from stdit.files import write_text
from stdit.recipes.build import build_captions
from stdit.recipes.encoding import Form
from stdit.recipes.entry import check_least, command, command_parser
from stdit.recipes.latent_shards import files_of_cache, rank_of_process, write_index, write_shards
from stdit.recipes.models import default_device
from stdit.recipes.order import measure
from stdit.recipes.shard_folder import Part, ShardFolder
from stdit.vae import VideoVAE, load_vae
from stdit.warn import warn_user


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
    parser.add_argument("--mirrored", action="store_true", help="every window also mirrored, for data.flip")
    args = parser.parse_intermixed_args(argv)
    config = load_typed(Config, args.config, args.overrides)
    if config.data.source == "latents":
        config.data.source = "auto"
    if config.data.datasets:
        raise ValueError(
            "data.datasets is for training; cache each data set by itself (data.datasets=[] data.root=FOLDER), and then give the "
            "folders of the latents."
        )
    before = files_of_cache(args.output)
    if args.mirrored and not args.freeze_augmentation:
        config.data.flip = False  # every window is there both ways
    check_augmentation(config.data, frozen=args.freeze_augmentation)
    check_least(args, "shard_size", "windows")
    if args.output.resolve() == Path(config.data.root).resolve():
        raise ValueError(
            f"--output {args.output} is data.root itself; set data.root=FOLDER to the folder of the clips."
        )
    dataset = build_indexed(config.data)
    check_flip(config.data.flip, dataset)
    if config.train.holdout:  # values, though, may be those of other data, which is trained on together with this
        split(dataset, config.train.holdout, config.train.holdout_column)
    vae = load_vae(config.vae.name).to(default_device())
    if config.data.cache_posterior != "mean" and not vae.has_posterior:
        raise ValueError(
            f"data.cache_posterior={config.data.cache_posterior} needs a VAE that has a posterior, and {config.vae.name!r} gives a "
            "clip one latent; leave it out."
        )
    sizes = config.data.sizes or [[config.data.num_frames, config.data.height, config.data.width]]
    for frames, height, width in sizes:
        vae.latent_shape(frames, height, width)  # raises for sizes that do not fit
    if args.windows > 1 or args.mirrored:
        dataset = ClipVariants(dataset, args.windows, args.mirrored)
    head = {
        "vae": config.vae.name, "vae_fingerprint": vae.fingerprint(), "seed": config.seed, "shard_size": args.shard_size,
        "tensors": ["latents", "reencoded"], **{key: getattr(config.data, key) for key in SOURCE_KEYS},
        "windows": args.windows, "mirrored": args.mirrored, "sizes": [list(size) for size in config.data.sizes],
        "dtype": config.data.cache_dtype, "posterior": config.data.cache_posterior,
    }  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    check_settings(args.output, head, vae)
    parts = divide(dataset, [ClipSize(*size) for size in config.data.sizes], args.shard_size, seed=config.seed)
    folder = ShardFolder(args.output, hash_of({key: head[key] for key in head if key not in _OTHER_KEYS}))
    if not folder.is_current(dataset, parts):
        folder.check_overlap(dataset, parts)
    write_text(args.output / "settings.json", json.dumps(head))
    form = Form.of(config)
    for name in form.columns:  # before anything is encoded
        _check_column(dataset, name, config.train.holdout_values)
    form = form._replace(columns=tuple(dict.fromkeys((*_recorded_columns(args.output, dataset), *form.columns))))
    build_captions(
        config, dataset, default_device(), share=rank_of_process()
    )  # first, since it may find that there are none
    rate = clip_rate(config.data, dataset)
    with folder.in_use():
        elsewhere = write_shards(folder, dataset, vae, parts, seed=config.seed, form=form)
        return write_index(
            folder, head, dataset, parts, rate=rate, form=form, config=config.data, elsewhere=elsewhere, before=before
        )


def _recorded_columns(output: Path, dataset: Dataset) -> list[str]:
    """The columns by which clips of the folder's latents can be held out, as far as all clips still have them."""
    try:
        info = json.loads((output / "cache.json").read_text())
        columns = list(info["columns"] if "columns" in info else info["shards"][0]["columns"])
    except (OSError, ValueError, LookupError, TypeError):
        return []
    lacking = {name for i in range(len(dataset)) for name in set(columns) - set(columns_for_holdout(dataset, i))}
    if lacking:
        print(
            f"not every clip has the column {', '.join(sorted(lacking))} any more, by which clips could be held out: left out"
        )
    return [name for name in columns if name not in lacking]


def _check_column(dataset: Dataset, column: str, values: Sequence[str]) -> None:
    """ValueError for a clip without the column; values that no clip has are said, since other data may have them."""
    found = {column_of(dataset, i, column) for i in range(len(dataset))}
    if unknown := sorted(set(values) - found):
        warn_user(f"train.holdout_values has {unknown[0]!r}, which no clip here has in the column {column!r}.")


def divide(dataset: Dataset, sizes: Sequence[ClipSize], shard_size: int, *, seed: int) -> list[Part]:
    """The clips of each shard: `shard_size` in their order, or, with sizes, of one size each."""
    groups: list[Part] = [Part(range(len(dataset)))]
    if sizes:
        keys = np.array([_number_of(identity_of(dataset, i)) for i in range(len(dataset))], np.uint32)
        buckets = measure(dataset, sizes, seed, keys)[1]
        groups = [Part(np.flatnonzero(buckets == number).tolist(), size) for number, size in enumerate(sizes)]
        if (short := int((buckets == NO_BUCKET).sum())) > 0:
            print(f"{short} clips are shorter than every size in data.sizes, or cannot be read, and are left out")
    if not any(len(group.indices) for group in groups):
        raise ValueError(
            "none of the clips is long enough for any of data.sizes; add a size with fewer frames (stdit check-media)."
        )
    starts = [(group, start) for group in groups for start in range(0, len(group.indices), shard_size)]
    return [Part(group.indices[start : start + shard_size], group.size) for group, start in starts]


def _number_of(one: Identity) -> int:
    """A number of a clip that stays when others come before it; its size is drawn by it."""
    return zlib.crc32(f"{one.source} {one.columns.get(VARIANT, 0)}".encode("utf-8", "surrogateescape"))


# Where the clips lie, on which their latents do not depend, and the keys of the data config on which they do; VAE, seed and
# --shard-size are checked as well.
_PLACE_KEYS = ("root", "manifest")
SOURCE_KEYS = (*_PLACE_KEYS, "num_frames", "height", "width", "fps", "crop", "flip")
# Settings on which the latents of a clip do not depend; the size is part of the clip's key, weights of the VAE's fingerprint.
_OTHER_KEYS = (*_PLACE_KEYS, "vae", "shard_size", "tensors", "sizes")


def check_augmentation(config: DataConfig, frozen: bool) -> None:
    """Refuse what a cache would make the same in every epoch, or, with `frozen`, say that it is."""
    drawn = [("data.flip=true", "data.flip=false, or add --mirrored for both")] * config.flip
    drawn += [("data.crop=random", "data.crop=center")] * (config.crop == "random")
    given = " ".join(setting for setting, _ in drawn)
    if frozen and drawn:
        print(f"{given}: drawn once for each clip and kept, not anew in every epoch")
    elif drawn:
        raise ValueError(
            f"{given} would be drawn once for each clip and then be the same in every epoch; use "
            f"{' and '.join(remedy for _, remedy in reversed(drawn))}, train from the clips themselves, or pass --freeze-augmentation to have it so."
        )


def check_settings(output: Path, head: dict, vae: VideoVAE) -> None:
    """ValueError if the folder holds latents made with other settings; a run with the same settings adds to them."""
    path = next((path for path in (output / "settings.json", output / "cache.json") if path.is_file()), None)
    if path is None:
        if any(output.glob("latents-*.json")):
            raise ValueError(
                f"{output} holds latents without their settings.json, which may be others; choose another --output, or remove it."
            )
        return
    try:
        # What earlier versions did not record.
        found = {
            "flip": False,
            "windows": 1,
            "mirrored": False,
            "sizes": [],
            "dtype": "float16",
            "posterior": "mean",
            **json.loads(path.read_text()),
        }
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); choose another --output, or remove {output}.") from error
    if vae.has_fingerprint(str(found.get("vae_fingerprint"))):
        found["vae_fingerprint"] = head["vae_fingerprint"]
    changed = [key for key in head if found.get(key) != head[key] and key not in _PLACE_KEYS]
    if changed:
        raise ValueError(
            f"{output} holds latents made with other settings ({', '.join(changed)}); choose another --output, or remove it."
        )

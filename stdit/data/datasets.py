"""One class for each kind of data. `load(index, rng)` gives a sample; what is random comes from `rng` alone."""

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from stdit.data.backends import open_video
from stdit.data.idx import read_idx
from stdit.data.manifest import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Table, read_manifest, scan_folder
from stdit.data.shapes import CLASS_NAMES, draw, random_clip
from stdit.data.transforms import cover_size, crop, resize
from stdit.data.video_io import VideoError, VideoReader
from stdit.keys import keyed_rng
from stdit.variants import pick


@dataclass
class DataConfig:
    """`fps` null takes neighbouring frames whatever their rate; otherwise frames are picked by time stamps."""

    root: str = "data/clips"
    manifest: str | None = None
    source: Literal["auto", "videos", "images", "idx", "latents", "shapes"] = "auto"
    num_frames: int = 17
    height: int = 64
    width: int = 64
    fps: float | None = None
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    backend: str = "pyav"
    workers: int = 2
    num_shapes: int = 3000  # for source=shapes: how many clips are drawn
    motion: Literal["straight", "bounce"] = "straight"
    max_bad_fraction: float = 0.1  # training stops when more of the files than this cannot be read

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} is not a size; use 1 or more.")
        if self.fps is not None and self.fps <= 0:
            raise ValueError(
                f"data.fps={self.fps} is not a frame rate; use a positive number, or null for each file's own."
            )
        if self.workers < 0:
            raise ValueError(f"data.workers={self.workers} is negative; use 0 to load in the main process.")


class Dataset(Protocol):
    """Samples by number. pixels: uint8 (F, H, W, 3); or latents: (C, T, h, w)."""

    num_classes: int
    class_names: list[str] | None

    def __len__(self) -> int: ...
    def label(self, index: int) -> int | None: ...
    def name(self, index: int) -> str: ...
    def load(self, index: int, rng: np.random.Generator) -> dict[str, Tensor]: ...


class _TableDataset:
    """What datasets of files have in common."""

    def __init__(self, table: Table, config: DataConfig):
        self.rows, self.num_classes, self.class_names = table
        self.config = config

    def __len__(self) -> int:
        return len(self.rows)

    def label(self, index: int) -> int | None:
        return self.rows[index].label

    def name(self, index: int) -> str:
        return str(self.rows[index].path)

    def _finish(self, frames: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
        frames = crop(frames, (self.config.height, self.config.width), rng if self.config.crop == "random" else None)
        if self.config.flip and rng.random() < 0.5:
            frames = frames[:, :, ::-1]
        return {"pixels": torch.from_numpy(np.ascontiguousarray(frames))}


class VideoClips(_TableDataset):
    """Windows of `num_frames` out of video files, at `fps` by time stamps, scaled to cover and cropped."""

    def load(self, index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        config = self.config
        with self._open(self.rows[index].path) as reader:
            picked = window(reader, config.num_frames, config.fps, rng)
            frames = reader.get_frames(picked, size=cover_size(reader.size, (config.height, config.width)))
        return self._finish(frames, rng)

    def _open(self, path: Path):
        """A reader; PyAV's index of packets is kept, so that a file is scanned once a worker."""
        if self.config.backend != "pyav":
            return open_video(path, self.config.backend)
        kept = self._indexed
        if path not in kept:
            kept[path] = VideoReader(path)
            while len(kept) > 4096:
                kept.popitem(last=False)
        return kept[path]

    @cached_property
    def _indexed(self) -> OrderedDict:
        return OrderedDict()

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_indexed"}


def window(reader, num_frames: int, fps: float | None, rng: np.random.Generator) -> list[int]:
    """Frame numbers of one window, anywhere in the clip; VideoError if the clip is too short for it."""
    if fps is None:
        if len(reader) < num_frames:
            raise VideoError(
                f"{str(reader.path)!r} has {len(reader)} frames of the {num_frames} needed; lower data.num_frames or leave it out."
            )
        start = int(rng.integers(len(reader) - num_frames + 1))
        return list(range(start, start + num_frames))
    needed, has = (num_frames - 1) / fps, float(reader.timestamps[-1])
    if has + 0.5 / fps < needed:
        raise VideoError(
            f"{str(reader.path)!r} lasts {has:.2f} s of the {needed:.2f} s needed; raise data.fps, lower data.num_frames or leave it out."
        )
    begin = rng.uniform(0, max(0.0, has - needed))
    return reader.indices_at(begin + np.arange(num_frames) / fps)


class Images(_TableDataset):
    """Image files as one-frame clips."""

    def load(self, index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        path = self.rows[index].path
        try:
            with Image.open(path) as image:
                frames = np.asarray(image.convert("RGB"))[None]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise VideoError(f"{str(path)!r} is not an image that can be read ({error}); leave it out.") from error
        target = (self.config.height, self.config.width)
        return self._finish(resize(frames, cover_size(frames.shape[1:3], target)), rng)


class IdxImages:
    """Grey images of an idx file (digits) with the labels beside it, as one-frame clips."""

    class_names: list[str] | None = None

    def __init__(self, root: Path, config: DataConfig):
        images = sorted(p for p in ([root] if root.is_file() else root.iterdir()) if "images-idx3" in p.name)
        if not images:
            raise ValueError(f"data.root={str(root)!r} holds no ...images-idx3-ubyte(.gz) file; name one.")
        self.images = np.concatenate([read_idx(path) for path in images])
        labels = [path.with_name(path.name.replace("images-idx3", "labels-idx1")) for path in images]
        self.labels = np.concatenate([read_idx(path) for path in labels]) if all(p.exists() for p in labels) else None
        if self.labels is not None and len(self.labels) != len(self.images):
            raise ValueError(
                f"{root}: {len(self.images)} images but {len(self.labels)} labels; use files that belong together."
            )
        self.num_classes = 0 if self.labels is None else int(self.labels.max()) + 1
        self.root, self.config = root, config

    def __len__(self) -> int:
        return len(self.images)

    def label(self, index: int) -> int | None:
        return None if self.labels is None else int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.root}[{index}]"

    def load(self, index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        frame = resize(self.images[index][None], (self.config.height, self.config.width))
        if self.config.flip and rng.random() < 0.5:
            frame = frame[:, :, ::-1]
        return {"pixels": torch.from_numpy(np.repeat(frame[..., None], 3, axis=-1))}


class MovingShapes:
    """Shapes drawn as they are asked for, clip `index` always the same."""

    num_classes = len(CLASS_NAMES)
    class_names: list[str] | None = list(CLASS_NAMES)

    def __init__(self, config: DataConfig):
        if config.height != config.width:
            raise ValueError(
                f"shapes are drawn on squares; data.height={config.height} and data.width={config.width} differ."
            )
        self.config = config

    def __len__(self) -> int:
        return self.config.num_shapes

    def label(self, index: int) -> int:
        return index % self.num_classes

    def name(self, index: int) -> str:
        return f"shape {index}"

    def load(self, index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        own = keyed_rng("sample", index)
        clip = random_clip(own, self.label(index), self.config.num_frames, self.config.height, self.config.motion)
        return {"pixels": torch.from_numpy(draw(clip))}


class CachedLatents:
    """What `tools/cache_latents.py` wrote: shards of normalised latents, with the fingerprint of their VAE."""

    def __init__(self, root: Path, config: DataConfig):
        self.root, self.info = root, json.loads((root / "cache.json").read_text())
        self.num_classes, self.class_names = self.info["num_classes"], self.info["class_names"]
        made = (self.info["num_frames"], self.info["height"], self.info["width"])
        asked = (config.num_frames, config.height, config.width)
        if made != asked:
            raise ValueError(
                f"the latents in {str(root)!r} are of (frames, height, width) {made}, the config asks for {asked}; set data.num_frames, height and width to theirs, or cache again."
            )
        self._starts = np.cumsum([0] + [shard["count"] for shard in self.info["shards"]])
        self._labels = [label for shard in self.info["shards"] for label in shard["labels"]]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def label(self, index: int) -> int | None:
        return self._labels[index]

    def name(self, index: int) -> str:
        return f"{self.root}[{index}]"

    def load(self, index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        file = self._shard(shard)
        row = index - int(self._starts[shard])
        sample = {name: file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118 (no mapping)
        if not all(torch.isfinite(value).all() for value in sample.values()):
            raise VideoError(f"{self.name(index)} is not finite; cache the latents again.")
        return sample

    def _shard(self, number: int):
        if number not in self._open_shards:
            file = self.root / self.info["shards"][number]["file"]
            if not file.is_file():
                raise ValueError(f"{file} is missing; run tools/cache_latents.py again with the same --output.")
            self._open_shards[number] = safe_open(file, framework="pt")
        return self._open_shards[number]

    @cached_property
    def _open_shards(self) -> dict:
        return {}

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_open_shards"}


def _videos(root: Path, config: DataConfig) -> VideoClips:
    return VideoClips(_table(root, config, VIDEO_SUFFIXES, "videos"), config)


def _images(root: Path, config: DataConfig) -> Images:
    _one_frame(config)
    return Images(_table(root, config, IMAGE_SUFFIXES, "images"), config)


def _idx(root: Path, config: DataConfig) -> IdxImages:
    _one_frame(config)
    if not root.exists():
        raise ValueError(f"data.root={str(root)!r} does not exist; give an idx file or a folder of them.")
    return IdxImages(root, config)


SOURCES: dict[str, Callable[[Path, DataConfig], Dataset]] = {
    "videos": _videos,
    "images": _images,
    "idx": _idx,
    "latents": CachedLatents,
    "shapes": lambda root, config: MovingShapes(config),
}


def build_dataset(config: DataConfig) -> Dataset:
    """The dataset a config names; with `source: auto`, by looking into the folder."""
    root = Path(config.root)
    source = _guess(root, config) if config.source == "auto" else config.source
    if source == "latents" and not (root / "cache.json").is_file():
        raise ValueError(
            f"data.root={str(root)!r} holds no cached latents; write them with: python tools/cache_latents.py CONFIG --output {root}."
        )
    return pick(SOURCES, source, "data source")(root, config)


def _guess(root: Path, config: DataConfig) -> str:
    if config.manifest is None and root.is_dir():
        if (root / "cache.json").is_file():
            return "latents"
        if any("images-idx3" in p.name for p in root.iterdir()):
            return "idx"
    elif config.manifest is None and root.is_file() and "images-idx3" in root.name:
        return "idx"
    return "images" if config.num_frames == 1 and _has_images(root, config) else "videos"


def _has_images(root: Path, config: DataConfig) -> bool:
    if config.manifest is not None:
        return any(
            row.path.suffix.lower() in IMAGE_SUFFIXES for row in _table(root, config, IMAGE_SUFFIXES, "images").rows[:1]
        )
    return not root.is_dir() or not any(p.suffix.lower() in VIDEO_SUFFIXES for p in root.rglob("*"))


def _table(root: Path, config: DataConfig, suffixes: set[str], what: str) -> Table:
    if config.manifest is None:
        return scan_folder(root, suffixes, what)
    manifest = Path(config.manifest)
    within = root if root.is_dir() else None
    if not manifest.is_file() and (root / manifest).is_file():
        manifest = root / manifest
    return read_manifest(manifest, within)


def _one_frame(config: DataConfig) -> None:
    if config.num_frames != 1:
        raise ValueError(f"data.num_frames={config.num_frames} does not fit images; use data.num_frames=1.")

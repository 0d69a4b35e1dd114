"""The table of data sources, and the datasets that need no media files. All randomness of `load(index, rng)` comes from `rng`."""

import zlib
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stdit.conditions import ClipFacts
from stdit.data.base import Annotated, Dataset, Identity
from stdit.data.cached import CachedLatents
from stdit.data.clips import Images, VideoClips, window
from stdit.data.config import DataConfig, DatasetConfig
from stdit.data.folders import is_file, is_folder, names_in
from stdit.data.idx import read_idx
from stdit.data.index import SUFFIX, MediaIndex
from stdit.data.joint import JointDataset
from stdit.data.lerobot import LeRobotClips, is_lerobot
from stdit.data.manifest import Table, find_media, read_manifest, scan_folder
from stdit.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_picture
from stdit.data.pictures import read_picture
from stdit.data.rates import DEFAULT_FPS
from stdit.data.records import is_table
from stdit.data.samplers import ClipSize
from stdit.data.shapes import CLASS_NAMES, OBJECT_NAMES, ShapeClip, draw, random_clip
from stdit.data.stores import allow, is_remote, is_url, url_of
from stdit.data.tables import KINDS, kind_of, read_folder
from stdit.data.transforms import resize
from stdit.rng import keyed_rng
from stdit.variants import pick

__all__ = [
    "SOURCES", "CachedLatents", "Dataset", "IdxImages", "Images", "MovingShapes", "VideoClips", "build_dataset",
    "read_picture", "window",
]  # fmt: skip


class IdxImages(Annotated):
    """Grey images of idx files (digits) as clips of one frame, with the labels of the idx files next to them."""

    class_names: list[str] | None = None
    decodes = False

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

    def record(self, index: int) -> dict[str, Any]:
        """The label of an image, None without a file of labels; the caption is empty."""
        return {"label": None if self.labels is None else int(self.labels[index]), "caption": ""}

    def name(self, index: int) -> str:
        """The path of the data and the number of the image."""
        return f"{self.root}[{index}]"

    def identity(self, index: int, *, read: bool = False) -> Identity:
        """The number of the image, a checksum of its pixels, and its label."""
        return Identity(str(index), zlib.crc32(self.images[index].tobytes()), self.record(index)["label"])

    def shape(self, index: int) -> tuple[int, int, int]:
        """One frame of the size that all images have."""
        return (1, *self.images.shape[1:3])

    def load(self, index: int, rng: np.random.Generator, size: ClipSize | None = None) -> dict[str, Any]:
        """Resize an image and repeat its grey values as RGB."""
        size = size or ClipSize(1, self.config.height, self.config.width)
        frame = resize(self.images[index][None], (size.height, size.width))
        if self.config.flip and rng.random() < 0.5:
            frame = frame[:, :, ::-1]
        return {
            "pixels": torch.from_numpy(np.repeat(frame[..., None], 3, axis=-1)),
            "clip": ClipFacts(size, 1.0),
        }


class MovingShapes(Annotated):
    """Clips of moving shapes, drawn on demand; the clip of an index is always the same."""

    def __init__(self, config: DataConfig):
        self.class_names: list[str] | None = list(OBJECT_NAMES if config.motion == "bounce" else CLASS_NAMES)
        self.num_classes = len(self.class_names)
        for _, height, width in [*config.sizes, (config.num_frames, config.height, config.width)]:
            if height != width:
                raise ValueError(f"moving shapes need square frames, got {height} x {width}; use one side for both.")
        self.config = config

    def __len__(self) -> int:
        return self.config.num_shapes

    def record(self, index: int) -> dict[str, Any]:
        """The label and the caption of a clip."""
        assert self.class_names is not None
        clip = self._clip(index, self._size)
        return {"label": self.class_names.index(clip.class_name), "caption": clip.caption}

    def name(self, index: int) -> str:
        """The word "shape" and the number of the clip."""
        return f"shape {index}"

    def identity(self, index: int, *, read: bool = False) -> Identity:
        """The number of the clip and the kind of motion, which decide all of it at a given size."""
        return Identity(str(index), self.config.motion)

    def shape(self, index: int) -> tuple[int, int, int]:
        """The longest duration of the config, since shapes can be drawn at any size."""
        longest = max((size[0] for size in self.config.sizes), default=self.config.num_frames)
        return (longest, self.config.height, self.config.width)

    def load(self, index: int, rng: np.random.Generator, size: ClipSize | None = None) -> dict[str, Any]:
        """Draw a clip; it depends on `index` and `size` alone."""
        size = size or self._size
        drawn = draw(self._clip(index, size))
        return {"pixels": torch.from_numpy(drawn), "clip": ClipFacts(size, self.config.fps or DEFAULT_FPS)}

    @property
    def _size(self) -> ClipSize:
        return ClipSize(self.config.num_frames, self.config.height, self.config.width)

    def _clip(self, index: int, size: ClipSize) -> ShapeClip:
        return random_clip(
            keyed_rng("sample", index),
            index % len(CLASS_NAMES),
            frames=size.frames,
            frame_size=size.height,
            motion=self.config.motion,
        )


def _videos(root: Path, config: DataConfig) -> VideoClips:
    pictures = IMAGE_SUFFIXES if any(size[0] == 1 for size in config.sizes) else set()
    return VideoClips(_table(root, config, VIDEO_SUFFIXES | pictures, "videos"), config)


def _images(root: Path, config: DataConfig) -> Images:
    _one_frame(config)
    guessed = config.source == "auto"  # since there is no video
    what, suffixes = ("videos or pictures", VIDEO_SUFFIXES | IMAGE_SUFFIXES) if guessed else ("images", IMAGE_SUFFIXES)
    return Images(_table(root, config, suffixes, what), config)


def _idx(root: Path, config: DataConfig) -> IdxImages:
    _one_frame(config)
    if not root.exists():
        raise ValueError(f"data.root={str(root)!r} does not exist; give an idx file or a folder of them.")
    return IdxImages(root, config)


def _rows(kind: str, root: Path, config: DataConfig) -> VideoClips:
    return VideoClips(read_folder(root, kind, config.columns), config)


SOURCES: dict[str, Callable[[Path, DataConfig], Dataset]] = {
    "videos": _videos,
    "images": _images,
    "idx": _idx,
    "latents": CachedLatents,
    "lerobot": LeRobotClips,
    **{name: partial(_rows, name) for name in KINDS},
    "shapes": lambda root, config: MovingShapes(config),
}


def build_dataset(config: DataConfig) -> Dataset:
    """Build the dataset of a config, or several as one; with `source: auto` its kind is inferred from the contents of the folder."""
    if config.datasets:
        parts = [replace(config, datasets=[], **_without_weight(one)) for one in config.datasets]
        return JointDataset([build_dataset(part) for part in parts], [part.root or part.source for part in parts])
    root, source = Path(config.root), source_of(config)
    if source == "latents" and not is_file(root / "cache.json"):
        raise ValueError(
            f"data.root={str(root)!r} holds no cached latents; write them from clips: stdit cache-latents CONFIG data.root=CLIPS data.source=auto --output {root} (moving shapes: stdit make-shapes, or stdit quickstart)."
        )
    return pick(SOURCES, source, "data source")(root, config)


def source_of(config: DataConfig) -> str:
    """The kind of a config's data, which `auto` leaves to what lies there."""
    allow(config.root)
    return _guess(Path(config.root), config) if config.source == "auto" else config.source


def _without_weight(one: DatasetConfig) -> dict[str, Any]:
    return {each.name: getattr(one, each.name) for each in fields(one) if each.name != "weight"}


def _guess(root: Path, config: DataConfig) -> str:
    if config.manifest is None and is_folder(root):
        if is_file(root / "cache.json"):
            return "latents"
        if is_lerobot(root):
            return "lerobot"
        if (kind := kind_of(root)) is not None:
            return kind
        if any("images-idx3" in name for name in names_in(root)):
            return "idx"
    elif config.manifest is None and root.is_file() and "images-idx3" in root.name:
        return "idx"
    return "images" if config.num_frames == 1 and not config.sizes and _has_images(root, config) else "videos"


def _has_images(root: Path, config: DataConfig) -> bool:
    if config.manifest is not None:
        return any(is_picture(row.path) for row in _table(root, config, IMAGE_SUFFIXES, "images").rows[:1])
    return not is_folder(root) or not find_media(root, VIDEO_SUFFIXES).files


def _table(root: Path, config: DataConfig, suffixes: set[str], what: str) -> Table:
    if config.manifest is None:
        if is_table(root):
            raise ValueError(
                f"data.root={str(root)!r} is a table of Lance; give data.manifest={root} (and as data.root the folder of its files)."
            )
        return scan_folder(root, suffixes, what, config.columns)
    manifest = Path(config.manifest)
    if is_url(manifest):
        allow(manifest.parent)
    within = root if is_remote(root) or root.is_dir() else None
    if not (is_file(manifest) or is_table(manifest)) and (is_file(root / manifest) or is_table(root / manifest)):
        manifest = root / manifest
    if manifest.suffix == SUFFIX and is_remote(manifest):
        raise ValueError(f"data.manifest={manifest}: an index is read from this machine only; copy it here.")
    if manifest.suffix == SUFFIX and manifest.is_file():
        index = MediaIndex(manifest)
        if is_url(index.root) and not is_remote(index.root):
            raise ValueError(
                f"{manifest} is of files in a store; to read them there, set data.root={url_of(index.root)}."
            )
        index.check_names(config.columns)
        index.check()
        return index.table
    if within is not None and not is_table(manifest) and manifest.is_dir() and (kind := kind_of(manifest)) is not None:
        return read_folder(manifest, kind, config.columns, within)
    return read_manifest(manifest, within, config.columns)


def _one_frame(config: DataConfig) -> None:
    if config.num_frames != 1:
        raise ValueError(f"data.num_frames={config.num_frames} does not fit images; use data.num_frames=1.")

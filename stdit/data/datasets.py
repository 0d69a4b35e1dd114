"""One class for each kind of data. `load(index, rng)` gives a sample; all its randomness comes from `rng`."""

import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from stdit.conditions import ClipFacts
from stdit.data.backends import Reader, open_video
from stdit.data.base import Dataset, Identity
from stdit.data.cached import CachedLatents
from stdit.data.config import DataConfig
from stdit.data.identity import content_of, relative_name, size_of
from stdit.data.idx import read_idx
from stdit.data.manifest import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Table, read_manifest, scan_folder
from stdit.data.samplers import ClipSize
from stdit.data.shapes import CLASS_NAMES, OBJECT_NAMES, ShapeClip, draw, random_clip
from stdit.data.transforms import cover_size, crop, resize
from stdit.data.video_io import VideoError, VideoReader
from stdit.hashes import file_sha256
from stdit.rng import keyed_rng
from stdit.variants import pick

# The most readers that a worker keeps, which bounds its memory however many files there are.
MAX_READERS = 4096


class _TableDataset:
    """The common part of datasets of files: a table of rows, resizing and cropping."""

    def __init__(self, table: Table, config: DataConfig):
        self.rows, self.num_classes, self.class_names = table
        self.config = config

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, index: int) -> dict[str, Any]:
        """Label, caption and further columns of a row."""
        row = self.rows[index]
        return {**row.columns, "label": row.label, "caption": row.caption}

    def name(self, index: int) -> str:
        """The path of the file."""
        return str(self.rows[index].path)

    def identity(self, index: int, *, read: bool = False) -> Identity:
        """The file below the root, its size (or, if it is read, a hash of its content), and its annotations."""
        path, label, caption, columns = self.rows[index]
        content = content_of(path) if read else size_of(path)
        return Identity(relative_name(path, Path(self.config.root)), content, label, caption, columns=columns)

    def _path(self, index: int) -> Path:
        """The file of a row. VideoError if the manifest has a column sha256 and the file another hash."""
        row = self.rows[index]
        expected = str(row.columns.get("sha256") or "").strip().lower()
        if expected and (row.path, expected) not in self._hashed and row.path.is_file():
            if (found := file_sha256(row.path)) != expected:
                raise VideoError(
                    f"{str(row.path)!r} does not have the sha256 of the manifest ({found[:12]}... in place of "
                    f"{expected[:12]}...); restore the file, or correct the manifest."
                )
            self._hashed.add((row.path, expected))
        return row.path

    @cached_property
    def _hashed(self) -> set[tuple[Path, str]]:
        return set()

    def _size(self, size: ClipSize | None) -> ClipSize:
        return size or ClipSize(self.config.num_frames, self.config.height, self.config.width)

    def _finish(
        self,
        frames: np.ndarray,
        size: ClipSize,
        fps: float,
        rng: np.random.Generator,
        picked: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        frames = crop(frames, (size.height, size.width), rng if self.config.crop == "random" else None)
        if self.config.flip and rng.random() < 0.5:
            frames = frames[:, :, ::-1]
        return {"pixels": torch.from_numpy(np.ascontiguousarray(frames)), "clip": ClipFacts(size, fps, picked)}


class VideoClips(_TableDataset):
    """Random windows of video files, scaled to cover the size and cropped.

    With `fps`, frames are picked by their time stamps. Images among the files are clips of one frame.
    """

    def load(self, index: int, rng: np.random.Generator, size: ClipSize | None = None) -> dict[str, Any]:
        """Decode a window at a random position of a video, or an image as a clip of one frame."""
        size, path = self._size(size), self._path(index)
        target = (size.height, size.width)
        if path.suffix.lower() in IMAGE_SUFFIXES:
            if size.frames > 1:
                raise VideoError(
                    f"{str(path)!r} is an image, but a clip of {size.frames} frames is needed; leave it out, or give images a "
                    "size of 1 frame."
                )
            frames, rate = read_picture(path)[None], self.config.fps or 1.0
            return self._finish(resize(frames, cover_size(frames.shape[1:3], target)), size, rate, rng)
        with self._open(path) as reader:
            picked = window(reader, size.frames, self.config.fps, rng)
            frames = reader.get_frames(picked, size=cover_size(reader.size, target))
            rate = self.config.fps or reader.fps
        return self._finish(frames, size, rate, rng, picked=picked)

    def shape(self, index: int) -> tuple[int, int, int]:
        """The frames of a file, counted at `fps`, and the size of its frames."""
        path = self.rows[index].path
        if path.suffix.lower() in IMAGE_SUFFIXES:
            return (1, *read_picture(path).shape[:2])
        with self._open(path) as reader:
            frames = len(reader)
            if self.config.fps is not None:
                frames = int(float(reader.timestamps[-1]) * self.config.fps + 0.5) + 1
            return (frames, *reader.size)

    def _open(self, path: Path) -> Reader:
        """A reader of a file; PyAV's are cached with their index of packets, so that a worker scans each file once."""
        if self.config.backend != "pyav":
            return open_video(path, self.config.backend)
        readers = self._readers
        if path not in readers:
            readers[path] = VideoReader(path)
            while len(readers) > MAX_READERS:
                readers.popitem(last=False)
        return readers[path]

    @cached_property
    def _readers(self) -> OrderedDict[Path, VideoReader]:
        return OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_readers"}


def window(reader: Reader, num_frames: int, fps: float | None, rng: np.random.Generator) -> list[int]:
    """Draw the frame numbers of a window at a random position; VideoError if the clip is too short for it."""
    if fps is None:
        if len(reader) < num_frames:
            raise VideoError(
                f"{str(reader.path)!r} has {len(reader)} frames, but {num_frames} are needed; lower data.num_frames or leave it out."
            )
        start = int(rng.integers(len(reader) - num_frames + 1))
        return list(range(start, start + num_frames))
    needed, has = (num_frames - 1) / fps, float(reader.timestamps[-1])
    if has + 0.5 / fps < needed:
        raise VideoError(
            f"{str(reader.path)!r} lasts {has:.2f} s, but {needed:.2f} s are needed; raise data.fps, lower data.num_frames or leave it out."
        )
    begin = rng.uniform(0, max(0.0, has - needed))
    return reader.indices_at(begin + np.arange(num_frames) / fps)


class Images(_TableDataset):
    """Image files as clips of one frame."""

    def load(self, index: int, rng: np.random.Generator, size: ClipSize | None = None) -> dict[str, Any]:
        """Read an image, scale it to cover the size, and crop it."""
        size, frames = self._size(size), read_picture(self._path(index))[None]
        return self._finish(resize(frames, cover_size(frames.shape[1:3], (size.height, size.width))), size, 1.0, rng)

    def shape(self, index: int) -> tuple[int, int, int]:
        """One frame of the size of the file."""
        return (1, *read_picture(self.rows[index].path).shape[:2])


def read_picture(path: Path) -> np.ndarray:
    """Read an image file as (H, W, 3) uint8; VideoError if it cannot be read."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(f"{str(path)!r} is not an image that can be read ({error}); leave it out.") from error


class IdxImages:
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


class MovingShapes:
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

    def label(self, index: int) -> int:
        """The class index of a clip."""
        assert self.class_names is not None
        return self.class_names.index(self._clip(index, self._size).class_name)

    def record(self, index: int) -> dict[str, Any]:
        """The label and the caption of a clip."""
        return {"label": self.label(index), "caption": self._clip(index, self._size).caption}

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
        return {"pixels": torch.from_numpy(drawn), "clip": ClipFacts(size, self.config.fps or 8.0)}

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
    """Build the dataset of a config; with `source: auto` its kind is inferred from the contents of the folder."""
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
    return "images" if config.num_frames == 1 and not config.sizes and _has_images(root, config) else "videos"


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

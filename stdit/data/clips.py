"""Datasets of media files. `load(index, rng)` gives a sample; all its randomness comes from `rng`."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stdit.conditions import Actions, ActionSpace, ClipFacts
from stdit.data.actions import actions_of_rows, known_actions, with_numbers
from stdit.data.backends import Reader, open_video
from stdit.data.base import Annotated, Identity
from stdit.data.config import DataConfig
from stdit.data.facts import Facts, frames_at_rate, no_clip, too_short
from stdit.data.identity import content_of, relative_name, size_of
from stdit.data.index import MediaIndex
from stdit.data.manifest import Row, Table
from stdit.data.measures import Measures
from stdit.data.media import VideoError, container_of, is_picture, open_regular, state_of
from stdit.data.pictures import picture_size, read_picture
from stdit.data.rates import some_rates, warn_of_repeats
from stdit.data.samplers import ClipSize
from stdit.data.transforms import cover_size, crop
from stdit.data.video_io import VideoReader
from stdit.warn import warn_once

# The most readers that a worker keeps, which bounds its memory however many files there are.
MAX_READERS = 4096
_MANY = 100_000  # rows whose copies into processes take seconds each


class TableDataset(Annotated):
    """The common part of datasets of files: a table of rows, resizing and cropping.

    index: what the rows are read from if they are those of an index, else None.
    """

    index: MediaIndex | None = None

    def __init__(self, table: Table, config: DataConfig):
        self.rows, self.num_classes, self.class_names = table
        self.config = config
        if isinstance(self.rows, MediaIndex):
            self.index = self.rows

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, index: int) -> dict[str, Any]:
        """Label, caption and further columns of a row; of actions, their numbers."""
        row = self.rows[index]
        return {**with_numbers(row.columns, known_actions(self)), "label": row.label, "caption": row.caption}

    def captions(self) -> Iterator[str]:
        """The captions of all rows in their order; of an index from their column, since a million rows take 20 seconds."""
        if self.index is not None:
            return self.index.columns.texts("caption")
        return (self.record(i)["caption"] for i in range(len(self)))

    def name(self, index: int) -> str:
        """The path of the file."""
        return str(self.rows[index].path)

    def identity(self, index: int, *, read: bool = False) -> Identity:
        """The file below the root, its size (or, if it is read, a hash of its content), and its annotations."""
        if self.index is not None:
            return self.index.identity(index, read=read)
        path, label, caption, columns = self.rows[index]
        content = content_of(path) if read else size_of(path)
        return Identity(
            relative_name(path, Path(self.config.root)), content, label, caption, columns=columns, by_content=read
        )

    def group_of(self, index: int) -> str:
        """What is held out together: the file below the root, without the rest of the row."""
        if self.index is not None:
            return self.index.columns.text("path", index)
        return relative_name(self.rows[index].path, Path(self.config.root))

    def column_values(self, column: str | None) -> Iterator[Any] | None:
        """The value of a column for every clip, or the name of its file, if an index has them; else None."""
        if self.index is None:
            return None
        return self.index.columns.texts("path") if column is None else self.index.values(column)

    @property
    def known_fingerprint(self) -> dict[str, Any] | None:
        """The fingerprint of all samples as the index has it, None without an index."""
        return None if self.index is None else self.index.info["fingerprint"]

    @property
    def action_space(self) -> ActionSpace | None:
        """The actions of the clips, None if they have none; ValueError if a column of that name is something else."""
        found = self._actions_found
        if isinstance(found, str):
            raise ValueError(found)
        return found

    @cached_property
    def _actions_found(self) -> ActionSpace | str | None:
        """The actions of the clips, or why they are none, found once."""
        if self.index is not None:
            return self.index.action_space
        try:
            return actions_of_rows([row.columns for row in self.rows])
        except ValueError as error:
            return str(error)

    def _row(self, index: int) -> Row:
        """A row. VideoError if the index has found that its file cannot be read, or if the file has changed since."""
        row = self.rows[index]
        if self.index is not None:
            _refuse(row.path, self.index.refused(index))
            if self.index.changed(index):
                _refuse(row.path, f"is not the file that {self.index.path} was made from; run stdit index again")
        return row

    def _path(self, index: int) -> Path:
        """The file of a row. VideoError if the manifest has a column sha256 and the file another hash."""
        row = self._row(index)
        expected = str(row.columns.get("sha256") or "").strip().lower()
        if expected and (row.path, expected) not in self._hashed and state_of(row.path)[0] >= 0:
            with open_regular(row.path) as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
            if found != expected:
                raise VideoError(
                    f"{str(row.path)!r} does not have the sha256 of the manifest ({found[:12]}... in place of "
                    f"{expected[:12]}...); restore the file, or correct the manifest."
                )
            self._hashed.add((row.path, expected))
        return row.path

    @cached_property
    def _hashed(self) -> set[tuple[Path, str]]:
        return set()

    @cached_property
    def shards(self) -> list[int] | None:
        """The number of clips in each archive or table, None for clips that lie in none."""
        files = (row.path for row in self.rows) if self.index is None else self.index.files()
        counts = [(archive, sum(1 for _ in group)) for archive, group in groupby(map(container_of, files))]
        return None if not counts or any(archive is None for archive, _ in counts) else [n for _, n in counts]

    def shapes(self) -> np.ndarray | None:
        """The `shape` of every clip (N, 3) if an index has them, else None; (0, 1, 1) for a file that cannot be read."""
        return None if self.index is None else self.index.shapes(self.config.fps)

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


class VideoClips(TableDataset):
    """Random windows of video files, scaled to cover the size and cropped.

    With `fps`, frames are picked by their time stamps. Images among the files are clips of one frame.
    """

    def load(self, index: int, rng: np.random.Generator, size: ClipSize | None = None) -> dict[str, Any]:
        """Decode a window at a random position of a video, or an image as a clip of one frame."""
        size, path = self._size(size), self._path(index)
        target = (size.height, size.width)
        if is_picture(path):
            _refuse(path, no_clip(size.frames))
            return self._finish(read_picture(path, cover=target)[None], size, self.config.fps or 1.0, rng)
        with self._open(path) as reader:
            if size.frames > 1:
                warn_of_repeats(reader, self.config.fps)
            first, picked = self._pick(index, reader, size.frames, rng)
            frames = reader.get_frames([first + frame for frame in picked], size=cover_size(reader.size, target))
            rate = self.config.fps or reader.fps
        return self._finish(frames, size, rate, rng, picked=picked)

    def _pick(self, index: int, reader: Reader, count: int, rng: np.random.Generator) -> tuple[int, list[int]]:
        """The frame of the file at which a clip begins, and the numbers of the frames of a window, from there."""
        repeat, given = self._repeat(index)
        if given is not None and given != len(reader):
            _refuse(reader.path, f"has {len(reader)} frames but {given} actions; give one for every frame of the file")
        return 0, window(reader, count, self.config.fps, rng, step=repeat)

    def _repeat(self, index: int) -> tuple[int, int | None]:
        """The frames that an action lasts, and the number of a row's actions; (1, None) without actions."""
        space = known_actions(self)
        return (1, None) if space is None else (space.repeat, len(Actions.listed(self.rows[index].columns["actions"])))

    def facts(self, index: int) -> Facts:
        """What is measured of a file. Measurements are remembered on disk while the file stays as it is."""
        if self.index is not None and (known := self.index.facts(index)) is not None:
            return known
        path = self._row(index).path
        facts = self._measures.get(path)
        if facts is None:
            if is_picture(path):
                facts = Facts.of_image(*picture_size(path))
            else:
                with self._open(path) as reader:
                    facts = facts_of(reader)
            self._measures.put(path, facts)
        return facts

    def shape(self, index: int) -> tuple[int, int, int]:
        """The frames of a file, counted at `fps`, and the size of its frames."""
        facts = self.facts(index)
        return (frames_at_rate(facts.frames, facts.last, self.config.fps), facts.height, facts.width)

    @cached_property
    def rates(self) -> list[float]:
        """The frame rates of a few of the clips, in rising order."""
        if self.index is not None:
            return self.index.rates
        return some_rates([row.path for row in self.rows], self._open)

    @contextmanager
    def _open(self, path: Path) -> Iterator[Reader]:
        """A reader of a file, used by nobody else: threads may read clips of one file at the same time.

        PyAV's are cached with their index of packets, so that a worker scans each file once.
        """
        if self.config.backend != "pyav":
            with open_video(path, self.config.backend) as reader:
                yield reader
            return
        readers = self._readers
        kept = readers.pop(path, None)
        with VideoReader(path) if kept is None else kept as reader:
            yield reader
        readers[path] = reader
        if len(readers) > MAX_READERS:
            readers.popitem(last=False)

    @cached_property
    def _readers(self) -> OrderedDict[Path, VideoReader]:
        return OrderedDict()

    @cached_property
    def _measures(self) -> Measures:
        return Measures(Path(self.config.root), self.config.backend)

    def __getstate__(self) -> dict[str, Any]:
        if self.index is None and len(self) > _MANY:
            warn_once(
                "rows without an index",
                f"{len(self)} rows are copied into every loader process; an index opens at once in all of them: stdit index SOURCE "
                "--output NAME.index, then data.manifest=NAME.index.",
            )
        return {key: value for key, value in self.__dict__.items() if key not in ("_readers", "_measures")}


def facts_of(reader: Reader) -> Facts:
    """What is measured of an open video."""
    height, width = reader.size
    stored = {name: getattr(reader, name) for name in ("rotation", "codec") if hasattr(reader, name)}
    return Facts(len(reader), float(reader.timestamps[-1]), reader.fps, height=height, width=width, **stored)


def _refuse(path: str | Path, reason: str | None) -> None:
    """Raise VideoError if there is a reason."""
    if reason is not None:
        raise VideoError(f"{str(path)!r} {reason}.")


def window(reader: Reader, num_frames: int, fps: float | None, rng: np.random.Generator, *, step: int = 1) -> list[int]:
    """Draw the frame numbers of a window at a random position; VideoError if the clip is too short for it.

    step: without `fps`, windows begin at multiples of it, where an action that lasts several frames begins.
    """
    last = float(reader.timestamps[-1])
    _refuse(reader.path, too_short(len(reader), last, num_frames, fps=fps))
    if fps is None:
        start = step * int(rng.integers((len(reader) - num_frames) // step + 1))
        return list(range(start, start + num_frames))
    begin = rng.uniform(0, max(0.0, last - (num_frames - 1) / fps))
    return reader.indices_at(begin + np.arange(num_frames) / fps)


class Images(TableDataset):
    """Image files as clips of one frame."""

    def load(self, index: int, rng: np.random.Generator, size: ClipSize | None = None) -> dict[str, Any]:
        """Read an image, scale it to cover the size, and crop it."""
        size = self._size(size)
        frames = read_picture(self._path(index), cover=(size.height, size.width))[None]
        return self._finish(frames, size, 1.0, rng)

    def shape(self, index: int) -> tuple[int, int, int]:
        """One frame of the size of the file."""
        if self.index is not None and (known := self.index.facts(index)) is not None:
            return (1, known.height, known.width)
        return (1, *picture_size(self._row(index).path))

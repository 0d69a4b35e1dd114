"""Exact reading of video: frames in display order, by number or by time, or an error that says why not."""

import os
from collections.abc import Iterator, Sequence
from copy import copy
from functools import cached_property
from itertools import pairwise

import av
import numpy as np
from av.sidedata.sidedata import SideDataContainer
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import VideoReformatter

from stdit.data.media import VideoError, animated_by_pillow
from stdit.data.pictures import over_ground
from stdit.data.video_file import SALVAGE, Animation, VideoFile

__all__ = ["VideoError", "VideoReader", "frames_at"]

MAX_PIXELS = 2**25  # of a frame: 8K is allowed
MAX_BYTES = 2**32  # of the frames of one call
_SHARP = 1e-4  # seconds by which a time stamp that was not rounded may be late


class VideoReader:
    """Exact access to the frames of a video file by number, also with open GOPs, B-frames, variable rate, edit lists.

    `len(reader)`, `reader.fps`, `reader.size` (H, W), `reader.timestamps`, `reader[i]` -> (H, W, 3) uint8 RGB,
    `reader.get_frames([...])` -> (N, H, W, 3). Frames are numbered in display order and are as they are displayed:
    rotated, with square pixels, transparent parts on white. Decoding is strict: VideoError if a frame is missing or
    damaged; `salvage=True` returns the frames that can be decoded. max_pixels: refuse larger frames before decoding.
    Each process opens the file when it needs it, so a reader can be passed to workers; close it, or use it as a context
    manager.
    """

    def __init__(self, path: str | os.PathLike, *, salvage: bool = False, max_pixels: int = MAX_PIXELS):
        self.path, self.salvage, self.max_pixels = os.fspath(path), salvage, max_pixels
        by_pillow = animated_by_pillow(self.path)
        self._file = Animation(self.path) if by_pillow else VideoFile(self.path, salvage, max_pixels)
        # The position of decoding: the frames to come, the number of the first of them, and the process that decodes.
        self._cursor: Iterator[av.VideoFrame] | None = None
        self._next = 0
        self._process = -1
        try:
            self._index()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> np.ndarray:
        return self.get_frames([index])[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.iter_frames(range(len(self)))

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": copy(self._file), "_cursor": None, "_process": -1}

    def close(self) -> None:
        """Close the file; the next access opens it again."""
        self._cursor = None
        self._file.close()

    @property
    def fps(self) -> float:
        """The mean frame rate, computed from the time stamps, since headers are often wrong."""
        times = self.timestamps
        return (len(times) - 1) / float(times[-1]) if len(times) > 1 and times[-1] > 0 else self._header_fps

    @cached_property
    def timestamps(self) -> np.ndarray:
        """The time (N,) of each frame in seconds; the first is at 0."""
        if self._pts is None:
            return np.arange(len(self)) / self._header_fps
        return (np.array(self._pts) - self._pts[0]) * self._time_base

    @cached_property
    def size(self) -> tuple[int, int]:
        """The frame size (H, W) as displayed, with rotation applied."""
        frame = self._frame(0)
        self._rotation = int(getattr(frame, "rotation", 0))
        height, width = _to_array(frame, VideoReformatter(), None, self._file.pixel_aspect).shape[:2]
        return height, width

    @property
    def codec(self) -> str:
        """The name of the codec, empty for animated pictures."""
        return getattr(self._file, "codec", "")

    @property
    def rotation(self) -> int:
        """The degrees by which the frames are stored turned."""
        return self._rotation if self.size else 0

    def get_frames(self, indices: Sequence[int], size: tuple[int, int] | None = None) -> np.ndarray:
        """Decode frames by number, in the order requested, with repeats -> (N, H, W, 3) uint8 RGB.

        size: (H, W) as displayed, to which frames are resized by area averaging while they are converted, which is
        cheaper than resizing afterwards. Raises IndexError for a number outside the clip, VideoError if a frame cannot
        be decoded, or if the frames would take more than MAX_BYTES.
        """
        requested = [self._valid_index(int(i)) for i in indices]
        if not requested:
            raise ValueError("get_frames got no indices; request at least one frame.")
        order, result = sorted(set(requested)), {}
        for index, frame in zip(order, self.iter_frames(order, size), strict=True):
            if len(requested) * frame.nbytes > MAX_BYTES:
                raise self._file.error(
                    f"has frames of {frame.shape[1]}x{frame.shape[0]} pixels, {len(requested)} of which take "
                    f"{len(requested) * frame.nbytes / 2**30:.1f} GiB", "read fewer at a time, or at a smaller size",
                )  # fmt: skip
            result[index] = frame
        return np.stack([result[index] for index in requested])

    def iter_frames(self, indices: Sequence[int], size: tuple[int, int] | None = None) -> Iterator[np.ndarray]:
        """The frames of `get_frames` one by one, (H, W, 3) each, which bounds the memory; fast for rising numbers."""
        reformatter, last = VideoReformatter(), -1
        shape: tuple[int, ...] | None = None
        array = np.empty(0)
        for index in map(self._valid_index, indices):
            if index != last:
                last, array = index, self._array(index, reformatter, size)
            height, width = shape = shape or array.shape[:2]
            if array.shape[:2] != shape and not self.salvage:
                raise VideoError(
                    f"{self.path!r} changes its frame size from {width}x{height} at frame {index}; "
                    "split it there, or read it in Python with salvage=True, which resizes all frames to the size of the first."
                )
            if array.shape[:2] != shape:
                array = self._array(index, reformatter, (height, width))
            yield array

    def _array(self, index: int, reformatter: VideoReformatter, size: tuple[int, int] | None) -> np.ndarray:
        return _to_array(self._frame(index), reformatter, size, self._file.pixel_aspect)

    def indices_at(self, times: Sequence[float] | np.ndarray) -> list[int]:
        """The frame displayed at each time, in seconds from the first frame (frame rate conversion by time stamps)."""
        return frames_at(self.timestamps, times, self._time_base)

    def _valid_index(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"frame {index} is outside {self.path!r}, which has {len(self)} frames.")
        return index % len(self)

    def _index(self) -> None:
        packets = self._file.packets()
        self._header_fps, self._time_base, self._count = packets.fps, packets.time_base, len(packets.pts)
        pts = [p for p in packets.pts if p is not None]
        distinct = len(pts) == self._count == len(set(pts))
        self._pts: list[int] | None = sorted(pts) if distinct else None
        self._keys = packets.keys or []
        self._number = None if packets.keys is None else {p: i for i, p in enumerate(sorted(pts))}
        if self.salvage:
            self._count_by_decoding()
        if not self._count:
            raise self._file.error("holds no frames")

    def _count_by_decoding(self) -> None:
        """Decode the whole file to count its frames and, if they increase, take their time stamps."""
        times = [frame.pts for frame in self._file.decode(None)]
        self._count = len(times)
        increasing = all(t is not None for t in times) and all(a < b for a, b in pairwise(times))
        self._pts = times if increasing else None

    def _start(self, key: int | None) -> Iterator["av.VideoFrame"]:
        self._process = os.getpid()
        return self._file.decode(key)

    def _frame(self, index: int) -> "av.VideoFrame":
        """Decode one frame by number, from the current position if no key frame is nearer."""
        if self._number is None or self._pts is None:
            return self._frame_in_order(index)
        # Key frames at or before the frame, nearest first, and finally the beginning of the file.
        starts = [p for p in reversed(self._keys) if p <= self._pts[index]] + [None]
        can_continue = self._cursor is not None and self._process == os.getpid() and self._next <= index
        if not can_continue or (starts[0] is not None and starts[0] > self._pts[self._next]):
            self._cursor = None
        if self._cursor is not None:
            frame = self._advance(index, self._cursor, self._number)
            if frame is not None:
                return frame
        for start in starts:
            self._next = -1
            frame = self._advance(index, self._start(start), self._number)
            if frame is not None:
                return frame
        # The time stamps of decoded frames are not those of the packets: count frames instead.
        self._number = None
        return self._frame_in_order(index)

    def _advance(
        self, index: int, cursor: Iterator["av.VideoFrame"], numbers: dict[int, int]
    ) -> "av.VideoFrame | None":
        """Decode up to frame `index`; None if the frames before it are not consecutive, or it is not found."""
        self._cursor = cursor
        for frame in cursor:
            number = numbers.get(frame.pts)
            if number is None or number > index or (self._next >= 0 and number != self._next):
                break
            self._next = number + 1
            if number == index:
                return frame
        self._cursor = None
        return None

    def _frame_in_order(self, index: int) -> "av.VideoFrame":
        """Decode one frame by counting from the beginning, or from the current position if that is before it."""
        if self._cursor is None or self._process != os.getpid() or self._next > index:
            self._cursor, self._next = self._start(None), 0
        for frame in self._cursor:
            self._next += 1
            if self._next == index + 1:
                return frame
        self._cursor = None
        raise self._file.error(f"yields {self._next} frames of {len(self)}: it is damaged or cut short", SALVAGE)


def frames_at(timestamps: np.ndarray, times: Sequence[float] | np.ndarray, time_base: float | None = None) -> list[int]:
    """The index of the frame displayed at each time, for frames at increasing `timestamps` in seconds.

    time_base: the unit in which the file counts time; without it, milliseconds if all time stamps are whole ones.
    """
    late = np.asarray(times, dtype=float) + _rounding(timestamps, time_base)
    indices = np.searchsorted(timestamps, late, side="right") - 1
    return [int(i) for i in indices.clip(0, len(timestamps) - 1)]


def _rounding(timestamps: np.ndarray, time_base: float | None) -> float:
    """Seconds by which a frame may seem late since its time stamp was rounded: up to one unit, if the units are coarse.

    Stamps that are evenly spaced were not rounded; nor were those of frames that last hardly longer than a unit.
    """
    if time_base is None:
        time_base = 1e-3 if np.allclose(timestamps * 1e3, np.round(timestamps * 1e3), atol=1e-3) else 0.0
    gaps = np.diff(timestamps)
    if time_base <= _SHARP or not len(gaps) or np.ptp(gaps) < time_base / 2:
        return _SHARP
    typical = float(np.median(gaps))
    return min(time_base, typical / 4) if time_base < typical / 2 else _SHARP


def _to_array(
    frame: "av.VideoFrame", reformatter: VideoReformatter, size: tuple[int, int] | None, pixel_aspect: float = 1.0
) -> np.ndarray:
    """The frame as displayed, (H, W, 3) uint8 RGB: rotated and mirrored by its display matrix, with square pixels."""
    transpose, flip_x, flip_y = _orientation(frame)
    width = height = None
    if size is not None:
        height, width = size if not transpose else size[::-1]
    elif pixel_aspect != 1:  # the side that is too short is stretched, so that no detail is lost
        width, height = round(frame.width * max(1, pixel_aspect)), round(frame.height * max(1, 1 / pixel_aspect))
    rgb = reformatter.reformat(
        _opaque(frame), width=width, height=height, format="rgb24", interpolation="AREA" if width else None
    )
    array = rgb.to_ndarray()
    if transpose:
        array = array.swapaxes(0, 1)
    return np.ascontiguousarray(array[:: -1 if flip_y else 1, :: -1 if flip_x else 1])


def _opaque(frame: "av.VideoFrame") -> "av.VideoFrame":
    """The frame with transparent parts on white; the frame itself if there are none."""
    if not frame.format.has_palette and not any(component.is_alpha for component in frame.format.components):
        return frame
    rgba = frame.to_ndarray(format="rgba")
    return frame if rgba[..., 3].min() == 255 else av.VideoFrame.from_ndarray(over_ground(rgba), format="rgb24")


def _orientation(frame: "av.VideoFrame") -> tuple[bool, bool, bool]:
    """(transpose, then mirror x, then mirror y) for the frame's display matrix, to the nearest multiple of 90 degrees."""
    # Not frame.side_data, which makes a cycle of references: frames, 12 MB each in 4K, would wait for the garbage collector.
    data = SideDataContainer(frame).get(SideDataType.DISPLAYMATRIX)  # type: ignore[call-arg]
    if data is None:
        return False, False, False
    (a, b, _), (c, d, _), _ = np.frombuffer(bytes(data), np.int32).reshape(3, 3).tolist()
    if abs(b) > abs(a):
        return True, c < 0, b < 0
    return False, a < 0, d < 0

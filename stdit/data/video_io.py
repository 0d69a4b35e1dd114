"""Exact reading of video: frames in display order, by number or by time, or an error that says why not."""

import os
import stat
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import av
import av.error
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import VideoReformatter

# Containers that hold their own data. Playlists (hls, concat, dash) are left out: they may refer to other files or hosts.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,h264,hevc,av1,obu,ivf,gif,apng,ogg,asf,"
    "m4v,mxf,nut,rm,vc1,dv,h263,swf,y4m,yuv4mpegpipe,webp_anim"
)
# In these formats a frame may depend on all earlier ones, although every packet may be marked as a key frame.
_NOT_SEEKABLE = {"gif", "apng", "h264", "hevc", "m4v", "mpegvideo", "av1", "obu"}
_SALVAGE = "repair it, leave it out, or pass salvage=True to get the frames that can be decoded"


class VideoError(ValueError):
    """A file that cannot be read as video, or not completely; the message has the file, the reason and a remedy."""


class VideoReader:
    """Exact access to the frames of a video file by number, also with open GOPs, B-frames, variable rate, edit lists.

    `len(reader)`, `reader.fps`, `reader.size` (H, W), `reader.timestamps`, `reader[i]` -> (H, W, 3) uint8 RGB,
    `reader.get_frames([...])` -> (N, H, W, 3). Frames are numbered in display order; rotation is applied. Decoding is
    strict: VideoError if a frame is missing or damaged; `salvage=True` returns the frames that can be decoded.
    max_pixels: refuse larger frames before decoding. Each process opens the file when it needs it, so a reader can be
    passed to workers; close it, or use it as a context manager.
    """

    def __init__(self, path: str | os.PathLike, *, salvage: bool = False, max_pixels: int = 2**26):
        self.path, self.salvage, self.max_pixels = os.fspath(path), salvage, max_pixels
        self._container: Any = None  # PyAV's, opened in the process `_process`
        self._process = -1
        # The position of decoding: the frames to come, and the number of the first of them.
        self._cursor: Iterator[tuple[int, av.VideoFrame]] | None = None
        self._next = 0
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
        return (self[i] for i in range(len(self)))

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_container": None, "_cursor": None, "_process": -1}

    def close(self) -> None:
        """Close the file; the next access opens it again."""
        self._cursor = None
        self._release()

    def _release(self) -> None:
        container, self._container = getattr(self, "_container", None), None
        # A decoder inherited through fork is not closed: touching it would crash this process.
        if container is not None and self._process == os.getpid():
            container.close()

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
        height, width = self[0].shape[:2]
        return height, width

    def get_frames(self, indices: Sequence[int], size: tuple[int, int] | None = None) -> np.ndarray:
        """Decode frames by number, in the order requested, with repeats -> (N, H, W, 3) uint8 RGB.

        size: (H, W) as displayed, to which frames are resized by area averaging while they are converted, which is
        cheaper than resizing afterwards. Raises IndexError for a number outside the clip, VideoError if a frame cannot
        be decoded.
        """
        requested = [self._valid_index(int(i)) for i in indices]
        if not requested:
            raise ValueError("get_frames got no indices; request at least one frame.")
        reformatter, result = VideoReformatter(), {}
        for index in sorted(set(requested)):
            result[index] = _to_array(self._frame(index), reformatter, size)
            shape = next(iter(result.values())).shape
            if result[index].shape != shape and not self.salvage:
                raise VideoError(
                    f"{self.path!r} changes its frame size from {shape[1]}x{shape[0]} at frame {index}; "
                    "split it there, or pass salvage=True to resize all frames to the size of the first."
                )
            if result[index].shape != shape:
                result[index] = _to_array(self._frame(index), reformatter, shape[:2])
        return np.stack([result[index] for index in requested])

    def indices_at(self, times: Sequence[float] | np.ndarray) -> list[int]:
        """The frame displayed at each time, in seconds from the first frame (frame rate conversion by time stamps)."""
        return frames_at(self.timestamps, times)

    def _valid_index(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"frame {index} is outside {self.path!r}, which has {len(self)} frames.")
        return index % len(self)

    def _error(self, reason: str, remedy: str = "re-encode it or leave it out") -> VideoError:
        return VideoError(f"{self.path!r} {' '.join(reason.split())}; {remedy}.")

    def _open(self) -> tuple[Any, Any]:
        """Open the file again: PyAV's container, at the beginning, and its video stream."""
        self._release()
        self._process = os.getpid()
        try:
            # Opening a FIFO must not block.
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            descriptor = os.open(self.path, flags)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise self._error("is not a regular file", "give a video file")
            file = os.fdopen(descriptor, "rb")
        except (OSError, ValueError) as error:
            if isinstance(error, VideoError):
                raise
            raise self._error(f"cannot be opened ({_reason(error)})", "check the path and its permissions") from error
        # A file object instead of a name: neither a protocol nor an unusual name nor a playlist can open anything else.
        options = {"protocol_whitelist": "", "format_whitelist": FORMATS}
        try:
            self._container = av.open(file, options=options, metadata_errors="ignore", buffer_size=1 << 17)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            file.close()
            raise self._error(f"is not a video that this build can read ({_reason(error)})") from error
        stream = next(_video_streams(self._container), None)
        if stream is None:
            raise self._error("has no video stream")
        context = stream.codec_context
        if context is None:
            raise self._error("uses a codec that this build cannot decode")
        if context.width * context.height > self.max_pixels:
            raise self._error(f"has frames of {context.width}x{context.height} pixels", "pass a larger max_pixels")
        context.thread_count = 1
        if not self.salvage:
            context.options = {"err_detect": "explode"}
        return self._container, stream

    def _index(self) -> None:
        """Read all packets once, without decoding: find the frames and the key frames at which decoding can begin."""
        container, stream = self._open()
        packets: list[tuple[int | None, bool]] = []
        samples = 0
        try:
            codec = stream.codec_context.name
            for packet in container.demux(stream):
                samples += bool(packet.size)
                if packet.size and not packet.is_discard and _is_displayed(packet, codec):
                    packets.append((packet.pts, packet.is_keyframe))
        except av.error.FFmpegError as error:
            if not self.salvage:
                raise self._error(f"is damaged after {len(packets)} packets ({_reason(error)})", _SALVAGE) from error
        header_rate = stream.average_rate or stream.guessed_rate or 25
        self._header_fps = float(header_rate)
        self._time_base = float(stream.time_base or 1)
        name = container.format.name
        pts = [p for p, _ in packets if p is not None]
        distinct = len(pts) == len(packets) == len(set(pts))
        ordered = distinct and name not in _NOT_SEEKABLE
        self._pts: list[int] | None = sorted(pts) if distinct else None
        self._number = {p: i for i, p in enumerate(self._pts)} if self._pts and ordered else None
        self._keys = sorted(p for p, key in packets if key and p is not None) if ordered else []
        self._count = len(packets)
        if "mp4" in name and stream.frames > samples and not self.salvage:
            raise self._error(f"announces {stream.frames} frames but holds {samples}: it is cut short", _SALVAGE)
        if self.salvage:
            self._number, self._keys = None, []
            self._count_by_decoding()
        if not self._count:
            raise self._error("holds no frames")

    def _count_by_decoding(self) -> None:
        """Decode the whole file to count its frames and, if they increase, take their time stamps."""
        times = [frame.pts for _, frame in self._decode(None)]
        self._count = len(times)
        increasing = all(t is not None for t in times) and all(a < b for a, b in pairwise(times))
        self._pts = times if increasing else None

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
            frame = self._advance(index, self._decode(start), self._number)
            if frame is not None:
                return frame
        # The time stamps of decoded frames are not those of the packets: count frames instead.
        self._number = None
        return self._frame_in_order(index)

    def _advance(
        self, index: int, cursor: Iterator[tuple[int, "av.VideoFrame"]], numbers: dict[int, int]
    ) -> "av.VideoFrame | None":
        """Decode up to frame `index`; None if the frames before it are not consecutive, or it is not found."""
        self._cursor = cursor
        for _, frame in cursor:
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
            self._cursor = self._decode(None)
        for number, frame in self._cursor:
            self._next = number + 1
            if number == index:
                return frame
        self._cursor = None
        raise self._error(f"yields {self._next} frames of {len(self)}: it is damaged or cut short", _SALVAGE)

    def _decode(self, start: int | None) -> Iterator[tuple[int, "av.VideoFrame"]]:
        """Yield (count, frame) from the time stamp of a key frame on, or from the beginning."""
        container = self._container
        if start is None or container is None or self._process != os.getpid():
            container, stream = self._open()
        else:
            stream = next(_video_streams(container))
            stream.codec_context.flush_buffers()
        if start is not None:
            try:
                container.seek(start, stream=stream, backward=True)
            except av.error.FFmpegError:
                container, stream = self._open()
        count, packet = 0, None
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
                frames = packet.decode() if packet is not None else []
            except (av.error.FFmpegError, EOFError) as error:
                if self.salvage and not isinstance(error, av.error.EOFError | EOFError):
                    continue
                # After a seek into an open GOP, frames displayed before the key frame lack the frames they refer to.
                if start is not None and packet is not None and packet.pts is not None and packet.pts < start:
                    continue
                raise self._error(f"cannot be decoded after frame {count} ({_reason(error)})", _SALVAGE) from error
            if packet is None:
                return
            for frame in frames:
                if frame.is_corrupt and not self.salvage:
                    raise self._error(f"is damaged at frame {count}", _SALVAGE)
                yield count, frame
                count += 1


def frames_at(timestamps: np.ndarray, times: Sequence[float] | np.ndarray) -> list[int]:
    """The index of the frame displayed at each time, for frames at increasing `timestamps` in seconds."""
    # 0.1 ms is added, so that a time that equals a frame's time stamp up to rounding gives that frame.
    indices = np.searchsorted(timestamps, np.asarray(times, dtype=float) + 1e-4, side="right") - 1
    return [int(i) for i in indices.clip(0, len(timestamps) - 1)]


def _video_streams(container: Any) -> Iterator[Any]:
    """The video streams of a container, without cover pictures."""
    return (s for s in container.streams.video if not s.disposition & s.disposition.attached_pic)


def _is_displayed(packet: "av.Packet", codec: str) -> bool:
    """Whether a packet holds a displayed frame: in VP8 and VP9 there are packets with reference frames only."""
    if codec == "vp8":
        return bool(bytes(packet)[0] & 0x10)  # show_frame
    if codec == "vp9":
        data = bytes(packet)
        # A superframe ends in an index byte 110xxxxx; it holds hidden frames and a displayed one.
        superframe = data[-1] & 0xE0 == 0xC0
        offset = 1 if data[0] & 0x30 == 0x30 else 0  # the header of profile 3 has a reserved bit
        # show_existing_frame, or show_frame
        return superframe or bool(data[0] << offset & 0x08) or bool(data[0] << offset & 0x02)
    return True


def _reason(error: Exception) -> str:
    """The text of an error, without the number and path in those of FFmpeg and the system."""
    return getattr(error, "strerror", None) or str(error)


def _to_array(frame: "av.VideoFrame", reformatter: VideoReformatter, size: tuple[int, int] | None) -> np.ndarray:
    """The frame as displayed, (H, W, 3) uint8 RGB, rotated and mirrored by its display matrix."""
    transpose, flip_x, flip_y = _orientation(frame)
    width = height = None
    if size is not None:
        height, width = size if not transpose else size[::-1]
    rgb = reformatter.reformat(
        frame, width=width, height=height, format="rgb24", interpolation="AREA" if size else None
    )
    array = rgb.to_ndarray()
    if transpose:
        array = array.swapaxes(0, 1)
    return np.ascontiguousarray(array[:: -1 if flip_y else 1, :: -1 if flip_x else 1])


def _orientation(frame: "av.VideoFrame") -> tuple[bool, bool, bool]:
    """(transpose, then mirror x, then mirror y) for the frame's display matrix, to the nearest multiple of 90 degrees."""
    data = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    if data is None:
        return False, False, False
    (a, b, _), (c, d, _), _ = np.frombuffer(bytes(data), np.int32).reshape(3, 3).tolist()
    if abs(b) > abs(a):
        return True, c < 0, b < 0
    return False, a < 0, d < 0

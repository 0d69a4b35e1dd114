"""Reading video exactly: frames in display order, by number or by time, or a clear refusal."""

import os
import stat
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise

import av
import av.error
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import VideoReformatter

# Containers that hold their own data. Playlists (hls, concat, dash) may point at other files or at hosts.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,h264,hevc,av1,obu,ivf,gif,apng,ogg,asf,"
    "m4v,mxf,nut,rm,vc1,dv,h263,swf,y4m,yuv4mpegpipe,webp_anim"
)
# Frames of these build on all before them although every packet may call itself a key frame.
_NOT_SEEKABLE = {"gif", "apng", "h264", "hevc", "m4v", "mpegvideo", "av1", "obu"}


class VideoError(ValueError):
    """A file that cannot be read as video, or not in full; the message names file, reason and remedy."""


class VideoReader:
    """Frames of a video file by number, exactly: open GOP, B-frames, variable rate, edit lists, rotation.

    `len(reader)`, `reader.fps`, `reader.size` (H, W), `reader.timestamps`, `reader[i]` -> (H, W, 3) uint8 RGB,
    `reader.get_frames([...])` -> (N, H, W, 3); numbers count frames in display order. Decoding is strict: a file that
    yields fewer frames than it holds, or damaged ones, raises VideoError; `salvage=True` gives what can be had.
    Opened lazily in each process, so a reader may be handed to workers; close it, or use it as a context manager.
    """

    def __init__(self, path: str | os.PathLike, *, salvage: bool = False, max_pixels: int = 2**26):
        self.path, self.salvage, self.max_pixels = os.fspath(path), salvage, max_pixels
        self._container = None
        self._process = -1
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

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_container": None, "_cursor": None, "_process": -1}

    def close(self) -> None:
        """Close the file; the reader opens it again when used again."""
        self._cursor = None
        self._release()

    def _release(self) -> None:
        container, self._container = getattr(self, "_container", None), None
        # A decoder inherited through fork is left alone: touching it would crash this process.
        if container is not None and self._process == os.getpid():
            container.close()

    @property
    def fps(self) -> float:
        """Mean frame rate by time stamps (headers are often wrong)."""
        times = self.timestamps
        return (len(times) - 1) / float(times[-1]) if len(times) > 1 and times[-1] > 0 else self._header_fps

    @cached_property
    def timestamps(self) -> np.ndarray:
        """(N,) seconds of each frame, the first at 0."""
        if self._pts is None:
            return np.arange(len(self)) / self._header_fps
        return (np.array(self._pts) - self._pts[0]) * self._time_base

    @cached_property
    def size(self) -> tuple[int, int]:
        """(H, W) as shown, rotation applied."""
        height, width = self[0].shape[:2]
        return height, width

    def get_frames(self, indices: Sequence[int], size: tuple[int, int] | None = None) -> np.ndarray:
        """Frames by number, in the order asked for, repeats allowed -> (N, H, W, 3) uint8 RGB.

        `size` (H, W) as shown scales while converting (area averaging), which is cheaper than scaling afterwards.
        Raises IndexError outside the clip, VideoError if the file cannot give them.
        """
        wanted = [self._checked(int(i)) for i in indices]
        if not wanted:
            raise ValueError("get_frames got no indices; ask for at least one frame.")
        reformatter, result = VideoReformatter(), {}
        for index in sorted(set(wanted)):
            result[index] = _to_array(self._frame(index), reformatter, size)
            shape = next(iter(result.values())).shape
            if result[index].shape != shape and not self.salvage:
                raise VideoError(
                    f"{self.path!r} changes its picture size from {shape[1]}x{shape[0]} at frame {index}; "
                    "split it there, or pass salvage=True to scale all frames to the first."
                )
            if result[index].shape != shape:
                result[index] = _to_array(self._frame(index), reformatter, shape[:2])
        return np.stack([result[index] for index in wanted])

    def indices_at(self, times: Sequence[float]) -> list[int]:
        """The frame shown at each time in seconds from the first frame (frame rate conversion by time stamps)."""
        found = np.searchsorted(self.timestamps, np.asarray(times, dtype=float) + 1e-4, side="right") - 1
        return [int(i) for i in found.clip(0, len(self) - 1)]

    def _checked(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"frame {index} is outside {self.path!r}, which has {len(self)} frames.")
        return index % len(self)

    def _refuse(self, reason: str, remedy: str = "re-encode it or leave it out") -> VideoError:
        return VideoError(f"{self.path!r} {' '.join(reason.split())}; {remedy}.")

    def _open(self):
        """A fresh container at its start, and its video stream."""
        self._release()
        self._process = os.getpid()
        try:
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a FIFO must not block
            descriptor = os.open(self.path, flags)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise self._refuse("is not a regular file", "give a video file")
            file = os.fdopen(descriptor, "rb")
        except (OSError, ValueError) as error:
            if isinstance(error, VideoError):
                raise
            raise self._refuse(f"cannot be opened ({_why(error)})", "check the path and its permissions") from error
        # A file object, not a name: no protocol, no odd name and no playlist can lead anywhere else.
        options = {"protocol_whitelist": "", "format_whitelist": FORMATS}
        try:
            self._container = av.open(file, options=options, metadata_errors="ignore", buffer_size=1 << 17)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            file.close()
            raise self._refuse(f"is not a video this build reads ({_why(error)})") from error
        streams = [s for s in self._container.streams.video if not s.disposition & s.disposition.attached_pic]
        if not streams:
            raise self._refuse("has no video stream")
        stream = streams[0]
        context = stream.codec_context
        if context is None:
            raise self._refuse("uses a codec that this build cannot decode")
        if context.width * context.height > self.max_pixels:
            raise self._refuse(f"has pictures of {context.width}x{context.height}", "pass a larger max_pixels")
        context.thread_count = 1
        if not self.salvage:
            context.options = {"err_detect": "explode"}
        return self._container, stream

    def _index(self) -> None:
        """Read all packets once, decoding nothing: which frames there are, where decoding can begin."""
        container, stream = self._open()
        packets: list[tuple[int | None, bool]] = []
        samples = 0
        try:
            codec = stream.codec_context.name
            for packet in container.demux(stream):
                samples += bool(packet.size)
                if packet.size and not packet.is_discard and _is_shown(packet, codec):
                    packets.append((packet.pts, packet.is_keyframe))
        except av.error.FFmpegError as error:
            if not self.salvage:
                raise self._refuse(f"is damaged after {len(packets)} packets ({_why(error)})", _SALVAGE) from error
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
            raise self._refuse(f"announces {stream.frames} frames and holds {samples}: it is cut short", _SALVAGE)
        if self.salvage:
            self._number, self._keys = None, []
            self._count_by_decoding()
        if not self._count:
            raise self._refuse("holds no frames")

    def _count_by_decoding(self) -> None:
        times = [frame.pts for _, frame in self._decode(None)]
        self._count = len(times)
        rising = all(t is not None for t in times) and all(a < b for a, b in pairwise(times))
        self._pts = times if rising else None

    def _frame(self, index: int) -> "av.VideoFrame":
        """One frame by number, going on from where decoding stands if that is on the way."""
        if self._number is None:
            return self._frame_in_order(index)
        # Key frames at or before the frame, nearest first, and at last the beginning of the file.
        starts = [p for p in reversed(self._keys) if p <= self._pts[index]] + [None]
        on_the_way = self._cursor is not None and self._process == os.getpid() and self._next <= index
        if not on_the_way or (starts[0] is not None and starts[0] > self._pts[self._next]):
            self._cursor = None
        for start in ["here", *starts] if self._cursor is not None else starts:
            frame = self._advance(index, start)
            if frame is not None:
                return frame
        # Decoded time stamps are not those of the packets: count frames instead.
        self._number = None
        return self._frame_in_order(index)

    def _advance(self, index: int, start) -> "av.VideoFrame | None":
        """Decode from `start` to the frame; None if the frames on the way are not the neighbours they should be."""
        if start != "here":
            self._cursor, self._next = self._decode(start), -1
        for _, frame in self._cursor:
            number = self._number.get(frame.pts)
            if number is None or number > index or (self._next >= 0 and number != self._next):
                break
            self._next = number + 1
            if number == index:
                return frame
        self._cursor = None
        return None

    def _frame_in_order(self, index: int) -> "av.VideoFrame":
        if self._cursor is None or self._process != os.getpid() or self._next > index:
            self._cursor = self._decode(None)
        for number, frame in self._cursor:
            self._next = number + 1
            if number == index:
                return frame
        self._cursor = None
        raise self._refuse(f"yields {self._next} frames of {len(self)}: it is damaged or cut short", _SALVAGE)

    def _decode(self, start: int | None) -> Iterator[tuple[int, "av.VideoFrame"]]:
        """(count, frame) from a key frame's time stamp, or from the beginning."""
        container, stream = self._container, None
        if start is None or container is None or self._process != os.getpid():
            container, stream = self._open()
        else:
            stream = next(s for s in container.streams.video if not s.disposition & s.disposition.attached_pic)
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
                # After a seek into an open GOP, pictures shown before the key frame lack what they refer to.
                if start is not None and packet is not None and packet.pts is not None and packet.pts < start:
                    continue
                raise self._refuse(f"cannot be decoded after frame {count} ({_why(error)})", _SALVAGE) from error
            if packet is None:
                return
            for frame in frames:
                if frame.is_corrupt and not self.salvage:
                    raise self._refuse(f"is damaged at frame {count}", _SALVAGE)
                yield count, frame
                count += 1


def _is_shown(packet: "av.Packet", codec: str) -> bool:
    """Whether a packet brings a picture to the screen: VP8 and VP9 keep references in packets of their own."""
    if codec == "vp8":
        return bool(bytes(packet)[0] & 0x10)
    if codec == "vp9":
        data = bytes(packet)
        superframe = data[-1] & 0xE0 == 0xC0
        spare = 1 if data[0] & 0x30 == 0x30 else 0  # profile 3 has one bit more
        return superframe or bool(data[0] << spare & 0x08) or bool(data[0] << spare & 0x02)
    return True


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


_SALVAGE = "repair it, leave it out, or pass salvage=True for what can be had"


def _to_array(frame: "av.VideoFrame", reformatter: VideoReformatter, size: tuple[int, int] | None) -> np.ndarray:
    """RGB (H, W, 3) as shown: the display matrix may turn and mirror."""
    turn = _orientation(frame)
    width = height = None
    if size is not None:
        height, width = size if not turn[0] else size[::-1]
    rgb = reformatter.reformat(
        frame, width=width, height=height, format="rgb24", interpolation="AREA" if size else None
    )
    array = rgb.to_ndarray()
    transpose, flip_x, flip_y = turn
    if transpose:
        array = array.swapaxes(0, 1)
    return np.ascontiguousarray(array[:: -1 if flip_y else 1, :: -1 if flip_x else 1])


def _orientation(frame: "av.VideoFrame") -> tuple[bool, bool, bool]:
    """(transpose, then mirror x, then mirror y) of the frame's display matrix; multiples of 90 degrees."""
    data = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    if data is None:
        return False, False, False
    (a, b, _), (c, d, _), _ = np.frombuffer(bytes(data), np.int32).reshape(3, 3).tolist()
    if abs(b) > abs(a):
        return True, c < 0, b < 0
    return False, a < 0, d < 0

"""One file of moving pictures: opened safely, its packets listed, its frames decoded from the beginning or a key frame."""

import os
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import av
import av.error
import numpy as np

from stdit.data.media import VideoError, open_regular, reason_of
from stdit.data.pictures import read_animation

# Containers that hold their own data. Playlists (hls, concat, dash) are left out: they may refer to other files or hosts.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,h264,hevc,av1,obu,ivf,gif,apng,ogg,asf,"
    "m4v,mxf,nut,rm,vc1,dv,h263,swf,y4m,yuv4mpegpipe"
)
# In these formats a frame may depend on all earlier ones, although every packet may be marked as a key frame.
_NOT_SEEKABLE = {"gif", "apng", "h264", "hevc", "m4v", "mpegvideo", "av1", "obu"}
SALVAGE = "repair it, leave it out, or read it in Python with salvage=True, which gives the frames that can be decoded"
_MAX_STREAMS = 16  # streams that are probed within `max_pixels`


class Packets(NamedTuple):
    """The packets of a video that hold a displayed frame, in the order of the file.

    pts: their time stamps in units of `time_base` seconds, None where there is none. keys: time stamps of key frames, at
    which decoding can begin; None if it can only begin at the first frame. fps: the header's rate.
    """

    pts: list[int | None]
    keys: list[int] | None
    time_base: float
    fps: float


class VideoFile:
    """A file that FFmpeg decodes. Decoding is strict unless `salvage`; frames larger than `max_pixels` are refused.

    pixel_aspect: the width of a pixel over its height. codec: its name.
    """

    codec = ""

    def __init__(self, path: str, salvage: bool, max_pixels: int):
        self.path, self.salvage, self.max_pixels = path, salvage, max_pixels
        self.pixel_aspect = 1.0
        self._container: Any = None  # PyAV's, opened in the process `_process`
        self._file: BinaryIO | None = None
        self._decoder: Any = None
        self._process = -1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_container": None, "_file": None, "_decoder": None, "_process": -1}

    def close(self) -> None:
        """Close the file; it is opened again when it is needed."""
        container, self._container, self._decoder = self._container, None, None
        # A decoder inherited through fork is not closed: touching it would crash this process.
        if container is not None and self._process == os.getpid():
            container.close()
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def error(self, reason: str, remedy: str = "re-encode it or leave it out") -> VideoError:
        """The error of this file for a reason, with a remedy."""
        return VideoError(f"{self.path!r} {' '.join(reason.split())}; {remedy}.")

    def packets(self) -> Packets:
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
                raise self.error(f"is damaged after {len(packets)} packets ({reason_of(error)})", SALVAGE) from error
        name = container.format.name
        if "mp4" in name and stream.frames > samples and not self.salvage:
            raise self.error(f"announces {stream.frames} frames but holds {samples}: it is cut short", SALVAGE)
        pts = [p for p, _ in packets]
        in_order = name in _NOT_SEEKABLE or None in pts or len(set(pts)) < len(pts) or self.salvage
        keys = None if in_order else sorted(p for p, key in packets if key and p is not None)
        rate = stream.average_rate or stream.guessed_rate or 25
        return Packets(pts, keys, float(stream.time_base or 1), float(rate))

    def decode(self, start: int | None) -> Iterator["av.VideoFrame"]:
        """Decode from the key frame at time stamp `start` on, or from the beginning."""
        container = self._container
        if start is None or container is None or self._process != os.getpid():
            container, stream = self._open()
        else:
            stream = next(_video_streams(container))
            self._decoder.flush_buffers()
        if start is not None:
            try:
                container.seek(start, stream=stream, backward=True)
            except av.error.FFmpegError:
                container, stream = self._open()
        decoder, count, packet = self._decoder, 0, None
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
                frames = decoder.decode(packet) if packet is not None else []
            except (av.error.FFmpegError, EOFError) as error:
                if self.salvage and not isinstance(error, av.error.EOFError | EOFError):
                    continue
                # After a seek into an open GOP, frames displayed before the key frame lack the frames they refer to.
                if start is not None and packet is not None and packet.pts is not None and packet.pts < start:
                    continue
                raise self.error(f"cannot be decoded after frame {count} ({reason_of(error)})", SALVAGE) from error
            if packet is None:
                return
            for frame in frames:
                if frame.is_corrupt and not self.salvage:
                    raise self.error(f"is damaged at frame {count}", SALVAGE)
                yield frame
                count += 1

    def _open(self) -> tuple[Any, Any]:
        """Open the file again: PyAV's container, at the beginning, and its video stream."""
        self.close()
        self._process = os.getpid()
        self._file = open_regular(self.path)
        # A file object instead of a name: neither a protocol nor an unusual name nor a playlist can open anything else.
        try:
            self._container = self._probe(self._file)
        except VideoError:  # of a store, which says more
            self.close()
            raise
        except (av.error.FFmpegError, OSError, ValueError) as error:
            self.close()
            raise self.error(f"is not a video that this build can read ({reason_of(error)})") from error
        stream = next(_video_streams(self._container), None)
        if stream is None:
            raise self.error("has no video stream")
        if stream.codec_context is None:
            raise self.error("uses a codec that this build cannot decode")
        self._decoder = self._open_decoder(stream)
        self.pixel_aspect = _pixel_aspect(stream)
        self.codec = stream.codec_context.name
        return self._container, stream

    def _probe(self, file: BinaryIO) -> Any:
        """PyAV's container of a file object, whose first frames are decoded to learn what the header does not say."""
        open_container = partial(
            av.open, file, options={"protocol_whitelist": "", "format_whitelist": FORMATS}, metadata_errors="ignore",
            buffer_size=1 << 17,
        )  # fmt: skip
        try:
            return open_container(stream_options=[{"max_pixels": str(self.max_pixels)}] * _MAX_STREAMS)
        except ValueError as error:
            if isinstance(error, av.error.FFmpegError):
                raise
            file.seek(0)  # a format without a list of streams, such as flv, takes no options of streams
            return open_container()

    def _open_decoder(self, stream: Any) -> Any:
        context = stream.codec_context
        if context.width * context.height > self.max_pixels:
            raise self.error(f"has frames of {context.width}x{context.height} pixels", "pass a larger max_pixels")
        limit = {"max_pixels": str(self.max_pixels)}  # also of frames that the header does not announce
        options = limit if self.salvage else {"err_detect": "explode", **limit}
        context.thread_count, context.options = 1, options
        beside = stream.metadata.get("alpha_mode") == "1" and context.name in ("vp8", "vp9")
        return _AlphaDecoder(context, options) if beside else context


class _AlphaDecoder:
    """Decodes VP8 and VP9 with transparency: beside each packet there is one of a second stream, whose grey is the alpha."""

    def __init__(self, colours: Any, options: dict[str, str]):
        self._colours, self._alpha = colours, av.CodecContext.create(colours.name, "r")
        self._alpha.thread_count, self._alpha.options = 1, options

    def flush_buffers(self) -> None:
        """Forget the frames that later ones would refer to, before decoding elsewhere."""
        self._colours.flush_buffers()
        self._alpha.flush_buffers()

    def decode(self, packet: "av.Packet") -> list["av.VideoFrame"]:
        """The frames of a packet, in rgba."""
        frames = self._colours.decode(packet)
        beside = [bytes(data)[8:] for data in packet.iter_sidedata() if data.data_type == "matroska_block_additional"]
        planes = self._alpha.decode(av.Packet(beside[0])) if packet.size and beside else []
        return (
            [_with_alpha(*pair) for pair in zip(frames, planes, strict=True)] if len(planes) == len(frames) else frames
        )


def _with_alpha(colours: "av.VideoFrame", alpha: "av.VideoFrame") -> "av.VideoFrame":
    """One frame of both, which a damaged frame, or one of another size, leaves as it is."""
    if colours.is_corrupt or (colours.width, colours.height) != (alpha.width, alpha.height):
        return colours
    plane = np.frombuffer(alpha.planes[0], np.uint8).reshape(-1, alpha.planes[0].line_size)
    rgb = colours.to_ndarray(format="rgb24")
    frame = av.VideoFrame.from_ndarray(np.dstack([rgb, plane[: alpha.height, : alpha.width]]), format="rgba")
    frame.pts, frame.time_base = colours.pts, colours.time_base
    return frame


class Animation:
    """An animated WebP or AVIF, which Pillow decodes and FFmpeg does not, with the interface of `VideoFile`."""

    pixel_aspect = 1.0

    def __init__(self, path: str):
        self.path = path

    def close(self) -> None:
        """Nothing is open between two calls."""

    def error(self, reason: str, remedy: str = "leave it out") -> VideoError:
        """The error of this file for a reason, with a remedy."""
        return VideoError(f"{self.path!r} {reason}; {remedy}.")

    def packets(self) -> Packets:
        """Decode the file once to find when each frame is shown."""
        pts: list[int | None] = []
        now = 0
        for _, duration in read_animation(self.path):
            pts.append(now)
            now += duration
        return Packets(pts, None, 1e-3, 1e3 * len(pts) / now if pts else 1.0)

    def decode(self, start: int | None) -> Iterator["av.VideoFrame"]:
        """Decode all frames in order; `start` is always None."""
        now = 0
        for pixels, duration in read_animation(self.path):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = now, Fraction(1, 1000)
            yield frame
            now += duration


def _video_streams(container: Any) -> Iterator[Any]:
    """The video streams of a container, without cover pictures."""
    return (s for s in container.streams.video if not s.disposition & s.disposition.attached_pic)


def _pixel_aspect(stream: Any) -> float:
    """The width of a pixel over its height; 1 where nobody sees that it differs, or the header cannot be right."""
    aspect = float(stream.sample_aspect_ratio or 1)
    # Encoders that scale a clip to whole pixels leave ratios such as 640:639.
    return aspect if abs(aspect - 1) > 0.02 and 0.1 <= aspect <= 10 else 1.0


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

"""Writing clips: mp4, gif and png files, and contact sheets."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from stdit.files import atomic_write, printable
from stdit.pixels import to_bytes
from stdit.variants import pick
from stdit.warn import warn_user

Frames = np.ndarray | Tensor
GIF_FPS = 50
_TITLE_SIZE = 9  # pixels of the font of names in contact sheets


def to_uint8(frames: Frames) -> np.ndarray:
    """Convert frames to (F, H, W, 3) uint8.

    frames: (F, H, W, 3) uint8, which is returned unchanged, or (3, F, H, W) floats in [-1, 1]; values outside are
    clipped. Raises ValueError for any other shape or type.
    """
    shape = tuple(frames.shape)
    if isinstance(frames, Tensor):
        if frames.is_floating_point() and len(shape) == 4 and shape[0] == 3:
            return to_bytes(frames.detach().cpu()).numpy()
        if frames.dtype == torch.uint8 and len(shape) == 4 and shape[-1] == 3:
            return frames.cpu().numpy()
    elif len(shape) == 4 and frames.dtype == np.uint8 and shape[-1] == 3:
        return frames
    elif len(shape) == 4 and np.issubdtype(frames.dtype, np.floating) and shape[0] == 3:
        # As `to_bytes`, in the array's precision: float64 is not rounded to float32 first.
        return np.round((frames.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 3, 0)
    raise ValueError(
        f"frames of shape {shape} and type {frames.dtype} are neither (N, H, W, 3) uint8 nor "
        "(3, F, H, W) floats in [-1, 1]; convert them to one of these."
    )


class Encoding(NamedTuple):
    """How an mp4 file holds its frames: codec, format of the pixels, and options of the encoder."""

    codec: str
    pixels: str
    options: dict[str, str]


# Without macroblock trees, whose sums depend on what memory held before: the same frames give the same file.
_STEADY = {"preset": "fast", "x264-params": "mbtree=0"}
# What every player shows; what keeps colours at full resolution (above 40 dB even for small coloured objects); the frames
# themselves. Browsers show the first only.
ENCODINGS = {
    "playable": Encoding("libx264", "yuv420p", {"crf": "16", **_STEADY}),
    "faithful": Encoding("libx264", "yuv444p", {"crf": "8", **_STEADY}),
    "lossless": Encoding("libx264rgb", "rgb24", {"qp": "0", **_STEADY}),
}


def write_video(path: str | os.PathLike, frames: Frames, fps: float = 8, *, encoding: str = "playable") -> None:
    """Write a clip in the format of the suffix: .mp4 (H.264, faststart), .gif, .png (all frames in a row).

    frames: (N, H, W, 3) uint8, or (3, F, H, W) in [-1, 1]. mp4 holds even sizes only: an odd height or width is padded
    by repeating the last row or column. encoding: of mp4, a row of `ENCODINGS`. The file appears only when it is complete.
    """
    path, frames = Path(path), to_uint8(frames)
    if not len(frames):
        raise ValueError(f"{path}: there are no frames to write; give at least one.")
    if not fps > 0:
        raise ValueError(f"{path}: fps must be > 0, got {fps}; use the frame rate of the clip.")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{path}: cannot write {path.suffix or 'a file without suffix'}; use one of {', '.join(SUFFIXES)}."
        )
    chosen = pick(ENCODINGS, encoding, "encoding of videos")
    with atomic_write(path) as tmp:
        if path.suffix.lower() == ".mp4":
            with _Mp4Encoder(tmp, fps, frames.shape[1:3], chosen) as encoder:
                encoder.add(frames)
        else:
            WRITERS[path.suffix.lower()](tmp, frames, fps)


class _Mp4Encoder:
    """Encodes frames of one size into an mp4 file, which is complete when the `with` block ends without an error."""

    def __init__(self, path: Path, fps: float, size: tuple[int, ...], encoding: Encoding):
        height, width = size
        # With the protocol in front, a colon in the name is part of the name.
        self._container = av.open(f"file:{path}", "w", format="mp4", options={"movflags": "+faststart"})
        # A rate must be a fraction; denominators up to 1001 include the NTSC rates (30000/1001) exactly.
        self._stream = self._container.add_stream(encoding.codec, rate=Fraction(fps).limit_denominator(1001))
        self._stream.height, self._stream.width = height + height % 2, width + width % 2
        self._stream.pix_fmt, self._stream.options = encoding.pixels, encoding.options
        # One for all frames, since making its tables takes longer than converting a small frame.
        self._reformatter = None if encoding.pixels == "rgb24" else VideoReformatter()
        if self._reformatter is None:
            return
        # Players take clips of an unknown colour space for BT.709 or for BT.601, by their size and their own habits.
        context = self._stream.codec_context
        context.colorspace, context.color_primaries = Colorspace.ITU709, ColorPrimaries.BT709
        context.color_trc, context.color_range = ColorTrc.BT709, ColorRange.MPEG

    def __enter__(self) -> "_Mp4Encoder":
        return self

    def add(self, frames: np.ndarray) -> None:
        """Encode frames (N, H, W, 3) uint8."""
        height, width = frames.shape[1:3]
        padded = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        for frame in padded:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if self._reformatter is not None:
                picture = self._reformatter.reformat(
                    picture, format=self._stream.pix_fmt, dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG,
                    dst_color_trc=ColorTrc.BT709, dst_color_primaries=ColorPrimaries.BT709,
                )  # fmt: skip
            self._container.mux(self._stream.encode(picture))

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._container.mux(self._stream.encode())  # the frames that the encoder holds back
        finally:
            self._container.close()


class VideoStream:
    """An mp4 file that is written in parts: `with VideoStream(path, fps) as video: video.add(frames)`.

    The file appears when the block ends; after an error, or if no frames were added, there is none.
    """

    def __init__(self, path: str | os.PathLike, fps: float = 8):
        self.path, self.fps = Path(path), fps
        self._stack = ExitStack()
        self._encoder: _Mp4Encoder | None = None  # created with the first frames, since it needs their size

    def __enter__(self) -> "VideoStream":
        return self

    def add(self, frames: Frames) -> None:
        """Append frames in a layout that `write_video` takes; all parts must have the same size."""
        frames = to_uint8(frames)
        if self._encoder is None:
            tmp = self._stack.enter_context(atomic_write(self.path))
            encoder = _Mp4Encoder(tmp, self.fps, frames.shape[1:3], ENCODINGS["playable"])
            self._encoder = self._stack.enter_context(encoder)
        self._encoder.add(frames)

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(error, value, traceback)


def _write_gif(path: Path, frames: np.ndarray, fps: float) -> None:
    first, *rest = [Image.fromarray(frame) for frame in frames]
    if fps > GIF_FPS:
        # Browsers play frames of less than 20 ms as if they lasted 100 ms.
        warn_user(
            f"a gif shows at most {GIF_FPS} frames a second, {fps:g} were asked for: it plays slower; write an mp4."
        )
    # A gif counts hundredths of a second: each frame ends at the one nearest to its time, so that rounding does not add up.
    ends = np.round(np.arange(len(frames) + 1) * 100 / min(fps, GIF_FPS))
    durations = (10 * np.diff(ends)).astype(int).tolist()
    first.save(path, format="gif", save_all=True, append_images=rest, duration=durations, loop=0)


def _write_png(path: Path, frames: np.ndarray, fps: float) -> None:
    Image.fromarray(np.concatenate(list(frames), axis=1)).save(path, format="png")


WRITERS = {".gif": _write_gif, ".png": _write_png}
SUFFIXES = (".mp4", *WRITERS)


def contact_sheet(
    clips: Sequence[Frames], columns: int = 1, count: int = 5, *, gap: int = 2, names: Sequence[str] | None = None
) -> np.ndarray:
    """An overview image (H, W, 3) uint8: for each clip a strip of `count` frames, spread evenly over its length.

    columns: strips per row; gap: white pixels between frames. names: of the clips, written above their strips.
    """
    strips = []
    for clip in clips:
        frames = to_uint8(clip)
        picked = frames[np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)]
        bordered = [np.pad(frame, ((gap, 0), (gap, 0), (0, 0)), constant_values=255) for frame in picked]
        strips.append(np.concatenate(bordered, axis=1))
    width, height = max(s.shape[1] for s in strips), max(s.shape[0] for s in strips)
    strips = [
        np.pad(s, ((0, height - s.shape[0]), (0, width - s.shape[1] + 3 * gap), (0, 0)), constant_values=255)
        for s in strips
    ]
    if names is not None and any(names):
        titles = [_title(name, strips[0].shape[1] - gap, indent=gap) for name in names]
        strips = [np.concatenate([title, strip]) for title, strip in zip(titles, strips, strict=True)]
    strips += [np.full_like(strips[0], 255)] * (-len(strips) % columns)
    rows = [np.concatenate(strips[i : i + columns], axis=1) for i in range(0, len(strips), columns)]
    return np.concatenate(rows, axis=0)


def _title(text: str, width: int, indent: int) -> np.ndarray:
    """A line of dark text on white, (14, indent + width, 3) uint8, cut with "..." where it does not fit."""
    import matplotlib  # for its font, which has more letters than that of PIL

    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", _TITLE_SIZE)
    text = printable(text)
    picture = Image.new("RGB", (indent + width, _TITLE_SIZE + 4), "white")
    draw = ImageDraw.Draw(picture)
    if draw.textlength(text, font) > width:
        while text and draw.textlength(text + "...", font) > width:
            text = text[:-1]
        text += "..."
    draw.text((indent, 1), text, fill=(60, 60, 60), font=font)
    return np.asarray(picture)


def write_contact_sheet(
    path: str | os.PathLike,
    clips: Sequence[Frames],
    columns: int = 1,
    count: int = 5,
    *,
    names: Sequence[str] | None = None,
) -> None:
    """Write `contact_sheet` as a png file."""
    write_video(path, contact_sheet(clips, columns, count, names=names)[None])

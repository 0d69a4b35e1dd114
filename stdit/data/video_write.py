"""Writing clips where people look: mp4, gif, png, contact sheets."""

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from torch import Tensor

Frames = np.ndarray | Tensor


def to_uint8(frames: Frames) -> np.ndarray:
    """(N, H, W, 3) uint8 as it is, or (3, F, H, W) floats in [-1, 1] -> (F, H, W, 3) uint8."""
    if isinstance(frames, Tensor):
        frames = frames.detach().float().cpu().numpy() if frames.is_floating_point() else frames.cpu().numpy()
    if frames.ndim == 4 and frames.dtype == np.uint8 and frames.shape[-1] == 3:
        return frames
    if frames.ndim == 4 and np.issubdtype(frames.dtype, np.floating) and frames.shape[0] == 3:
        return np.round((frames.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 3, 0)
    raise ValueError(
        f"frames of shape {tuple(frames.shape)} and type {frames.dtype} are neither (N, H, W, 3) uint8 nor "
        "(3, F, H, W) floats in [-1, 1]; convert them to one of these."
    )


def write_video(path: str | os.PathLike, frames: Frames, fps: float = 8) -> None:
    """Write by suffix: .mp4 (h264, yuv420p, faststart), .gif, .png (one frame, or a strip of all).

    frames: (N, H, W, 3) uint8, or (3, F, H, W) in [-1, 1]. An odd height or width is padded by one repeated row or
    column in mp4, which holds even sizes only. The file appears when it is whole.
    """
    path, frames = Path(path), to_uint8(frames)
    if not len(frames):
        raise ValueError(f"{path}: there are no frames to write; give at least one.")
    if not fps > 0:
        raise ValueError(f"{path}: fps={fps} is not a frame rate; use a positive number.")
    if path.suffix.lower() not in WRITERS:
        raise ValueError(
            f"{path}: cannot write {path.suffix or 'a file without suffix'}; use one of {', '.join(WRITERS)}."
        )
    beside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        WRITERS[path.suffix.lower()](beside, frames, fps)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


class VideoStream:
    """An mp4 that takes frames as they are made and appears when it is whole: `with VideoStream(path, fps) as video:`.

    Nothing is left behind when the block ends in an error.
    """

    def __init__(self, path: str | os.PathLike, fps: float = 8):
        self.path, self.fps = Path(path), fps
        self._beside = self.path.with_name(f".{os.getpid()}-{self.path.name}")
        self._container: Any = None  # made with the first frame, whose size it takes

    def __enter__(self) -> "VideoStream":
        return self

    def add(self, frames: Frames) -> None:
        """Frames as `write_video` takes them, all of one size."""
        frames = to_uint8(frames)
        height, width = frames.shape[1:3]
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._container is None:
            self._container = av.open(str(self._beside), "w", format="mp4", options={"movflags": "+faststart"})
            self._stream = self._container.add_stream("libx264", rate=Fraction(self.fps).limit_denominator(1001))
            self._stream.height, self._stream.width, self._stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
            self._stream.options = {"crf": "16", "preset": "fast"}
        for frame in frames:
            shown = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            self._container.mux(self._stream.encode(shown))

    def __exit__(self, error, *_) -> None:
        try:
            if self._container is not None:
                if error is None:
                    self._container.mux(self._stream.encode())
                self._container.close()
                if error is None:
                    os.replace(self._beside, self.path)
        finally:
            self._beside.unlink(missing_ok=True)


def _write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    with VideoStream(path, fps) as video:
        video.add(frames)


def _write_gif(path: Path, frames: np.ndarray, fps: float) -> None:
    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.save(path, format="gif", save_all=True, append_images=rest, duration=max(20, round(1000 / fps)), loop=0)


def _write_png(path: Path, frames: np.ndarray, fps: float) -> None:
    Image.fromarray(np.concatenate(list(frames), axis=1)).save(path, format="png")


WRITERS = {".mp4": _write_mp4, ".gif": _write_gif, ".png": _write_png}


def contact_sheet(clips: Sequence[Frames], columns: int = 1, count: int = 5, gap: int = 2) -> np.ndarray:
    """One strip of `count` frames a clip, spread over its length, `columns` strips side by side -> (H, W, 3) uint8."""
    strips = []
    for clip in clips:
        frames = to_uint8(clip)
        picked = frames[np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)]
        strips.append(
            np.concatenate([np.pad(f, ((gap, 0), (gap, 0), (0, 0)), constant_values=255) for f in picked], axis=1)
        )
    width, height = max(s.shape[1] for s in strips), max(s.shape[0] for s in strips)
    strips = [
        np.pad(s, ((0, height - s.shape[0]), (0, width - s.shape[1] + 3 * gap), (0, 0)), constant_values=255)
        for s in strips
    ]
    strips += [np.full_like(strips[0], 255)] * (-len(strips) % columns)
    rows = [np.concatenate(strips[i : i + columns], axis=1) for i in range(0, len(strips), columns)]
    return np.concatenate(rows, axis=0)


def write_contact_sheet(path: str | os.PathLike, clips: Sequence[Frames], columns: int = 1, count: int = 5) -> None:
    """`contact_sheet` as a png."""
    write_video(path, contact_sheet(clips, columns, count)[None])

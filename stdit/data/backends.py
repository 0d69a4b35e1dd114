"""Alternative video decoders, chosen by name. The default is PyAV, which was exact on every file measured."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np

from stdit.data.media import VideoError, container_of, open_regular
from stdit.data.stores import is_remote
from stdit.data.video_io import VideoReader, frames_at
from stdit.variants import pick
from stdit.warn import warn_once

_TOGETHER = 8  # frames that are decoded before they are resized


class LibraryReader(ABC):
    """The interface of `VideoReader` over a library that indexes and rotates frames by itself.

    A subclass opens `_reader`, sets `timestamps` (seconds, the first at 0) and implements `_decode`.
    """

    timestamps: np.ndarray
    _reader: Any = None

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        open_regular(self.path).close()
        if container_of(self.path) is not None or is_remote(self.path):
            raise ValueError(
                f"{self.path!r} is no file on this machine, which this backend needs; use data.backend=pyav."
            )

    def __len__(self) -> int:
        return len(self.timestamps)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.get_frames([index])[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the decoder."""
        self._reader = None

    @property
    def size(self) -> tuple[int, int]:
        """The frame size (H, W) as displayed."""
        height, width = self[0].shape[:2]
        return height, width

    @property
    def fps(self) -> float:
        """The mean frame rate, computed from the time stamps."""
        return (len(self) - 1) / float(self.timestamps[-1]) if len(self) > 1 else 1.0

    def get_frames(self, indices: Sequence[int], size: tuple[int, int] | None = None) -> np.ndarray:
        """Decode frames by number, in the order requested -> (N, H, W, 3) uint8 RGB, resized to `size` (H, W)."""
        indices = [int(i) for i in indices]
        for i in indices:
            if not -len(self) <= i < len(self):
                raise IndexError(f"frame {i} is outside {self.path!r}, which has {len(self)} frames.")
        # With a size a few at a time, so that a clip is not held at the size of the file.
        step = max(1, len(indices)) if size is None else _TOGETHER
        parts = []
        for first in range(0, max(1, len(indices)), step):
            try:
                frames = self._decode([i % len(self) for i in indices[first : first + step]])
            except Exception as error:  # each library raises its own types
                raise VideoError(f"{self.path!r} cannot be decoded ({error}); try the backend 'pyav'.") from error
            parts.append(frames if size is None else _resized(frames, size))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def indices_at(self, times: Sequence[float] | np.ndarray) -> list[int]:
        """The frame displayed at each time, as `VideoReader.indices_at`."""
        return frames_at(self.timestamps, times)

    @abstractmethod
    def _decode(self, indices: list[int]) -> np.ndarray:
        """Decode the frames (N, H, W, 3) uint8 RGB of indices that are within the clip."""


def _resized(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize frames (F, H, W, 3) to (H, W) by area averaging, as `VideoReader` does."""
    if frames.shape[1:3] == tuple(size):
        return frames
    from PIL import Image

    return np.stack([np.asarray(Image.fromarray(f).resize(size[::-1], Image.Resampling.BOX)) for f in frames])


class DecordReader(LibraryReader):
    """Reads with decord 0.6: fast, but it returns wrong frames of open-GOP H.264 and HEVC and misreads edit lists."""

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        try:
            import decord
        except (ImportError, OSError, RuntimeError) as error:
            raise ValueError(
                f"the backend 'decord' is not installed ({error}); run: pip install 'stdit[decord]'."
            ) from error
        warn_once(
            "decord",
            "decord gives wrong frames on open-GOP video (11 of 60 measured) and misreads edit lists; "
            "use 'pyav' for exact frames.",
        )
        try:
            self._reader = decord.VideoReader(self.path, num_threads=1)
            times = self._reader.get_frame_timestamp(range(len(self._reader)))[:, 0]
        except Exception as error:
            raise VideoError(
                f"{self.path!r} is not a video that decord reads ({error}); try the backend 'pyav'."
            ) from error
        self.timestamps = times - times[0]

    def _decode(self, indices: list[int]) -> np.ndarray:
        return self._reader.get_batch(indices).asnumpy()


class TorchcodecReader(LibraryReader):
    """Reads with torchcodec in its exact mode, which scans the file once."""

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        try:
            from torchcodec.decoders import VideoDecoder
        except (ImportError, OSError, RuntimeError) as error:  # a CUDA build on a CPU machine raises the last two
            raise ValueError(
                f"the backend 'torchcodec' cannot be loaded ({str(error).splitlines()[0]}); run: pip install 'stdit[torchcodec]'."
            ) from error
        try:
            self._reader = VideoDecoder(self.path, seek_mode="exact", dimension_order="NHWC", num_ffmpeg_threads=1)
            count = len(self._reader)
            # Time stamps come with decoded frames only; decoding 16 at a time bounds the memory.
            ranges = [(i, min(i + 16, count)) for i in range(0, count, 16)]
            times = np.concatenate([self._reader.get_frames_in_range(*r).pts_seconds.numpy() for r in ranges])
        except Exception as error:
            raise VideoError(
                f"{self.path!r} is not a video that torchcodec reads ({error}); try the backend 'pyav'."
            ) from error
        self.timestamps = times - times[0]

    def _decode(self, indices: list[int]) -> np.ndarray:
        return self._reader.get_frames_at(indices).data.numpy()


Reader = VideoReader | LibraryReader
BACKENDS: dict[str, Callable[[str | os.PathLike], Reader]] = {
    "pyav": VideoReader,
    "decord": DecordReader,
    "torchcodec": TorchcodecReader,
}


def open_video(path: str | os.PathLike, backend: str = "pyav") -> Reader:
    """Open a video with a backend by name; ValueError for an unknown name or a backend that is not installed."""
    return pick(BACKENDS, backend, "video backend")(path)

"""Other decoders, by name only: PyAV is the default because it is the one that was exact on every file measured."""

import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from stdit.data.video_io import VideoError, VideoReader
from stdit.variants import pick


class _OtherReader:
    """What `VideoReader` offers, over a library that indexes and rotates by itself."""

    timestamps: np.ndarray
    _reader: Any = None

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        if not os.path.isfile(self.path):
            raise VideoError(f"{self.path!r} is not a regular file; give a video file.")

    def __len__(self) -> int:
        return len(self.timestamps)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.get_frames([index])[0]

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._reader = None

    @property
    def size(self) -> tuple[int, int]:
        height, width = self[0].shape[:2]
        return height, width

    @property
    def fps(self) -> float:
        return (len(self) - 1) / float(self.timestamps[-1]) if len(self) > 1 else 1.0

    def get_frames(self, indices: Sequence[int], size: tuple[int, int] | None = None) -> np.ndarray:
        indices = [int(i) for i in indices]
        for i in indices:
            if not -len(self) <= i < len(self):
                raise IndexError(f"frame {i} is outside {self.path!r}, which has {len(self)} frames.")
        try:
            frames = self._get([i % len(self) for i in indices])
        except Exception as error:  # these libraries raise types of their own
            raise VideoError(f"{self.path!r} cannot be decoded ({error}); try the backend 'pyav'.") from error
        if size is None or frames.shape[1:3] == tuple(size):
            return frames
        from PIL import Image

        return np.stack([np.asarray(Image.fromarray(f).resize(size[::-1], Image.Resampling.BOX)) for f in frames])

    indices_at = VideoReader.indices_at

    def _get(self, indices: list[int]) -> np.ndarray:
        raise AssertionError("each back end reads in its own way")


class DecordReader(_OtherReader):
    """decord 0.6: fast, but gives wrong frames on open-GOP H.264 and HEVC and misreads edit lists."""

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        try:
            import decord
        except (ImportError, OSError, RuntimeError) as error:
            raise ValueError(
                f"The backend 'decord' is not installed ({error}). Run: pip install 'stdit[decord]'."
            ) from error
        _warn_once(
            "decord gives wrong frames on open-GOP video (11 of 60 measured) and misreads edit lists; use 'pyav' for exact frames."
        )
        try:
            self._reader = decord.VideoReader(self.path, num_threads=1)
            times = self._reader.get_frame_timestamp(range(len(self._reader)))[:, 0]
        except Exception as error:
            raise VideoError(f"{self.path!r} is not a video decord reads ({error}); try the backend 'pyav'.") from error
        self.timestamps = times - times[0]

    def _get(self, indices: list[int]) -> np.ndarray:
        return self._reader.get_batch(indices).asnumpy()


class TorchcodecReader(_OtherReader):
    """torchcodec in its exact mode."""

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        try:
            from torchcodec.decoders import VideoDecoder
        except (ImportError, OSError, RuntimeError) as error:  # a CUDA build on a CPU machine raises the latter two
            raise ValueError(
                f"The backend 'torchcodec' does not load ({str(error).splitlines()[0]}). Run: pip install 'stdit[torchcodec]'."
            ) from error
        try:
            self._reader = VideoDecoder(self.path, seek_mode="exact", dimension_order="NHWC", num_ffmpeg_threads=1)
            count = len(self._reader)  # a few frames at a time: only their times are kept
            steps = [(i, min(i + 16, count)) for i in range(0, count, 16)]
            times = np.concatenate([self._reader.get_frames_in_range(*step).pts_seconds.numpy() for step in steps])
        except Exception as error:
            raise VideoError(
                f"{self.path!r} is not a video torchcodec reads ({error}); try the backend 'pyav'."
            ) from error
        self.timestamps = times - times[0]

    def _get(self, indices: list[int]) -> np.ndarray:
        return self._reader.get_frames_at(indices).data.numpy()


BACKENDS = {"pyav": VideoReader, "decord": DecordReader, "torchcodec": TorchcodecReader}
_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)


def open_video(path: str | os.PathLike, backend: str = "pyav"):
    """A reader by back end name; ValueError for an unknown name, or one that is not installed."""
    return pick(BACKENDS, backend, "video backend")(path)

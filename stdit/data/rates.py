"""Frame rates of clips beside the rate at which they are read: what the data has, and what is said of it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from stdit.data.backends import Reader
from stdit.data.base import Dataset
from stdit.data.config import DataConfig
from stdit.data.media import VideoError, is_picture
from stdit.warn import warn_once

DEFAULT_FPS = 8.0  # of clips that have no rate of their own
LOOKED_AT = 8  # clips whose rates stand for all


def some_rates(paths: Sequence[Path], open_clip: Callable[[Path], AbstractContextManager[Reader]]) -> list[float]:
    """The rates of a few clips, spread over `paths`, in rising order, without pictures and files that cannot be read."""
    found = []
    for path in paths[:: max(1, len(paths) // LOOKED_AT)][:LOOKED_AT]:
        if not is_picture(path):
            with suppress(VideoError), open_clip(path) as reader:
                found.append(reader.fps)
    return sorted(found)


def clip_rate(config: DataConfig, dataset: Dataset) -> float:
    """Frames per second of training clips: data.fps, or the median of the files' own rates, or DEFAULT_FPS without files.

    Warns if data.fps is null and the files' rates differ, since then a model learns several speeds of one motion.
    """
    rates = [] if config.fps is not None else getattr(dataset, "rates", [])
    if rates and rates[-1] > 1.1 * rates[0]:
        warn_once(
            "different rates",
            f"data.fps=null takes neighbouring frames of clips of {rates[0]:.4g} to {rates[-1]:.4g} frames a second, so that "
            "things move at different speeds; set data.fps to one rate.",
        )
    return config.fps or (round(rates[len(rates) // 2], 3) if rates else DEFAULT_FPS)


def warn_of_repeats(reader: Reader, fps: float | None) -> None:
    """Warn, once in a process, if a clip has fewer frames a second than are taken of it."""
    if fps is not None and fps > 1.01 * reader.fps:
        warn_once(
            "repeated frames",
            f"{str(reader.path)!r} has {reader.fps:.4g} frames a second, fewer than data.fps={fps:g}: some frames stand still "
            "(other clips may be alike); lower data.fps or leave such clips out.",
        )

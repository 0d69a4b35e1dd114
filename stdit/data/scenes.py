"""Scenes of a long video, by PySceneDetect, and the clips of one length and rate that they hold."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from stdit.data.video_io import VideoReader

_LONG_SIDE = 256  # pixels of the frames in which cuts are looked for, about those of PySceneDetect's own commands
_BLOCKS = 8  # a frame is remembered as the brightness of 8 x 8 blocks
_LATE = 1e-3  # seconds before a cut at which a clip must have shown its last frame


@dataclass(frozen=True)
class ClipRules:
    """Which clips are cut out of a scene. Lengths: `frames` at `fps` frames a second.

    threshold: how many times as large as its neighbours a change must be to be a cut (PySceneDetect's AdaptiveDetector).
    still: clips in which no block of 1/64 of the picture changes by more than this many of 255 levels are left out.
    black: so are clips in which none is brighter than this.
    """

    frames: int
    fps: float
    threshold: float = 3.0
    still: float = 3.0
    black: float = 16.0

    @property
    def seconds(self) -> float:
        """The time from the first frame of a clip to the end of its last."""
        return self.frames / self.fps


class Survey(NamedTuple):
    """What one pass over a video found: the first frame of every scene, and then the number of frames; the brightness of
    8 x 8 blocks of every frame (N, 8, 8) uint8; the time of every frame, and then the end, in seconds (N + 1,)."""

    starts: list[int]
    blocks: np.ndarray
    times: np.ndarray


class Clip(NamedTuple):
    """A clip to be cut: the number of its scene, the time of its first frame in seconds, and its frames by number."""

    scene: int
    start: float
    indices: list[int]


def scene_detector(threshold: float) -> Any:
    """PySceneDetect's adaptive detector, which finds cuts, not dissolves; ValueError if it is not installed."""
    try:
        from scenedetect.detectors import AdaptiveDetector
    except ImportError as error:
        raise ValueError(f"cutting at scenes needs PySceneDetect: pip install 'stdit[split]' ({error}).") from error
    # One frame: with a longer least scene it would pass over cuts, and clips would hold them.
    return AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=1)


def survey(reader: VideoReader, threshold: float, progress: Callable[[], None] = lambda: None) -> Survey:
    """Decode a video once, at a small size, and find its cuts. progress: called at every frame. VideoError for damage."""
    from scenedetect import FrameTimecode

    detector, fps, count = scene_detector(threshold), reader.fps, len(reader)
    scale = min(1.0, _LONG_SIDE / max(reader.size))
    size = max(_BLOCKS, round(reader.size[0] * scale)), max(_BLOCKS, round(reader.size[1] * scale))
    blocks, cuts = np.empty((count, _BLOCKS, _BLOCKS), np.uint8), set()
    for number, frame in enumerate(reader.iter_frames(range(count), size)):
        found = detector.process_frame(FrameTimecode(timecode=number, fps=fps), np.ascontiguousarray(frame[..., ::-1]))
        cuts |= {cut.frame_num for cut in found}
        blocks[number] = brightness(frame)
        progress()
    cuts |= {cut.frame_num for cut in detector.post_process(FrameTimecode(timecode=count - 1, fps=fps))}
    times = np.append(reader.timestamps, reader.timestamps[-1] + 1 / fps)
    return Survey([0, *sorted(cuts - {0}), count], blocks, times)


def brightness(frame: np.ndarray) -> np.ndarray:
    """The mean brightness (8, 8) uint8 of the blocks of a frame (H, W, 3) uint8, of at least 8 x 8 pixels."""
    rows, columns = (np.linspace(0, side, _BLOCKS + 1).astype(int)[:-1] for side in frame.shape[:2])
    grey = frame @ np.array([0.299, 0.587, 0.114], np.float32)
    sums = np.add.reduceat(np.add.reduceat(grey, rows, 0), columns, 1)
    areas = np.outer(np.diff([*rows, frame.shape[0]]), np.diff([*columns, frame.shape[1]]))
    return (sums / areas).round().astype(np.uint8)


def clips_of(found: Survey, indices_at: Callable[[np.ndarray], list[int]], rules: ClipRules) -> list[Clip]:
    """The clips of all scenes, one after the other from the beginning of each; what is left of a scene is no clip.

    indices_at: the frames shown at times in seconds (`VideoReader.indices_at`).
    """
    clips = []
    steps = np.arange(rules.frames) / rules.fps
    for scene, (first, end) in enumerate(pairwise(found.starts)):
        start = float(found.times[first])
        while start + steps[-1] < found.times[end] - _LATE:
            indices = [min(max(i, first), end - 1) for i in indices_at(start + steps)]
            clips.append(Clip(scene, start, indices))
            start += rules.seconds
    return clips


def flaw(clip: Clip, found: Survey, rules: ClipRules) -> str | None:
    """Why a clip is left out: "black" or "still"; None for one that is used."""
    shown = found.blocks[clip.indices].astype(np.int16)
    if shown.max() <= rules.black:
        return "black"
    if len(shown) > 1 and np.abs(shown - shown[0]).max() <= rules.still:
        return "still"
    return None


def lengths(found: Survey) -> list[float]:
    """The length of every scene in seconds."""
    return [float(found.times[end] - found.times[first]) for first, end in pairwise(found.starts)]


def sift(found: Survey, clips: list[Clip], rules: ClipRules) -> tuple[list[Clip], dict[str, int]]:
    """The clips that are used, and how many are left out for which reason; a scene without a clip counts as "short"."""
    flaws = [flaw(clip, found, rules) for clip in clips]
    used, reasons = [clip for clip, why in zip(clips, flaws, strict=True) if why is None], Counter(flaws)
    short = len(found.starts) - 1 - len({clip.scene for clip in clips})
    counts = {"short": short, "black": reasons["black"], "still": reasons["still"]}
    return used, {reason: count for reason, count in counts.items() if count}

"""Are captions of moving shapes obeyed, also where colour and shape were never seen together?"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from stdit.data.shapes import COLORS, DIRECTIONS, SHAPES, ShapeClip
from stdit.data.video_write import to_uint8
from stdit.evaluation.shapes import ShapeMeasurement, measure_shape, wilson


class CaptionAccuracy(NamedTuple):
    """Shares of clips that show what their caption says, by what it says, with 95 % intervals of `all`."""

    clips: int
    color: float
    shape: float
    direction: float
    all: float
    interval: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.clips:>5} clips   colour {self.color:6.1%}   shape {self.shape:6.1%}   direction {self.direction:6.1%}   "
            f"all three {self.all:6.1%} (95 %: {low:.1%} to {high:.1%})"
        )


def asked(pairs: Sequence[str] | None, count: int) -> list[tuple[str, str, str]]:
    """`count` combinations (colour, shape, direction), evenly over all, or over those of `pairs` ("red circle")."""
    every = [(c, s, d) for d in DIRECTIONS for s in SHAPES for c in COLORS if pairs is None or f"{c} {s}" in pairs]
    return [every[i % len(every)] for i in range(count)]


def caption(color: str, shape: str, direction: str) -> str:
    """As `tools/make_shapes.py` writes them."""
    return ShapeClip(shape, direction, 1.0, [0.0, 0.0], 1.0, list(COLORS[color]), [0.0] * 3).caption


def caption_accuracy(clips: Sequence[np.ndarray], wanted: Sequence[tuple[str, str, str]]) -> CaptionAccuracy:
    """Judge clips (F, H, W, 3) uint8 against what was asked for."""
    verdicts = [measure_shape(clip) for clip in clips]
    color = np.array([named(v) == w[0] for v, w in zip(verdicts, wanted, strict=True)])
    shape = np.array([v.shape == w[1] for v, w in zip(verdicts, wanted, strict=True)])
    direction = np.array([v.direction == w[2] for v, w in zip(verdicts, wanted, strict=True)])
    right = color & shape & direction
    shares = [float(x.mean()) for x in (color, shape, direction, right)]
    return CaptionAccuracy(len(clips), shares[0], shares[1], shares[2], shares[3], wilson(right))


def named(verdict: ShapeMeasurement) -> str | None:
    """The colour's name, as captions name the nearest."""
    if verdict.shape is None:
        return None
    return min(COLORS, key=lambda name: float(np.linalg.norm(np.subtract(COLORS[name], verdict.color))))


def measure(pipe: Any, wanted: Sequence[tuple[str, str, str]], **options) -> tuple[CaptionAccuracy, list[np.ndarray]]:
    """Clips of a pipeline under these captions, judged."""
    clips = [to_uint8(clip) for clip in pipe(captions=[caption(*one) for one in wanted], **options)]
    return caption_accuracy(clips, wanted), clips

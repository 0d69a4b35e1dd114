"""Accuracy of captioned moving shapes, also for pairs of colour and shape that training left out."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from stdit.data.shapes import COLORS, DIRECTIONS, SHAPES, ShapeClip
from stdit.data.video_write import to_uint8
from stdit.evaluation.shapes import ShapeMeasurement, measure_shape, wilson
from stdit.sampling.pipeline import STDiTPipeline

Combination = tuple[str, str, str]  # colour, shape, direction


class CaptionAccuracy(NamedTuple):
    """Shares of clips with the colour, shape and direction of their caption, and with all three.

    interval: the 95 % interval of the share with all three.
    """

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


def caption_grid(pairs: Sequence[str] | None, count: int) -> list[Combination]:
    """List `count` combinations, evenly over all, or over those with a colour and shape in `pairs` ("red circle")."""
    grid = [(c, s, d) for d in DIRECTIONS for s in SHAPES for c in COLORS if pairs is None or f"{c} {s}" in pairs]
    return [grid[i % len(grid)] for i in range(count)]


def caption(color: str, shape: str, direction: str) -> str:
    """The caption of a combination, as `tools/make_shapes.py` writes it."""
    clip = ShapeClip(
        shape=shape,
        direction=direction,
        speed=1.0,
        start=[0.0, 0.0],
        size=1.0,
        color=list(COLORS[color]),
        background=[0.0] * 3,
    )
    return clip.caption


def caption_accuracy(clips: Sequence[np.ndarray], expected: Sequence[Combination]) -> CaptionAccuracy:
    """Measure clips (F, H, W, 3) uint8 against the combinations of their captions."""
    measurements = [measure_shape(clip) for clip in clips]
    color = np.array([nearest_color(m) == e[0] for m, e in zip(measurements, expected, strict=True)])
    shape = np.array([m.shape == e[1] for m, e in zip(measurements, expected, strict=True)])
    direction = np.array([m.direction == e[2] for m, e in zip(measurements, expected, strict=True)])
    correct = color & shape & direction
    return CaptionAccuracy(
        clips=len(clips),
        color=float(color.mean()),
        shape=float(shape.mean()),
        direction=float(direction.mean()),
        all=float(correct.mean()),
        interval=wilson(correct),
    )


def nearest_color(measurement: ShapeMeasurement) -> str | None:
    """The name of the caption colour nearest to the measured one; None without an object."""
    if measurement.shape is None:
        return None
    return min(COLORS, key=lambda name: float(np.linalg.norm(np.subtract(COLORS[name], measurement.color))))


def sample_and_measure(
    pipe: STDiTPipeline, expected: Sequence[Combination], **options: Any
) -> tuple[CaptionAccuracy, list[np.ndarray]]:
    """Sample a clip for each combination's caption; `options` are those of a pipeline call."""
    clips = [to_uint8(clip) for clip in pipe(captions=[caption(*combination) for combination in expected], **options)]
    return caption_accuracy(clips, expected), clips

"""A judge for moving shapes: finds object, shape, colour and path in a clip by measurement, not by a trained network."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stdit.data.shapes import CLASS_NAMES, DIRECTIONS, SHAPES, signed_distance

_MIN_AREA = 12.0  # pixels; anything smaller is no object
_STRANGE = 0.3  # distance in colour from the line between object and ground; softened edges stay on it
_CLEAN = (
    0.15  # a clip is clean if less than this share of its object's area is strange: no second object, no other part
)
_MIN_SPEED = 0.15  # pixels per frame; anything slower stands still


class ShapeMeasurement(NamedTuple):
    """What a clip shows. shape and direction are None where there is none; pixels, pixels per frame, colours 0..1."""

    shape: str | None
    direction: str | None
    speed: float
    size: float
    color: np.ndarray
    background: np.ndarray
    centers: np.ndarray  # (F, 2) x, y
    bend: float  # pixels: root mean square distance of the centres from a straight line
    unevenness: float  # standard deviation of the steps over their mean
    misfit: float  # mean error of the best outline, as a share of the object's area
    strange: float  # area in colours that are neither object nor ground nor between, as a share of the object's


def measure_shape(frames: np.ndarray) -> ShapeMeasurement:
    """Measure one clip of (F, H, W, 3) uint8."""
    pixels = frames.astype(np.float64) / 255
    background = _background(pixels)
    difference = pixels - background
    color = _object_color(pixels, difference)
    axis = color - background
    strength = float(axis @ axis)
    nothing = ShapeMeasurement(None, None, 0.0, 0.0, color, background, np.zeros((len(frames), 2)), 0.0, 0.0, 1.0, 0.0)
    if strength < 0.01:
        return nothing
    along = difference @ axis / strength
    strange = np.linalg.norm(difference - np.clip(along, 0, 1)[..., None] * axis, axis=-1) > _STRANGE
    cover = np.clip(along, 0, 1)
    cover[cover < 0.25] = 0  # noise of the ground
    areas = cover.sum(axis=(1, 2))
    if areas.min() < _MIN_AREA or np.median(areas) > 0.5 * cover[0].size:
        return nothing
    centers = _centers(cover, areas)
    size = float(np.sqrt(np.median(areas) / np.pi))
    misfits = {shape: _misfit(cover, centers, size, shape) for shape in SHAPES}
    shape = min(misfits, key=misfits.__getitem__)
    velocity, bend, unevenness = _path(centers)
    direction = None
    if np.abs(velocity).max() > _MIN_SPEED:
        horizontal = abs(velocity[0]) > abs(velocity[1])
        unit = (int(np.sign(velocity[0])), 0) if horizontal else (0, int(np.sign(velocity[1])))
        direction = next(name for name, value in DIRECTIONS.items() if value == unit)
    speed = float(np.hypot(*velocity))
    return ShapeMeasurement(
        shape, direction, speed, size, color, background, centers, bend, unevenness, misfits[shape],
        float(strange.sum() / areas.sum()),
    )  # fmt: skip


def _background(pixels: np.ndarray) -> np.ndarray:
    """The median colour of the outermost pixels: the object keeps clear of them most of the time."""
    edges = [pixels[:, :2], pixels[:, -2:], pixels[:, :, :2], pixels[:, :, -2:]]
    return np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)


def _object_color(pixels: np.ndarray, difference: np.ndarray) -> np.ndarray:
    """The median colour of what differs most from the background."""
    distance = np.linalg.norm(difference, axis=-1)
    core = distance >= 0.7 * np.quantile(distance, 0.995)
    return np.median(pixels[core], axis=0)


def _centers(cover: np.ndarray, areas: np.ndarray) -> np.ndarray:
    y, x = np.mgrid[: cover.shape[1], : cover.shape[2]] + 0.5
    return np.stack([(cover * x).sum(axis=(1, 2)) / areas, (cover * y).sum(axis=(1, 2)) / areas], axis=1)


def _misfit(cover: np.ndarray, centers: np.ndarray, size: float, shape: str) -> float:
    """How far the covered area is from an ideal outline of equal area at the same centre."""
    grid_y, grid_x = np.arange(cover.shape[1]) + 0.5, np.arange(cover.shape[2]) + 0.5
    dx = grid_x[None, None, :] - centers[:, 0, None, None]
    dy = grid_y[None, :, None] - centers[:, 1, None, None]
    distance = signed_distance(shape, size, dx, dy)
    # A decoder may soften edges: sharp ones and ones of up to three pixels are tried.
    errors = [np.abs(cover - np.clip(0.5 - distance / width, 0, 1)).sum() for width in (1, 2, 3)]
    return float(min(errors) / cover.sum())


def _path(centers: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Mean velocity by least squares, bend, unevenness."""
    if len(centers) < 2:
        return np.zeros(2), 0.0, 0.0
    time = np.arange(len(centers)) - (len(centers) - 1) / 2
    middle = centers.mean(axis=0)
    velocity = time @ (centers - middle) / (time @ time)
    speed = np.hypot(*velocity)
    if speed < 1e-9:
        return velocity, 0.0, 0.0
    along = velocity / speed
    offset = centers - middle
    across = offset @ np.array([-along[1], along[0]])
    steps = np.diff(offset @ along)
    return velocity, float(np.sqrt(np.mean(across**2))), float(steps.std() / max(abs(steps.mean()), 1e-9))


class Report(NamedTuple):
    """Shares of clips whose shape, direction, or both are as the label says; with 95 % intervals, and by class.

    clean: the share with one object of one colour and nothing else.
    """

    clips: int
    shape: float
    direction: float
    both: float
    intervals: dict[str, tuple[float, float]]
    by_class: dict[str, dict[str, float]]
    bend: float
    unevenness: float
    misfit: float
    clean: float


def report(clips: Sequence[np.ndarray], labels: Sequence[int]) -> Report:
    """Judge clips (F, H, W, 3) uint8 against their labels."""
    if len(clips) != len(labels) or not len(clips):
        raise ValueError(f"{len(clips)} clips and {len(labels)} labels; give one label a clip, and at least one clip.")
    verdicts = [measure_shape(clip) for clip in clips]
    wanted = [CLASS_NAMES[label].split() for label in labels]
    shape = np.array([v.shape == w[0] for v, w in zip(verdicts, wanted, strict=True)])
    direction = np.array([v.direction == w[1] for v, w in zip(verdicts, wanted, strict=True)])
    of = np.array(labels)
    by_class = {
        name: {
            "clips": int((of == i).sum()),
            "shape": float(shape[of == i].mean()),
            "direction": float(direction[of == i].mean()),
        }
        for i, name in enumerate(CLASS_NAMES)
        if (of == i).any()
    }
    seen = [v for v in verdicts if v.shape is not None] or verdicts
    both = shape & direction
    bend, unevenness, misfit = (
        float(np.median([getattr(v, k) for v in seen])) for k in ("bend", "unevenness", "misfit")
    )
    clean = float(np.mean([v.shape is not None and v.strange < _CLEAN for v in verdicts]))
    return Report(
        len(clips), float(shape.mean()), float(direction.mean()), float(both.mean()),
        {"shape": wilson(shape), "direction": wilson(direction), "both": wilson(both)}, by_class,
        bend, unevenness, misfit, clean,
    )  # fmt: skip


def wilson(successes: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson's score)."""
    n, p, z = len(successes), float(successes.mean()), 1.96
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


def table(result: Report) -> str:
    """The report as text."""
    lines = [f"{'class':<16} {'clips':>5} {'shape':>7} {'direction':>9}"]
    lines += [
        f"{name:<16} {row['clips']:>5} {row['shape']:>7.1%} {row['direction']:>9.1%}"
        for name, row in result.by_class.items()
    ]
    for key in ("shape", "direction", "both"):
        low, high = result.intervals[key]
        lines.append(
            f"{key + ' right':<16} {result.clips:>5} {getattr(result, key):>7.1%} (95 %: {low:.1%} to {high:.1%})"
        )
    lines.append(
        f"median bend {result.bend:.2f} px, unevenness {result.unevenness:.2f}, outline misfit {result.misfit:.1%}; "
        f"one object and nothing else in {result.clean:.1%}"
    )
    return "\n".join(lines)

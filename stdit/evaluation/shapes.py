"""Measurements of moving shapes in pixels, without a trained network: object, shape, colour and path."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stdit.data.shapes import CLASS_NAMES, DIRECTIONS, SHAPES, signed_distance

_MIN_AREA = 12.0  # pixels; a smaller region is not an object
# A colour is strange if it is further than this from the line between the colours of object and background, on which
# blurred edges lie.
_MAX_COLOR_DISTANCE = 0.3
# A clip has a second object if its area in strange colours is at least this share of the area of its object.
_MAX_STRANGE_AREA = 0.15
_MIN_SPEED = 0.15  # pixels per frame; a slower object stands still
_MIN_COVER = 0.25  # of a pixel; less is noise of the background
# Shares of its bounding box that a square and a circle fill at least; a triangle fills half of it.
_SQUARE_FILL, _CIRCLE_FILL = 0.885, 0.66
_MIN_CONTRAST = 0.01  # squared distance of the colours of object and background; with less there is no object


def shape_of_fill(fill: float) -> str:
    """The shape that fills this share of its bounding box."""
    return "square" if fill > _SQUARE_FILL else "circle" if fill >= _CIRCLE_FILL else "triangle"


class ShapeMeasurement(NamedTuple):
    """The measurement of one clip: lengths in pixels, speed in pixels per frame, colours in [0, 1].

    shape: None without an object. direction: None without an object or motion.
    """

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
    strange: float  # area in colours of neither object, background nor blurred edges, as a share of the object's area
    fill: float  # share of its bounding box that the object fills, the median over frames
    second: int  # pixels of the largest part in the object's colour that is not connected to it, in any frame

    @property
    def shape_by_fill(self) -> str:
        """The shape that fills as much of its bounding box, which ragged edges and horns enlarge."""
        return shape_of_fill(self.fill)

    @property
    def clean(self) -> bool:
        """Whether the clip shows one object of one colour and nothing else."""
        return self.shape is not None and self.strange < _MAX_STRANGE_AREA and self.second < _MIN_AREA


def measure_shape(frames: np.ndarray) -> ShapeMeasurement:
    """Measure a clip (F, H, W, 3) uint8."""
    pixels = frames.astype(np.float64) / 255
    background = _background(pixels)
    difference = pixels - background
    color = _object_color(pixels, difference)
    axis = color - background
    strength = float(axis @ axis)
    nothing = ShapeMeasurement(
        shape=None, direction=None, speed=0.0, size=0.0, color=color, background=background,
        centers=np.zeros((len(frames), 2)), bend=0.0, unevenness=0.0, misfit=1.0, strange=0.0,
        fill=0.0, second=0,
    )  # fmt: skip
    if strength < _MIN_CONTRAST:
        return nothing
    along = difference @ axis / strength
    strange = np.linalg.norm(difference - np.clip(along, 0, 1)[..., None] * axis, axis=-1) > _MAX_COLOR_DISTANCE
    cover = np.clip(along, 0, 1)
    cover[cover < _MIN_COVER] = 0
    areas = cover.sum(axis=(1, 2))
    # A difference in half the frame is a change of the background, not an object.
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
    fill, second = _fill(along > 0.5)
    return ShapeMeasurement(
        shape=shape, direction=direction, speed=speed, size=size, color=color, background=background, centers=centers,
        bend=bend, unevenness=unevenness, misfit=misfits[shape], strange=float(strange.sum() / areas.sum()),
        fill=fill, second=second,
    )  # fmt: skip


def _background(pixels: np.ndarray) -> np.ndarray:
    """The median colour of the outermost two pixels, which the object rarely covers."""
    edges = [pixels[:, :2], pixels[:, -2:], pixels[:, :, :2], pixels[:, :, -2:]]
    return np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)


def _object_color(pixels: np.ndarray, difference: np.ndarray) -> np.ndarray:
    """The median colour of the pixels that differ most from the background."""
    distance = np.linalg.norm(difference, axis=-1)
    core = distance >= 0.7 * np.quantile(distance, 0.995)  # without blurred edges, and robust to single pixels
    return np.median(pixels[core], axis=0)


def _centers(cover: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """Centres of mass (F, 2), x and y."""
    y, x = np.mgrid[: cover.shape[1], : cover.shape[2]] + 0.5
    return np.stack([(cover * x).sum(axis=(1, 2)) / areas, (cover * y).sum(axis=(1, 2)) / areas], axis=1)


def _misfit(cover: np.ndarray, centers: np.ndarray, size: float, shape: str) -> float:
    """Area between the object and an ideal outline of equal area at the same centre, as a share of the object's."""
    grid_y, grid_x = np.arange(cover.shape[1]) + 0.5, np.arange(cover.shape[2]) + 0.5
    dx = grid_x[None, None, :] - centers[:, 0, None, None]
    dy = grid_y[None, :, None] - centers[:, 1, None, None]
    distance = signed_distance(shape, size, dx, dy)
    # A decoder may blur edges, so edges of 1 to 3 pixels are tried.
    errors = [np.abs(cover - np.clip(0.5 - distance / width, 0, 1)).sum() for width in (1, 2, 3)]
    return float(min(errors) / cover.sum())


def _fill(inside: np.ndarray) -> tuple[float, int]:
    """From masks (F, H, W): the share that the largest part fills of its bounding box, and pixels of the second part."""
    labels = connected(inside)
    fills, second = [], 0
    for frame in labels:
        names, counts = np.unique(frame[frame > 0], return_counts=True)
        if not len(names):
            continue
        *others, largest = np.sort(counts)
        second = max(second, int(others[-1]) if others else 0)
        y, x = np.nonzero(frame == names[counts.argmax()])
        fills.append(largest / ((np.ptp(y) + 1) * (np.ptp(x) + 1)))
    return float(np.median(fills)) if fills else 0.0, second


def connected(inside: np.ndarray) -> np.ndarray:
    """Number the parts of masks (F, H, W) whose pixels are connected by their sides; 0 outside of them."""
    labels = np.arange(1, inside.size + 1).reshape(inside.shape) * inside
    while True:  # the largest number of a part spreads by one pixel
        padded = np.pad(labels, ((0, 0), (1, 1), (1, 1)))
        beside = [padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]]
        spread = np.maximum.reduce([labels, *beside]) * inside
        if np.array_equal(spread, labels):
            return labels
        labels = spread


def _path(centers: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Mean velocity by least squares, bend and unevenness of a path (F, 2)."""
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
    """Shares of clips whose shape, direction, or both are those of the label, with 95 % intervals, and by class.

    fill: the share whose object fills as much of its bounding box as its label's shape. clean: the share with one
    object of one colour and nothing else. bend, unevenness, misfit: medians over clips.
    right: for shape, direction and both, which clips are right, in order.
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
    fill: float
    clean: float
    right: dict[str, list[bool]]


def report(clips: Sequence[np.ndarray], labels: Sequence[int]) -> Report:
    """Measure clips (F, H, W, 3) uint8 against their labels; ValueError unless there is one label per clip."""
    if len(clips) != len(labels) or not len(clips):
        raise ValueError(
            f"{len(clips)} clips and {len(labels)} labels; give one label per clip, and at least one clip."
        )
    measurements = [measure_shape(clip) for clip in clips]
    expected = [CLASS_NAMES[label].split() for label in labels]
    shape = np.array([m.shape == e[0] for m, e in zip(measurements, expected, strict=True)])
    direction = np.array([m.direction == e[1] for m, e in zip(measurements, expected, strict=True)])
    label_of_clip = np.array(labels)
    by_class = {
        name: {
            "clips": int((label_of_clip == i).sum()),
            "shape": float(shape[label_of_clip == i].mean()),
            "direction": float(direction[label_of_clip == i].mean()),
        }
        for i, name in enumerate(CLASS_NAMES)
        if (label_of_clip == i).any()
    }
    with_object = [m for m in measurements if m.shape is not None] or measurements
    both = shape & direction
    bend, unevenness, misfit = (
        float(np.median([getattr(m, k) for m in with_object])) for k in ("bend", "unevenness", "misfit")
    )
    fill = np.array([m.shape_by_fill == e[0] for m, e in zip(measurements, expected, strict=True)])
    clean = np.array([m.clean for m in measurements])
    shares = {"shape": shape, "direction": direction, "both": both, "fill": fill, "clean": clean}
    return Report(
        clips=len(clips), shape=float(shape.mean()), direction=float(direction.mean()), both=float(both.mean()),
        intervals={name: wilson(share) for name, share in shares.items()}, by_class=by_class,
        bend=bend, unevenness=unevenness, misfit=misfit, fill=float(fill.mean()), clean=float(clean.mean()),
        right={name: share.tolist() for name, share in shares.items()},
    )  # fmt: skip


def wilson(successes: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the share of true values (Wilson's score)."""
    n, p, z = len(successes), float(successes.mean()), 1.96
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


def table(result: Report) -> str:
    """Format a report as text, with one line per class and one per share."""
    lines = [f"{'class':<16} {'clips':>5} {'shape':>7} {'direction':>9}"]
    lines += [
        f"{name:<16} {row['clips']:>5} {row['shape']:>7.1%} {row['direction']:>9.1%}"
        for name, row in result.by_class.items()
    ]
    names = {key: f"{key} right" for key in ("shape", "direction", "both")}
    for key, name in {**names, "fill": "shape by fill", "clean": "one object"}.items():
        low, high = result.intervals[key]
        lines.append(f"{name:<16} {result.clips:>5} {getattr(result, key):>7.1%} (95 %: {low:.1%} to {high:.1%})")
    lines.append(
        f"median bend {result.bend:.2f} px, unevenness {result.unevenness:.2f}, outline misfit {result.misfit:.1%}"
    )
    return "\n".join(lines)

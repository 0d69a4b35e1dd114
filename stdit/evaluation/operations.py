"""Sampling tasks on moving shapes, measured against the truth: each function returns metrics, and clips to look at.

`options` are those of the task of the pipeline. Lengths are in pixel frames, positions in pixels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stdit.data.shapes import CLASS_NAMES, ShapeClip
from stdit.data.video_write import to_uint8
from stdit.evaluation.held_out import EvalResult, HeldOut, Metric, held_out, label_kwargs, same_object
from stdit.evaluation.metrics import squared_errors
from stdit.evaluation.shapes import ShapeMeasurement, measure_shape, report
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.tasks import Canvas

__all__ = ["EvalResult", "HeldOut", "Metric", "held_out", "label_kwargs"]

_MIN_STEP = 0.15  # pixels per frame; an object that moves less stands still
_ORANGE = (240, 120, 0)


def extension(
    pipe: STDiTPipeline, data: HeldOut, known: int, *, backward: bool, max_error: float, **options: Any
) -> EvalResult:
    """Extend the first (backward: the last) `known` frames to the whole clip; measure the position at its end."""
    frames = data.pixels.shape[2]
    new = frames - known
    clip = data.pixels[:, :, new:] if backward else data.pixels[:, :, :known]
    gap = {"before": new} if backward else {"after": new}
    generated = pipe.extend(clip, **label_kwargs(pipe, data), **gap, **options)
    part = slice(0, new) if backward else slice(known, frames)
    measurements = [measure_shape(to_uint8(c)[part]) for c in generated]
    far = 0 if backward else -1
    errors = _distance(np.stack([m.centers[far] for m in measurements]), data.centers[:, part][:, far])
    direction = "backward" if backward else "forward"
    name = f"{data.truths[0].motion}, {direction} from {known} to {frames}"
    metrics = [
        Metric.mean(f"{name}: mean position error at the end", errors, "px", most=max_error),
        Metric(f"{name}: median position error at the end", float(np.median(errors)), "px"),
        *_preserved(name, measurements, data, min_direction=0.95 if data.truths[0].motion == "straight" else None),
    ]
    return EvalResult(metrics, _comparison_rows(generated, data, _frame_mask(frames, part)))


def connection(
    pipe: STDiTPipeline, data: HeldOut, first: int, last: int, *, max_error: float, **options: Any
) -> EvalResult:
    """Connect the two ends of one clip; measure the position of the object in between."""
    frames = data.pixels.shape[2]
    new = frames - first - last
    gap = slice(first, frames - last)
    clip, goal = data.pixels[:, :, :first], data.pixels[:, :, gap.stop :]
    generated = pipe.connect(clip, goal, new, **label_kwargs(pipe, data), **options)
    centers = np.stack([measure_shape(to_uint8(c)).centers for c in generated])
    errors = _distance(centers[:, gap], data.centers[:, gap])
    name = f"connect {first} and {last} frames over {new}"
    metrics = [
        Metric.mean(f"{name}: position error at the seam", errors[:, -1], "px", most=max_error),
        Metric.mean(f"{name}: position error over the gap", errors.mean(1), "px"),
    ]
    return EvalResult(metrics, _comparison_rows(generated, data, _frame_mask(frames, gap)))


def loops(pipe: STDiTPipeline, data: HeldOut, known: int, new: int, **options: Any) -> EvalResult:
    """Close a clip to a loop; measure the jump from the last frame to the first against the mean step."""
    generated = pipe.loop(data.pixels[:, :, :known], new, **label_kwargs(pipe, data), **options)
    centers = np.stack([measure_shape(to_uint8(c)).centers for c in generated])
    steps = _distance(centers[:, 1:], centers[:, :-1]).mean(1)
    jumps = _distance(centers[:, 0], centers[:, -1])
    moving = steps > _MIN_STEP
    smooth = moving & (jumps <= steps)
    ratio = float(jumps[moving].mean() / steps[moving].mean()) if moving.any() else float("inf")
    ratios = np.divide(jumps, steps, out=np.full_like(jumps, np.nan), where=moving).tolist()
    name = f"loop of {known} frames and {new} new"
    metrics = [
        Metric(f"{name}: mean jump over mean step", ratio, "", most=1.0, values=ratios),
        Metric.share(f"{name}: jump no larger than the clip's mean step", smooth),
        Metric.share(f"{name}: moving", moving),
    ]
    mask = torch.arange(generated.shape[2]) >= known
    return EvalResult(metrics, [mark_generated(to_uint8(clip), mask) for clip in generated[:6]])


def interpolation(pipe: STDiTPipeline, data: HeldOut, factor: int, **options: Any) -> EvalResult:
    """Interpolate every `factor`-th frame; measure withheld frames against the truth and against linear blending."""
    generated = pipe.interpolate(data.pixels[:, :, ::factor], factor, class_labels=data.class_names, **options)
    frames = torch.arange(data.pixels.shape[2])
    withheld = frames % factor != 0
    weight = ((frames[withheld] % factor) / factor).view(1, 1, -1, 1, 1)
    left = data.pixels[:, :, frames[withheld] // factor * factor]
    right = data.pixels[:, :, frames[withheld] // factor * factor + factor]
    truth = data.pixels[:, :, withheld]
    model = squared_errors(generated[:, :, withheld], truth)
    linear = squared_errors((1 - weight) * left + weight * right, truth)
    metrics = [
        Metric.psnr(f"interpolate x{factor}: PSNR above linear blending", model, above=linear, least=3.0),
        Metric.psnr(f"interpolate x{factor}: PSNR of withheld frames", model),
    ]
    # Consecutive frames, since those that a contact sheet picks over the whole clip could all be known ones.
    shown = slice(0, 9)
    few = HeldOut(data.truths, data.pixels[:, :, shown])
    return EvalResult(metrics, _comparison_rows(generated[:, :, shown], few, withheld[shown]))


def inpainting(pipe: STDiTPipeline, data: HeldOut, **options: Any) -> EvalResult:
    """Inpaint a quarter of every frame; measure it against the truth and against the median colour of the rest."""
    frames, height, width = data.pixels.shape[2:]
    rows: list[np.ndarray] = []
    model, baseline = torch.empty(len(data.truths)), torch.empty(len(data.truths))
    for quarter in range(min(4, len(data.truths))):
        part = HeldOut(data.truths[quarter::4], data.pixels[quarter::4])
        mask = torch.zeros(frames, height, width, dtype=torch.bool)
        y, x = quarter // 2 * (height // 2), quarter % 2 * (width // 2)
        mask[:, y : y + height // 2, x : x + width // 2] = True
        clips = pipe.inpaint(part.pixels, mask, class_labels=part.class_names, **options)
        median = part.pixels[..., ~mask[0]].median(-1).values[..., None]
        true, filled = part.pixels[..., mask[0]], clips[..., mask[0]]
        model[quarter::4], baseline[quarter::4] = squared_errors(filled, true), squared_errors(median, true)
        rows += _comparison_rows(clips, part, torch.ones(frames, dtype=torch.bool))[:4]
    metrics = [
        Metric.psnr("inpaint a quarter: PSNR above the frame-wise median", model, above=baseline, least=3.0),
        Metric.psnr("inpaint a quarter: PSNR in the hole", model),
    ]
    return EvalResult(metrics, rows)


def editing(
    pipe: STDiTPipeline, data: HeldOut, strength: float, *, min_share: float, new_label: bool, **options: Any
) -> EvalResult:
    """Edit with a label of another shape and direction; measure how often the label is followed.

    new_label: false measures how often shape and colour are preserved instead.
    """
    # Five classes further, shape and direction both differ.
    labels = [CLASS_NAMES[(truth.label + 5) % len(CLASS_NAMES)] for truth in data.truths]
    generated = pipe.edit(data.pixels, strength, class_labels=labels, **options)
    measurements = [measure_shape(to_uint8(clip)) for clip in generated]
    if new_label:
        correct = np.array([f"{m.shape} {m.direction}" == name for m, name in zip(measurements, labels, strict=True)])
        name = f"edit at {strength}: new label obeyed (shape and direction)"
    else:
        correct = np.array([same_object(m, t) for m, t in zip(measurements, data.truths, strict=True)])
        name = f"edit at {strength}: shape and colour stay"
    metrics = [Metric.share(name, correct, least=min_share)]
    return EvalResult(metrics, _comparison_rows(generated, data, torch.ones(generated.shape[2], dtype=torch.bool)))


def animation(pipe: STDiTPipeline, data: HeldOut, **options: Any) -> EvalResult:
    """Animate a first frame under its label; measure the first frame before pasting, and the direction."""
    frames = data.pixels.shape[2]
    image = data.pixels[:, :, 0]
    raw = pipe.animate(image, frames, class_labels=data.class_names, paste=False, **options)
    generated = pipe.animate(image, frames, class_labels=data.class_names, **options)
    assert torch.equal(generated[:, :, 0], image)
    first_frame = data.pixels[:, :, :1]
    before, trip = (squared_errors(frame, first_frame) for frame in (raw[:, :, :1], _round_trip(pipe, first_frame)))
    measurements = [measure_shape(to_uint8(clip)) for clip in generated]
    direction = np.array([m.direction == t.direction for m, t in zip(measurements, data.truths, strict=True)])
    metrics = [
        Metric.psnr("animate: first frame before pasting, against the round trip", before, above=trip, least=-0.5),
        Metric.share("animate: direction follows the label", direction, least=0.9),
        *_preserved("animate", measurements, data, min_direction=None)[1:],
    ]
    return EvalResult(metrics, _comparison_rows(generated, data, torch.arange(frames) > 0))


def known_frames(pipe: STDiTPipeline, data: HeldOut, **options: Any) -> EvalResult:
    """Measure the PSNR of known frames before pasting, and of a round trip of the whole clip through the VAE.

    The known frames are at the start, in the middle, or at the end.
    """
    frames, stride = data.pixels.shape[2], pipe.video_vae.stride[0]
    whole = _round_trip(pipe, data.pixels)
    middle = 1 + stride * ((frames - 1) // stride // 2)
    parts = {"start": slice(0, 5), "middle": slice(middle, middle + stride), "end": slice(frames - stride, frames)}
    metrics = []
    for where, known in parts.items():
        canvas = Canvas(data.pixels, ~_frame_mask(frames, known).view(-1, 1, 1))
        raw = pipe.fill(canvas, data.class_names, paste=False, **options)
        truth = data.pixels[:, :, known]
        name = f"known frames at the {where}"
        metrics += [
            Metric.psnr(f"{name}: PSNR before pasting", squared_errors(raw[:, :, known], truth)),
            Metric.psnr(
                f"{name}: the same in a round trip of the whole clip", squared_errors(whole[:, :, known], truth)
            ),
        ]
    return EvalResult(metrics, [])


def sizes(pipe: STDiTPipeline, count: int, **options: Any) -> EvalResult:
    """Sample by label at sizes and durations that training did not have; measure shape and direction."""
    labels = [i % len(CLASS_NAMES) for i in range(count)]
    class_names = [CLASS_NAMES[i] for i in labels]
    metrics: list[Metric] = []
    rows: list[np.ndarray] = []
    for frames, height, width in ((17, 64, 64), (17, 48, 48), (17, 80, 80), (17, 64, 96), (9, 64, 64), (25, 64, 64)):
        sampled = pipe(class_names, num_frames=frames, height=height, width=width, **options)
        clips = [to_uint8(clip) for clip in sampled]
        result = report(clips, labels)
        name = f"{frames} frames of {height} x {width}"
        for key in ("shape", "direction"):
            metrics.append(Metric.share(f"{name}: {key} right", np.array(result.right[key])))
        rows += clips[:2]
    return EvalResult(metrics, rows)


def mark_generated(clip: np.ndarray, generated: Tensor) -> np.ndarray:
    """Draw an orange line above the generated frames of a clip (F, H, W, 3) uint8; generated: (F,) bool."""
    clip = np.pad(clip, ((0, 0), (3, 0), (0, 0), (0, 0)), constant_values=255)
    clip[generated.numpy(), :2] = _ORANGE
    return clip


@torch.no_grad()
def _round_trip(pipe: STDiTPipeline, pixels: Tensor) -> Tensor:
    """Pixels through the VAE's encoder and decoder."""
    return pipe.decode(pipe.video_vae.encode(pixels.to(pipe.device)).float())


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances of points (..., 2)."""
    return np.linalg.norm(a - b, axis=-1)


def _frame_mask(total: int, part: slice) -> Tensor:
    """(total,) bool, true in `part`."""
    mask = torch.zeros(total, dtype=torch.bool)
    mask[part] = True
    return mask


def _preserved(
    name: str, measurements: Sequence[ShapeMeasurement], data: HeldOut, *, min_direction: float | None
) -> list[Metric]:
    """How often direction and object are those of the truth; the direction of bouncing shapes is left out."""
    checks: list[tuple[str, Callable[[ShapeMeasurement, ShapeClip], bool], float | None]] = [
        ("shape and colour kept", same_object, 0.9)
    ]
    if data.truths[0].motion == "straight":
        checks.insert(0, ("direction kept", lambda m, t: m.direction == t.direction, min_direction))
    metrics = []
    for what, check, least in checks:
        correct = np.array([check(m, t) for m, t in zip(measurements, data.truths, strict=True)])
        metrics.append(Metric.share(f"{name}: {what}", correct, least=least))
    return metrics


def _comparison_rows(generated: Tensor, data: HeldOut, marked: Tensor, count: int = 6) -> list[np.ndarray]:
    """Alternate true and generated clips; `marked` (F,): the frames of the latter that were generated."""
    none = torch.zeros_like(marked)
    pairs = zip(data.pixels[:count], generated[:count], strict=True)
    return [
        row
        for true, clip in pairs
        for row in (mark_generated(to_uint8(true), none), mark_generated(to_uint8(clip), marked))
    ]

"""Tasks on moving shapes, measured against the truth: each function gives figures, and clips to look at."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stdit.data.shapes import CLASS_NAMES, ShapeClip, draw, random_clip
from stdit.data.video_write import to_uint8
from stdit.evaluation.metrics import decibel, psnr
from stdit.evaluation.shapes import ShapeMeasurement, measure_shape, report, wilson
from stdit.rng import keyed_rng
from stdit.sampling.tasks import Canvas

_SAME_COLOR = 0.15  # largest difference of a channel, 0..1; the named colours are further apart


class Metric(NamedTuple):
    """One measured number; `least` or `most` is what was asked of it, interval the 95 % one of a share."""

    name: str
    value: float
    unit: str = ""
    least: float | None = None
    most: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def reached(self) -> bool | None:
        if self.least is None and self.most is None:
            return None
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)

    def __str__(self) -> str:
        asked = f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}" if self.most is not None else ""
        value = f"{self.value:.1%}" if self.unit == "%" else f"{self.value:.2f} {self.unit}".strip()
        if self.unit == "%" and asked:
            asked = asked[:3] + f"{self.least if self.least is not None else self.most:.0%}"
        spread = f" ({self.interval[0]:.1%} to {self.interval[1]:.1%})" if self.interval else ""
        verdict = {None: "", True: "reached", False: "MISSED"}[self.reached]
        return f"{self.name:<58} {value + spread:<28} {asked:<10} {verdict}".rstrip()


class EvalResult(NamedTuple):
    """Figures, and rows of clips (F, H, W, 3) uint8: what was known and made, beside the truth."""

    figures: list[Metric]
    clips: list[np.ndarray]


class HeldOut(NamedTuple):
    """Held-out clips and their truth."""

    truths: list[ShapeClip]
    pixels: Tensor  # (B, 3, F, H, W) in [-1, 1]

    @property
    def names(self) -> list[str]:
        return [truth.class_name for truth in self.truths]

    @property
    def centers(self) -> np.ndarray:
        """(B, F, 2)"""
        return np.stack([truth.centers() for truth in self.truths])


def held_out(count: int, frames: int, motion: str, size: int, seed: int) -> HeldOut:
    """Clips that no training run drew (their keys are longer)."""
    truths = [
        random_clip(keyed_rng("sample", seed, 1, i), i % len(CLASS_NAMES), frames, size, motion) for i in range(count)
    ]
    drawn = torch.stack([torch.from_numpy(draw(truth)) for truth in truths])
    return HeldOut(truths, drawn.permute(0, 4, 1, 2, 3).float() / 127.5 - 1)


def told(pipe: Any, data: HeldOut) -> dict[str, list[str]]:
    """Labels, for a model that knows them all."""
    known = set(pipe.transformer.config.class_names or ())
    return {"class_labels": data.names} if set(data.names) <= known else {}


def extension(pipe: Any, data: HeldOut, known: int, backward: bool, asked: float, **options) -> EvalResult:
    """From `known` first (or last) frames to the whole clip: does the object go on as it must?"""
    frames = data.pixels.shape[2]
    new = frames - known
    clip = data.pixels[:, :, new:] if backward else data.pixels[:, :, :known]
    gap = {"before": new} if backward else {"after": new}
    made = pipe.extend(clip, **told(pipe, data), **gap, **options)
    part = slice(0, new) if backward else slice(known, frames)
    verdicts = [measure_shape(to_uint8(c)[part]) for c in made]
    far = 0 if backward else -1
    errors = _distance(np.stack([v.centers[far] for v in verdicts]), data.centers[:, part][:, far])
    way = "backward" if backward else "forward"
    name = f"{data.truths[0].motion}, {way} from {known} to {frames}"
    figures = [
        Metric(f"{name}: mean position error at the end", float(errors.mean()), "px", most=asked),
        Metric(f"{name}: median position error at the end", float(np.median(errors)), "px"),
        *_kept(name, verdicts, data, 0.95 if data.truths[0].motion == "straight" else None),
    ]
    return EvalResult(figures, _rows(made, data, _frames(frames, part)))


def connection(pipe: Any, data: HeldOut, first: int, last: int, asked: float, **options) -> EvalResult:
    """The two ends of one trajectory joined: is the object where it was on the way?"""
    frames = data.pixels.shape[2]
    gap = slice(first, frames - last)
    made = pipe.connect(
        data.pixels[:, :, :first], data.pixels[:, :, gap.stop :], frames - first - last, **told(pipe, data), **options
    )
    centers = np.stack([measure_shape(to_uint8(c)).centers for c in made])
    errors = _distance(centers[:, gap], data.centers[:, gap])
    name = f"connect {first} and {last} frames over {frames - first - last}"
    figures = [
        Metric(f"{name}: position error at the seam", float(errors[:, -1].mean()), "px", most=asked),
        Metric(f"{name}: position error over the gap", float(errors.mean()), "px"),
    ]
    return EvalResult(figures, _rows(made, data, _frames(frames, gap)))


def loops(pipe: Any, data: HeldOut, known: int, new: int, **options) -> EvalResult:
    """Is the jump from the last frame to the first no larger than a step?"""
    made = pipe.loop(data.pixels[:, :, :known], new, **told(pipe, data), **options)
    centers = np.stack([measure_shape(to_uint8(c)).centers for c in made])
    steps = _distance(centers[:, 1:], centers[:, :-1]).mean(1)
    jumps = _distance(centers[:, 0], centers[:, -1])
    moving = steps > 0.15
    good = moving & (jumps <= steps)
    name = f"loop of {known} frames and {new} new"
    figures = [
        Metric(
            f"{name}: mean jump over mean step",
            float(jumps[moving].mean() / steps[moving].mean()) if moving.any() else float("inf"),
            "",
            most=1.0,
        ),
        Metric(f"{name}: jump no larger than the clip's mean step", float(good.mean()), "%", interval=wilson(good)),
        Metric(f"{name}: moving", float(moving.mean()), "%"),
    ]
    whole = torch.arange(made.shape[2]) >= known
    return EvalResult(figures, [mark(to_uint8(clip), whole) for clip in made[:6]])


def interpolation(pipe: Any, data: HeldOut, factor: int, **options) -> EvalResult:
    """Withheld frames against linear blending."""
    made = pipe.interpolate(data.pixels[:, :, ::factor], factor, class_labels=data.names, **options)
    frames = torch.arange(data.pixels.shape[2])
    withheld = frames % factor != 0
    share = ((frames[withheld] % factor) / factor).view(1, 1, -1, 1, 1)
    left = data.pixels[:, :, frames[withheld] // factor * factor]
    right = data.pixels[:, :, frames[withheld] // factor * factor + factor]
    ours, linear = (
        psnr(x, data.pixels[:, :, withheld]) for x in (made[:, :, withheld], (1 - share) * left + share * right)
    )
    figures = [
        Metric(f"interpolate x{factor}: PSNR above linear blending", ours - linear, "dB", least=3.0),
        Metric(f"interpolate x{factor}: PSNR of withheld frames", ours, "dB"),
    ]
    few = slice(0, 9)  # neighbours: frames spread over the clip, as a sheet takes them, could all be given ones
    return EvalResult(figures, _rows(made[:, :, few], HeldOut(data.truths, data.pixels[:, :, few]), withheld[few]))


def inpainting(pipe: Any, data: HeldOut, **options) -> EvalResult:
    """A quarter of the frame hidden over all frames, against the median of what is left of each frame."""
    frames, height, width = data.pixels.shape[2:]
    made, total, median = [], [], []
    for quarter in range(4):
        part = HeldOut(data.truths[quarter::4], data.pixels[quarter::4])
        mask = torch.zeros(frames, height, width, dtype=torch.bool)
        y, x = quarter // 2 * (height // 2), quarter % 2 * (width // 2)
        mask[:, y : y + height // 2, x : x + width // 2] = True
        clips = pipe.inpaint(part.pixels, mask, class_labels=part.names, **options)
        seen = part.pixels[..., ~mask[0]].median(-1).values[..., None]
        true, filled = part.pixels[..., mask[0]], clips[..., mask[0]]
        total.append((filled - true).square().flatten())
        median.append((seen - true).square().flatten())
        made += _rows(clips, part, torch.ones(frames, dtype=torch.bool))[:4]
    ours, theirs = (decibel(torch.cat(squares).mean()) for squares in (total, median))
    figures = [
        Metric("inpaint a quarter: PSNR above the frame-wise median", ours - theirs, "dB", least=3.0),
        Metric("inpaint a quarter: PSNR in the hole", ours, "dB"),
    ]
    return EvalResult(figures, made)


def editing(pipe: Any, data: HeldOut, strength: float, asked: float, obeys: bool, **options) -> EvalResult:
    """Another label at some strength: is it obeyed, or do shape and colour stay?"""
    wanted = [CLASS_NAMES[(truth.label + 5) % len(CLASS_NAMES)] for truth in data.truths]  # shape and direction change
    made = pipe.edit(data.pixels, strength, class_labels=wanted, **options)
    verdicts = [measure_shape(to_uint8(clip)) for clip in made]
    if obeys:
        good = np.array([f"{v.shape} {v.direction}" == name for v, name in zip(verdicts, wanted, strict=True)])
        name = f"edit at {strength}: new label obeyed (shape and direction)"
    else:
        good = np.array([same_object(v, t) for v, t in zip(verdicts, data.truths, strict=True)])
        name = f"edit at {strength}: shape and colour stay"
    figures = [Metric(name, float(good.mean()), "%", least=asked, interval=wilson(good))]
    return EvalResult(figures, _rows(made, data, torch.ones(made.shape[2], dtype=torch.bool)))


def animation(pipe: Any, data: HeldOut, **options) -> EvalResult:
    """An image and a label: does the clip begin with it, and move as the label says?"""
    frames = data.pixels.shape[2]
    image = data.pixels[:, :, 0]
    raw = pipe.animate(image, frames, class_labels=data.names, paste=False, **options)
    made = pipe.animate(image, frames, class_labels=data.names, **options)
    assert torch.equal(made[:, :, 0], image)
    round_trip = psnr(_round_trip(pipe, data.pixels[:, :, :1]), data.pixels[:, :, :1])
    verdicts = [measure_shape(to_uint8(clip)) for clip in made]
    direction = np.array([v.direction == t.direction for v, t in zip(verdicts, data.truths, strict=True)])
    first = psnr(raw[:, :, :1], data.pixels[:, :, :1])
    figures = [
        Metric("animate: first frame before pasting, against the round trip", first - round_trip, "dB", least=-0.5),
        Metric("animate: direction follows the label", float(direction.mean()), "%", 0.9, interval=wilson(direction)),
        *_kept("animate", verdicts, data, None)[1:],
    ]
    return EvalResult(figures, _rows(made, data, torch.arange(frames) > 0))


def placing(pipe: Any, data: HeldOut, **options) -> EvalResult:
    """PSNR of known frames before pasting, wherever they stand, against a round trip of the whole true clip."""
    frames, stride = data.pixels.shape[2], pipe.video_vae.stride[0]
    whole = _round_trip(pipe, data.pixels)
    middle = 1 + stride * ((frames - 1) // stride // 2)
    figures = []
    for where, known in (
        ("start", slice(0, 5)),
        ("middle", slice(middle, middle + stride)),
        ("end", slice(frames - stride, frames)),
    ):
        made = torch.ones(frames, 1, 1, dtype=torch.bool)
        made[known] = False
        raw = pipe.fill(Canvas(data.pixels, made), data.names, paste=False, **options)
        there, reference = (psnr(x[:, :, known], data.pixels[:, :, known]) for x in (raw, whole))
        figures.append(Metric(f"known frames at the {where}: PSNR before pasting", there, "dB"))
        figures.append(
            Metric(f"known frames at the {where}: the same in a round trip of the whole clip", reference, "dB")
        )
    return EvalResult(figures, [])


def sizes(pipe: Any, count: int, **options) -> EvalResult:
    """Plain generation at sizes and durations never seen."""
    labels = [i % len(CLASS_NAMES) for i in range(count)]
    figures, shown = [], []
    for frames, height, width in ((17, 64, 64), (17, 48, 48), (17, 80, 80), (17, 64, 96), (9, 64, 64), (25, 64, 64)):
        clips = [to_uint8(c) for c in pipe([CLASS_NAMES[i] for i in labels], frames, height, width, **options)]
        result = report(clips, labels)
        name = f"{frames} frames of {height} x {width}"
        figures.append(Metric(f"{name}: shape right", result.shape, "%", interval=result.intervals["shape"]))
        figures.append(
            Metric(f"{name}: direction right", result.direction, "%", interval=result.intervals["direction"])
        )
        shown += clips[:2]
    return EvalResult(figures, shown)


def mark(clip: np.ndarray, made: Tensor) -> np.ndarray:
    """An orange line above frames that were made, at least in part."""
    clip = np.pad(clip, ((0, 0), (3, 0), (0, 0), (0, 0)), constant_values=255)
    clip[made.numpy(), :2] = (240, 120, 0)
    return clip


@torch.no_grad()
def _round_trip(pipe: Any, pixels: Tensor) -> Tensor:
    return pipe.decode(pipe.video_vae.encode(pixels.to(pipe.device)).float())


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a - b, axis=-1)


def _frames(total: int, part: slice) -> Tensor:
    made = torch.zeros(total, dtype=torch.bool)
    made[part] = True
    return made


def same_object(verdict: ShapeMeasurement, truth: ShapeClip) -> bool:
    """Whether shape and colour are the truth's."""
    return verdict.shape == truth.shape and bool(np.abs(verdict.color - truth.color).max() < _SAME_COLOR)


def _kept(name: str, verdicts: Sequence[ShapeMeasurement], data: HeldOut, direction: float | None) -> list[Metric]:
    checks: list[tuple[str, Callable[[ShapeMeasurement, ShapeClip], bool], float | None]] = [
        ("direction kept", lambda v, t: v.direction == t.direction, direction),
        ("shape and colour kept", same_object, 0.9),
    ]
    figures = []
    for what, check, least in checks:
        if what == "direction kept" and data.truths[0].motion != "straight":
            continue  # it bounces
        good = np.array([check(v, t) for v, t in zip(verdicts, data.truths, strict=True)])
        figures.append(Metric(f"{name}: {what}", float(good.mean()), "%", least, interval=wilson(good)))
    return figures


def _rows(made: Tensor, data: HeldOut, marked: Tensor, count: int = 6) -> list[np.ndarray]:
    """Truth and answer in turn."""
    none = torch.zeros_like(marked)
    pairs = zip(data.pixels[:count], made[:count], strict=True)
    return [row for true, clip in pairs for row in (mark(to_uint8(true), none), mark(to_uint8(clip), marked))]

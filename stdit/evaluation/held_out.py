"""Held-out clips of moving shapes, and the metrics of tasks on them."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stdit.data.shapes import CLASS_NAMES, ShapeClip, draw, random_clip
from stdit.evaluation.metrics import decibel
from stdit.evaluation.shapes import ShapeMeasurement, wilson
from stdit.pixels import to_float
from stdit.rng import keyed_rng
from stdit.sampling.pipeline import STDiTPipeline

_SAME_COLOR = 0.15  # largest difference of a channel, in [0, 1]; the colours of captions are further apart


class Metric(NamedTuple):
    """One measured number.

    least, most: its target. interval: the 95 % interval of a share. values: that of each clip, in order; None without
    such. A share and an error are the means of theirs; a PSNR is that of the pixels of all clips together.
    """

    name: str
    value: float
    unit: str = ""
    least: float | None = None
    most: float | None = None
    interval: tuple[float, float] | None = None
    values: list | None = None

    @classmethod
    def share(cls, name: str, correct: np.ndarray, *, least: float | None = None) -> "Metric":
        """The share of clips that are right; correct: (B,) bool."""
        return cls(
            name,
            float(correct.mean()),
            "%",
            least=least,
            interval=wilson(correct),
            values=correct.astype(bool).tolist(),
        )

    @classmethod
    def mean(cls, name: str, values: np.ndarray, unit: str, *, most: float | None = None) -> "Metric":
        """The mean of a value (B,) of each clip."""
        return cls(name, float(values.mean()), unit, most=most, values=values.tolist())

    @classmethod
    def psnr(cls, name: str, errors: Tensor, *, above: Tensor | None = None, least: float | None = None) -> "Metric":
        """The PSNR of clips by their mean squared errors (B,), or how far it is above that of other errors (B,)."""
        base = 0.0 if above is None else decibel(above.mean())
        bases = [0.0] * len(errors) if above is None else map(decibel, above)
        values = [decibel(error) - one for error, one in zip(errors, bases, strict=True)]
        return cls(name, decibel(errors.mean()) - base, "dB", least=least, values=values)

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None without a target."""
        if self.least is None and self.most is None:
            return None
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)

    def __str__(self) -> str:
        sign, bound = (">=", self.least) if self.least is not None else ("<=", self.most)
        target = "" if bound is None else f"{sign} {bound:.0%}" if self.unit == "%" else f"{sign} {bound:g}"
        value = f"{self.value:.1%}" if self.unit == "%" else f"{self.value:.2f} {self.unit}".strip()
        interval = f" ({self.interval[0]:.1%} to {self.interval[1]:.1%})" if self.interval else ""
        status = {None: "", True: "reached", False: "MISSED"}[self.reached]
        return f"{self.name:<58} {value + interval:<28} {target:<10} {status}".rstrip()


class EvalResult(NamedTuple):
    """The metrics of a task, and clips (F, H, W, 3) uint8 to look at."""

    metrics: list[Metric]
    clips: list[np.ndarray]


class HeldOut(NamedTuple):
    """Held-out clips and the parameters they were drawn from; pixels: (B, 3, F, H, W) in [-1, 1]."""

    truths: list[ShapeClip]
    pixels: Tensor

    @property
    def class_names(self) -> list[str]:
        """The class of each clip."""
        return [truth.class_name for truth in self.truths]

    @property
    def centers(self) -> np.ndarray:
        """True centres (B, F, 2), x and y in pixels."""
        return np.stack([truth.centers() for truth in self.truths])


def held_out(count: int, frames: int, motion: str, size: int, *, seed: int) -> HeldOut:
    """Draw `count` clips that no training run draws, since their random numbers have longer keys."""
    truths = [
        random_clip(
            keyed_rng("sample", seed, 1, i), label=i % len(CLASS_NAMES), frames=frames, frame_size=size, motion=motion
        )
        for i in range(count)
    ]
    drawn = torch.stack([torch.from_numpy(draw(truth)) for truth in truths])
    return HeldOut(truths, to_float(drawn))


def label_kwargs(pipe: STDiTPipeline, data: HeldOut) -> dict[str, Any]:
    """The `class_labels` of a pipeline call; none for a model that does not have all classes of the data."""
    known = set(pipe.transformer.config.class_names or ())
    return {"class_labels": data.class_names} if set(data.class_names) <= known else {}


def same_object(measurement: ShapeMeasurement, truth: ShapeClip) -> bool:
    """Whether shape and colour are those of the truth."""
    same_color = np.abs(measurement.color - truth.color).max() < _SAME_COLOR
    return measurement.shape == truth.shape and bool(same_color)

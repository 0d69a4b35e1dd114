"""The curves of a run as a picture, from rows that are merged as they grow in number: a long run is drawn as fast as a short one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stdit.files import atomic_write

MOST = 2000  # points of a curve, at least half of them in use


class Curves:
    """Means of columns over steps that follow each other, of at most `MOST` groups of steps.

    names: the columns that are kept; numbers that are missing or not finite do not count.
    """

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        self._sums, self._counts = np.zeros((MOST, len(self.names))), np.zeros((MOST, len(self.names)))
        self._rows, self._together = 0, 1  # rows so far, and rows in a group

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row, whose values are numbers or their texts."""
        if self._rows == MOST * self._together:
            for kept in (self._sums, self._counts):
                kept[: MOST // 2] = kept[::2] + kept[1::2]
                kept[MOST // 2 :] = 0
            self._together *= 2
        values = np.array([_number(row.get(name)) for name in self.names])
        finite, group = np.isfinite(values), self._rows // self._together
        self._sums[group] += np.where(finite, values, 0)
        self._counts[group] += finite
        self._rows += 1

    def values(self) -> dict[str, np.ndarray]:
        """The means of each column, nan where a group has no number."""
        groups = -(-self._rows // self._together)
        sums, counts = self._sums[:groups], self._counts[:groups]
        means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
        return dict(zip(self.names, means.T, strict=True))


def _number(value: Any) -> float:
    return float("nan") if value is None or value == "" else float(value)


def draw_curves(
    values: Mapping[str, np.ndarray], picture: Path, title: str, *, parts: Mapping[str, str], held_out: str | None
) -> None:
    """Draw the loss and its parts, learning rate, gradient norm, throughput and memory over steps, smoothed.

    values: of `Curves`. title: of the loss. parts: columns and their labels. held_out: the column of the held-out loss.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    steps = values["step"]
    if not len(steps):
        return
    figure = Figure(figsize=(20, 7), layout="constrained")  # not pyplot's, which belongs to the main thread
    FigureCanvasAgg(figure)
    (loss, rate, speed, work), (norm, waiting, tokens, memory) = axes = figure.subplots(2, 4)
    width = max(1, len(steps) // 60)
    loss.plot(steps, values["loss"], color="0.85", lw=0.5)
    loss.plot(*_smooth(steps, values["loss"], width), color="black", label="all")
    for column, label in parts.items():
        loss.plot(*_smooth(steps, values[column], width), label=label)
    if held_out is not None:
        have = np.isfinite(values[held_out])
        style = {"color": "magenta", "ls": "--", "marker": "o", "ms": 3}  # no colour of a part
        loss.plot(steps[have], values[held_out][have], label="held out, averaged weights", **style)
    finite = values["loss"][np.isfinite(values["loss"])]
    tops = [np.quantile(finite, 0.99)] if len(finite) else []  # a few spikes must not flatten the rest
    if held_out is not None:
        tops += list(values[held_out][have])  # whose rise is what the picture is for
    if tops and max(tops) > 0:
        loss.set_ylim(0, 1.2 * max(tops))
    loss.legend(fontsize=8)
    for axis, key, named in (
        (rate, "lr", "learning rate"),
        (norm, "grad_norm", "gradient norm"),
        (speed, "clips_per_second", "clips per second"),
        (tokens, "tokens_per_second", "tokens per second"),
        (memory, "memory_gb", "largest memory so far, GB"),
        (work, "tflops", "Tflop/s"),
        (waiting, "waiting", "share of the time spent waiting for data"),
    ):
        smooth = (steps, values[key]) if key == "lr" else _smooth(steps, values[key], width)
        axis.plot(*smooth, color="black")
        axis.set_title(named)
    norm.set_yscale("log")
    used = np.isfinite(values["utilisation"]) & np.isfinite(values["tflops"])
    if (values["utilisation"][used] > 0).any():  # else the peak of the device is not known
        peak = np.median(values["tflops"][used] / np.maximum(values["utilisation"][used], 1e-9))
        share = work.secondary_yaxis("right", functions=(lambda x: x / peak, lambda x: x * peak))
        share.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        work.set_title("Tflop/s, and their share of the peak")
    for axis in (speed, tokens, work, memory):
        axis.set_ylim(bottom=0)
    loss.set_title(title)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    with atomic_write(picture) as tmp:
        figure.savefig(tmp, dpi=110, format="png")


def _smooth(x: np.ndarray, y: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over windows of `width` values; values that are not finite are left out."""
    have = np.isfinite(y)
    x, y = x[have], y[have]
    if len(y) < 2 * width or width < 2:
        return x, y
    kernel = np.ones(width) / width
    return np.convolve(x, kernel, "valid"), np.convolve(y, kernel, "valid")

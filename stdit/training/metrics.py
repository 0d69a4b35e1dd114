"""Metrics of a run: a CSV file with one row per step, a picture of the curves, and the trackers of the run."""

import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stdit.files import atomic_write
from stdit.legacy import aliases
from stdit.training.throughput import COLUMNS as THROUGHPUT
from stdit.training.trackers import Trackers

__getattr__ = aliases(__name__)

REDRAW_SECONDS = 30.0  # a drawing takes half a second, as long as many steps of a small model
HELD_OUT = "held_out_loss"
BINS = 4  # loss by noise level: [0, 1/4), [1/4, 1/2), ...


class Breakdown(NamedTuple):
    """The parts of a loss that are logged in separate columns.

    title: of the plot. columns: in the CSV file. labels: in the legend of the plot. held_out: whether the loss on
    held-out clips has a column, too, which is empty in the rows of most steps.
    """

    title: str
    columns: Sequence[str]
    labels: Sequence[str]
    held_out: bool = False


LEVELS = Breakdown(
    "loss by noise level (1 = noise)",
    [f"loss_level_{i}" for i in range(BINS)],
    [f"level {i / BINS:.2f}-{(i + 1) / BINS:.2f}" for i in range(BINS)],
)


def columns(breakdown: Breakdown) -> list[str]:
    """The columns of training_metrics.csv."""
    further = [HELD_OUT] if breakdown.held_out else []
    return ["step", "loss", *breakdown.columns, *further, "lr", "grad_norm", *THROUGHPUT, "skipped"]


def level_sums(losses: Tensor, levels: Tensor) -> Tensor:
    """Sums of losses and counts of clips by noise level, (2, BINS)."""
    which = (levels * BINS).long().clamp(0, BINS - 1)
    sums = torch.zeros(2, BINS, device=losses.device)
    sums[0].index_add_(0, which, losses.detach().float())
    sums[1].index_add_(0, which, torch.ones_like(losses, dtype=torch.float32))
    return sums


class MetricsLogger:
    """Writes training_metrics.csv and training_curves.png to a run's output folder, and passes numbers on to trackers.

    Rows after `start_step` are removed, since those steps are taken again.
    """

    def __init__(self, output: Path, start_step: int, breakdown: Breakdown = LEVELS, trackers: Trackers | None = None):
        self.path, self.output, self.breakdown = output / "training_metrics.csv", output, breakdown
        rows = [row for row in read_metrics(self.path) if int(row["step"]) <= start_step]
        with atomic_write(self.path) as tmp, open(tmp, "w", newline="") as stream:
            writer = csv.DictWriter(stream, columns(breakdown), extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        self.trackers = Trackers([], output) if trackers is None else trackers
        self._drawn = time.monotonic()

    def write(self, rows: list[dict]) -> None:
        """Append rows to the CSV file, and the last of them to the trackers."""
        with open(self.path, "a", newline="") as stream:
            csv.DictWriter(stream, columns(self.breakdown)).writerows(rows)
        for row in rows:
            keys = [HELD_OUT] if row.get(HELD_OUT) is not None else []
            if row is rows[-1]:
                keys += ["loss", "lr", "grad_norm", *THROUGHPUT]
            if keys:
                self.trackers.log({f"train/{key}": float(row[key]) for key in keys}, row["step"])

    def close(self) -> None:
        """End the trackers."""
        self.trackers.close()

    def curves(self, last: bool) -> None:
        """Draw the curves, unless they were drawn in the past `REDRAW_SECONDS`; `last`: draw them in any case."""
        now = time.monotonic()
        if last or now - self._drawn >= REDRAW_SECONDS:
            plot_curves(self.path, self.output / "training_curves.png", self.breakdown)
            self._drawn = now


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Read the rows of a training_metrics.csv; none if there is no such file.

    Rows that a crash or a power cut damaged are left out: the file is a record, and no run depends on it.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().decode(errors="replace").splitlines()
    rows = csv.DictReader(line for line in lines if "\0" not in line and len(line) < 4096)
    return [row for row in rows if _is_whole(row)]


def _is_whole(row: dict) -> bool:
    """Whether a row has a step and a number in each of its columns."""
    try:
        for value in row.values():
            float(value or "nan")
        return int(row["step"]) > 0
    except (KeyError, TypeError, ValueError):
        return False


def plot_curves(metrics: Path, picture: Path, breakdown: Breakdown = LEVELS) -> None:
    """Draw the loss and its parts, learning rate, gradient norm and throughput over steps, smoothed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(metrics)
    if not rows:
        return
    values = {key: np.array([float(row.get(key) or "nan") for row in rows]) for key in columns(breakdown)}
    steps = values["step"]
    figure, axes = plt.subplots(2, 3, figsize=(15, 7), layout="constrained")
    (loss, rate, work), (norm, speed, waiting) = axes
    width = max(1, len(steps) // 60)
    loss.plot(steps, values["loss"], color="0.85", lw=0.5)
    loss.plot(*_smooth(steps, values["loss"], width), color="black", label="all")
    for column, label in zip(breakdown.columns, breakdown.labels, strict=True):
        loss.plot(*_smooth(steps, values[column], width), label=label)
    if breakdown.held_out:
        have = np.isfinite(values[HELD_OUT])
        loss.plot(steps[have], values[HELD_OUT][have], "o-", color="tab:red", ms=3, label="held out, averaged weights")
    finite = values["loss"][np.isfinite(values["loss"])]
    if len(finite):
        loss.set_ylim(0, 1.2 * np.quantile(finite, 0.99))  # a few spikes must not flatten the rest
    loss.legend(fontsize=8)
    for axis, key, title in (
        (rate, "lr", "learning rate"),
        (norm, "grad_norm", "gradient norm"),
        (speed, "clips_per_second", "clips per second"),
        (work, "tflops", "Tflop/s"),
        (waiting, "waiting", "share of the time spent waiting for data"),
    ):
        smooth = (steps, values[key]) if key == "lr" else _smooth(steps, values[key], width)
        axis.plot(*smooth, color="black")
        axis.set_title(title)
    norm.set_yscale("log")
    loss.set_title(breakdown.title)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    with atomic_write(picture) as tmp:
        figure.savefig(tmp, dpi=110, format="png")
    plt.close(figure)


def _smooth(x: np.ndarray, y: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over windows of `width` values; values that are not finite are left out."""
    have = np.isfinite(y)
    x, y = x[have], y[have]
    if len(y) < 2 * width or width < 2:
        return x, y
    kernel = np.ones(width) / width
    return np.convolve(x, kernel, "valid"), np.convolve(y, kernel, "valid")

"""What a run writes down as it goes: a row a step, curves that a person can read, tensorboard if it is there."""

import csv
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BINS = 4  # loss by noise level: [0, 1/4), [1/4, 1/2), ...
COLUMNS = ["step", "loss", *(f"loss_level_{i}" for i in range(BINS)), "lr", "grad_norm", "clips_per_second", "skipped"]


def level_sums(losses: Tensor, levels: Tensor) -> Tensor:
    """(2, BINS): sums of losses and counts by noise level."""
    which = (levels * BINS).long().clamp(0, BINS - 1)
    sums = torch.zeros(2, BINS, device=losses.device)
    sums[0].index_add_(0, which, losses.detach().float())
    sums[1].index_add_(0, which, torch.ones_like(losses, dtype=torch.float32))
    return sums


class MetricsLogger:
    """training_metrics.csv and training_curves.png in a run's output folder."""

    def __init__(self, output: Path, start_step: int):
        self.path, self.output = output / "training_metrics.csv", output
        kept = [row for row in read_metrics(self.path) if int(row["step"]) <= start_step]
        beside = self.path.with_name(f".{os.getpid()}-{self.path.name}")
        with open(beside, "w", newline="") as stream:  # rows after the checkpoint come again
            writer = csv.DictWriter(stream, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)
        os.replace(beside, self.path)
        self._board = _tensorboard(output)

    def write(self, rows: list[dict]) -> None:
        with open(self.path, "a", newline="") as stream:
            csv.DictWriter(stream, COLUMNS).writerows(rows)
        if self._board is not None and rows:
            for key in ("loss", "lr", "grad_norm", "clips_per_second"):
                self._board.add_scalar(f"train/{key}", float(rows[-1][key]), rows[-1]["step"])

    def curves(self) -> None:
        plot_curves(self.path, self.output / "training_curves.png")


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Rows of a training_metrics.csv; none if there is no such file."""
    if not path.is_file():
        return []
    with open(path, newline="") as stream:
        return [row for row in csv.DictReader(stream) if row["step"] and row["skipped"] is not None]


def _tensorboard(output: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # an extra
        return None
    return SummaryWriter(str(output / "tensorboard"))


def plot_curves(metrics: Path, picture: Path) -> None:
    """Loss by noise level, learning rate, gradient norm and throughput, smoothed, over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(metrics)
    if not rows:
        return
    values = {key: np.array([float(row[key] or "nan") for row in rows]) for key in COLUMNS}
    steps = values["step"]
    figure, ((loss, rate), (norm, speed)) = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    width = max(1, len(steps) // 60)
    loss.plot(steps, values["loss"], color="0.85", lw=0.5)
    loss.plot(*_smooth(steps, values["loss"], width), color="black", label="all")
    for i in range(BINS):
        loss.plot(*_smooth(steps, values[f"loss_level_{i}"], width), label=f"level {i / BINS:.2f}-{(i + 1) / BINS:.2f}")
    finite = values["loss"][np.isfinite(values["loss"])]
    if len(finite):
        loss.set_ylim(0, 1.2 * np.quantile(finite, 0.99))
    loss.legend(fontsize=8)
    for axis, key, title in (
        (rate, "lr", "learning rate"),
        (norm, "grad_norm", "gradient norm"),
        (speed, "clips_per_second", "clips per second"),
    ):
        smooth = (steps, values[key]) if key == "lr" else _smooth(steps, values[key], width)
        axis.plot(*smooth, color="black")
        axis.set_title(title)
    norm.set_yscale("log")
    loss.set_title("loss by noise level (1 = noise)")
    for axis in (loss, rate, norm, speed):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    beside = picture.with_name(f".{os.getpid()}-{picture.name}")
    figure.savefig(beside, dpi=110, format="png")
    plt.close(figure)
    os.replace(beside, picture)


def _smooth(x: np.ndarray, y: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over windows, gaps left out."""
    have = np.isfinite(y)
    x, y = x[have], y[have]
    if len(y) < 2 * width or width < 2:
        return x, y
    kernel = np.ones(width) / width
    return np.convolve(x, kernel, "valid"), np.convolve(y, kernel, "valid")

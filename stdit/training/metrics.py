"""Metrics of a run: a CSV file with one row per step, a picture of the curves, previews, and the trackers of the run."""

import csv
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from stdit.files import atomic_write
from stdit.legacy import aliases
from stdit.training.background import BackgroundWriter
from stdit.training.curves import Curves, draw_curves
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


class StepMetrics(NamedTuple):
    """The metrics of one optimizer step, still on the device.

    loss: the part of this process. sums: (2, n) sums and counts for the n columns of the breakdown. held_out: the loss on
    held-out clips, if it was measured after this step.
    """

    step: int
    loss: Tensor
    sums: Tensor
    lr: float
    grad_norm: Tensor
    skipped: int
    held_out: float | None = None


def rows_of(
    metrics: Sequence[StepMetrics], breakdown: Breakdown, rates: Mapping[str, float], accelerator: Accelerator
) -> list[dict[str, Any]]:
    """Rows of the CSV file, with losses averaged over processes, which must all call it. rates: columns of all these steps."""
    totals = accelerator.reduce(torch.stack([m.loss for m in metrics]), "mean").tolist()
    sums = accelerator.reduce(torch.stack([m.sums for m in metrics]), "sum")
    means = (sums[:, 0] / sums[:, 1]).tolist()  # nan where no clip counted
    return [
        {
            "step": m.step, "loss": total, "lr": m.lr, "grad_norm": float(m.grad_norm), "skipped": m.skipped,
            **rates, **dict(zip(breakdown.columns, values, strict=True)),
            **({HELD_OUT: m.held_out} if breakdown.held_out else {}),
        }
        for m, total, values in zip(metrics, totals, means, strict=True)
    ]  # fmt: skip


class MetricsLogger:
    """Writes training_metrics.csv, training_curves.png and previews of a run, and passes numbers on to trackers.

    Rows after `start_step` are removed, since those steps are taken again. Drawings and previews are written in a thread.
    """

    def __init__(self, output: Path, start_step: int, breakdown: Breakdown = LEVELS, trackers: Trackers | None = None):
        self.path, self.output, self.breakdown = output / "training_metrics.csv", output, breakdown
        names = columns(breakdown)
        self._curves = Curves(names)
        with atomic_write(self.path) as tmp, open(tmp, "w", newline="") as stream:
            writer = csv.DictWriter(stream, names, extrasaction="ignore")
            writer.writeheader()
            for row in _rows_in(self.path):
                if int(row["step"]) <= start_step:
                    writer.writerow(row)
                    self._curves.add(row)
        self.trackers = Trackers([], output) if trackers is None else trackers
        self._writer = BackgroundWriter()
        self._drawn = time.monotonic()

    def write(self, rows: list[dict]) -> None:
        """Append rows to the CSV file, and the last of them to the trackers."""
        with open(self.path, "a", newline="") as stream:
            csv.DictWriter(stream, columns(self.breakdown)).writerows(rows)
        for row in rows:
            self._curves.add(row)
            keys = [HELD_OUT] if row.get(HELD_OUT) is not None else []
            if row is rows[-1]:
                keys += ["loss", "lr", "grad_norm", *THROUGHPUT]
            if keys:
                self.trackers.log({f"train/{key}": float(row[key]) for key in keys}, row["step"])

    def curves(self, last: bool) -> None:
        """Draw the curves, unless they were drawn in the past `REDRAW_SECONDS`; `last`: draw them in any case."""
        now = time.monotonic()
        if last or now - self._drawn >= REDRAW_SECONDS:
            values, picture, breakdown = self._curves.values(), self.output / "training_curves.png", self.breakdown
            parts = dict(zip(breakdown.columns, breakdown.labels, strict=True))
            held_out = HELD_OUT if breakdown.held_out else None
            self._writer.run(
                "the picture of the curves",
                lambda: draw_curves(values, picture, breakdown.title, parts=parts, held_out=held_out),
            )
            self._drawn = now

    def show(self, step: int, write: Callable[[], Mapping[str, Path]]) -> None:
        """Write the previews of a step, and show them in the trackers. write: writes them -> files by name."""
        self._writer.run(f"the preview of step {step}", lambda: self.trackers.show(write(), step))

    def close(self) -> None:
        """Wait for what is being written, and end the trackers."""
        self._writer.close()
        self.trackers.close()


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Read the rows of a training_metrics.csv; none if there is no such file.

    Rows that a crash or a power cut damaged are left out: the file is a record, and no run depends on it.
    """
    return list(_rows_in(path))


def _rows_in(path: Path) -> Iterator[dict[str, str]]:
    """The rows that `read_metrics` gives, one after another, since a long run has many."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as lines:
        rows = csv.DictReader(line for line in lines if "\0" not in line and len(line) < 4096)
        yield from (row for row in rows if _is_whole(row))


def _is_whole(row: dict) -> bool:
    """Whether a row has a step and a number in each of its columns."""
    try:
        for value in row.values():
            float(value or "nan")
        return int(row["step"]) > 0
    except (KeyError, TypeError, ValueError):
        return False

"""Plot several runs in one picture: loss against minutes of training, and the samples of each run.

stdit plot-runs output/scratch output/inflated --output docs/inflation.png
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from stdit.data.pictures import read_picture
from stdit.recipes.entry import command, command_parser

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def minutes_and_loss(run: Path, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Minutes since the start, computed from clips per second, and the loss averaged over `window` steps."""
    path = run / "training_metrics.csv"
    if not path.is_file():
        raise ValueError(
            f"{str(run)!r} has no training_metrics.csv, so it is not the folder of a run; give one such as output/quickstart."
        )
    with open(path, newline="") as stream:
        rows = list(csv.DictReader(stream))
    loss = np.array([float(row["loss"]) for row in rows])
    seconds = _batch_size(run) / np.array([float(row["clips_per_second"]) for row in rows])
    size = min(window, len(loss))
    smooth = np.convolve(loss, np.ones(size) / size, mode="valid")
    return seconds.cumsum()[size - 1 :] / 60, smooth


def _batch_size(run: Path) -> int:
    from omegaconf import OmegaConf

    return OmegaConf.load(run / "config.yaml").train.batch_size


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Plot the curves and the samples of all runs."""
    parser = command_parser("plot-runs", __doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--window", type=int, default=100, help="steps to average over")
    args = parser.parse_args(argv)
    sheets = [run / "samples" / "contact_sheet.png" for run in args.runs]
    pictures = [read_picture(sheet) if sheet.is_file() else None for sheet in sheets]
    shown = [i for i, picture in enumerate(pictures) if picture is not None]
    figure = plt.figure(figsize=(10, 4 + (7 if shown else 0)), layout="constrained")
    grid = figure.add_gridspec(2 if shown else 1, max(1, len(shown)), height_ratios=[4, 7] if shown else [1])
    curves = figure.add_subplot(grid[0, :])
    for run in args.runs:
        curves.plot(*minutes_and_loss(run, args.window), label=run.name)
    curves.set(xlabel="minutes of training", ylabel=f"loss, mean of {args.window} steps", yscale="log")
    curves.grid(alpha=0.3, which="both")
    curves.legend()
    for place, i in enumerate(shown):
        axis = figure.add_subplot(grid[1, place])
        axis.imshow(pictures[i])
        axis.set_title(args.runs[i].name)
        axis.axis("off")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=90)
    print(args.output)
    return 0

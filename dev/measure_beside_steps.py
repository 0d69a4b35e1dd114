"""Measure what a training step no longer waits for: noise of long clips, and the curves of long runs.

python dev/measure_beside_steps.py [--rows 400000]

It prints the time to draw the noise of one clip of 129 frames of 720p (16 channels, strides of 4 and 8), and how long a step of a
second waits for it when it is drawn ahead; then, for a run of so many steps, how long its csv is read when the run goes on, how
long the loop takes to hand over a drawing, and how long the drawing takes beside it.
"""

import argparse
import csv
import tempfile
import time
from pathlib import Path

from stdit.rng import keyed_normal
from stdit.training.metrics import LEVELS, MetricsLogger, columns
from stdit.training.noise import Draw, NoiseAhead

SHAPE = (16, 33, 90, 160)


def timed(work) -> float:
    """The seconds that a function takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure_noise() -> None:
    """Draw noise in place, and a batch ahead of steps of a second that compute nothing."""
    alone = min(timed(lambda step=step: keyed_normal("noise", [(0, step, 0)], SHAPE)) for step in range(3))
    ahead, waits = NoiseAhead(), []
    keys = ([(0, step, 0)] for step in range(10))
    for batch in ahead.batches(keys, 4, lambda batch: [Draw("noise", tuple(batch), SHAPE)]):
        waits.append(timed(lambda batch=batch: ahead("noise", batch, SHAPE)))
        time.sleep(1.0)
    print(f"noise of a clip: {1e3 * alone:.0f} ms; drawn ahead, a step waits {1e3 * max(waits[1:]):.2f} ms for it")


def measure_curves(rows: int) -> None:
    """Read the csv of a long run, and draw its curves."""
    with tempfile.TemporaryDirectory() as folder:
        with open(Path(folder) / "training_metrics.csv", "w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(names := columns(LEVELS))
            writer.writerows([step, *(1.0 / step + i for i in range(len(names) - 1))] for step in range(1, rows + 1))
        loggers: list[MetricsLogger] = []
        read = timed(lambda: loggers.append(MetricsLogger(Path(folder), rows)))
        handed = timed(lambda: loggers[0].curves(last=True))
        drawn = timed(loggers[0].close)
        print(
            f"{rows} steps: csv read in {read:.1f} s, drawing handed over in {1e3 * handed:.2f} ms, drawn in {drawn:.2f} s"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000)
    arguments = parser.parse_args()
    measure_noise()
    measure_curves(arguments.rows)

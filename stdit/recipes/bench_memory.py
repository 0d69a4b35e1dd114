"""Compare the planned peak of memory with the peak of real training runs on this CPU.

stdit bench-memory            (about three minutes; run it on an idle machine)
"""

import contextlib
import gc
import io
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stdit.data.loader import Batch
from stdit.recipes import cache_latents, make_shapes, plan, train
from stdit.recipes.entry import child_environment, command, command_parser
from stdit.training.fit import Trainer

GIB = 2**30
BASE = """
name: memory
data: {root: latents, source: latents, num_frames: 17, height: 128, width: 128, workers: 0}
model: {size: S/2, axes: [spatial, temporal]}
train: {steps: 2, batch_size: 8, samples: 0, checkpoint_every: 1000, precision: fp32}
"""
CASES = {
    "S/2, factorized, fp32, 8 clips": ["train.batch_size=8"],
    "S/2, factorized, bf16, 24 clips": ["train.precision=bf16", "train.batch_size=24"],
    "B/2, checkpointed, bf16, 48 clips": ["model.size=B/2", "model.gradient_checkpointing=true", "train.precision=bf16", "train.batch_size=48"],
    "256 x 8, joint, Muon, fp32, 32 clips": ["model.depth=8", "model.hidden_size=256", "model.num_heads=4", "model.axes=[joint]", "train.optimizer=muon", "train.batch_size=32"],
    "L/4, factorized, fp32, 2 clips": ["model.size=L/4", "train.batch_size=2"],
}  # fmt: skip


def measured(overrides: list[str]) -> float:
    """The peak of memory in the loop of a training run, with its model and EMA weights, in bytes."""
    command = [sys.executable, "-m", "stdit", "bench-memory", "--one", *overrides, "train.resume=never"]
    # glibc keeps freed blocks on its heap (2.4 to 3.0 GiB with 1.2 GiB in use); this makes it return large ones.
    environment = {**child_environment(), "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise ValueError(f"the run {overrides} failed: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.split("HELD")[1].split()[0])


def status(field: str) -> float:
    """Read VmRSS or VmHWM of this process, in bytes (Linux only)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * float(next(line for line in lines if line.startswith(field)).split()[1])


def one(overrides: list[str]) -> int:
    """Train one run, and print the peak of resident memory of its loop."""
    fit = Trainer.fit

    def watched(self: Trainer, batches: Iterator[Batch], *rest: Any) -> None:
        there = 8.0 * sum(p.numel() for p in self.model.parameters())  # model and EMA weights exist before the loop
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = status("VmRSS")
        fit(self, batches, *rest)
        print("HELD", status("VmHWM") - before + there, flush=True)

    Trainer.fit = watched  # type: ignore[method-assign, assignment]
    return train.main(["memory.yaml", *overrides])


def planned(overrides: list[str]) -> float:
    """The peak that `stdit plan` prints for the same run, in bytes."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        plan.main(["memory.yaml", *overrides, "--gpu", "cpu"])
    line = next(line for line in printed.getvalue().splitlines() if line.strip().startswith("peak"))
    return float(line.split()[1]) * GIB


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Compare every case; exit code 1 if a plan is off by more than a fifth."""
    parser = command_parser("bench-memory", __doc__)
    parser.add_argument(
        "--one", nargs="+", metavar="key=value", help="measure one run, in a folder that has memory.yaml"
    )
    args = parser.parse_args(argv)
    if args.one:
        return one(args.one)
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("memory.yaml").write_text(BASE)
        quiet = io.StringIO()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            make_shapes.main(["--output", "shapes", "--num-clips", "48", "--size", "128"])
            source = ["data.root=shapes", "data.manifest=shapes/manifest.jsonl", "data.source=videos"]
            cache_latents.main(["memory.yaml", *source, "--output", "latents"])
        for name, overrides in CASES.items():
            real, plan = measured(overrides), planned(overrides)
            worst = max(worst, abs(plan / real - 1))
            print(
                f"{name:<38} measured {real / GIB:6.2f} GiB   planned {plan / GIB:6.2f} GiB   {plan / real - 1:+.1%}",
                flush=True,
            )
    print(f"largest difference {worst:.1%}")
    return 0 if worst <= 0.2 else 1

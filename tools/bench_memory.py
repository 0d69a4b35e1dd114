"""The planned peak of memory against the peak of real training runs on this CPU.

python tools/bench_memory.py            (about three minutes; run it on a machine with nothing else to do)
"""

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import cache_latents
import make_shapes
import plan

GIB = 2**30
TRAIN = Path(__file__).with_name("train.py").resolve()
BASE = """
name: memory
data: {root: latents, source: latents, num_frames: 17, height: 128, width: 128, workers: 0}
model: {size: S/2, axes: [spatial, temporal]}
train: {steps: 3, batch_size: 8, samples: 0, checkpoint_every: 1000, precision: fp32}
"""
SMALLEST = ["model.depth=1", "model.hidden_size=32", "model.num_heads=2", "train.batch_size=1"]
CASES = {
    "S/2, factorized, fp32, 8 clips": [],
    "S/2, factorized, bf16, 24 clips": ["train.precision=bf16", "train.batch_size=24"],
    "B/2, checkpointed, bf16, 48 clips": ["model.size=B/2", "model.gradient_checkpointing=true", "train.precision=bf16", "train.batch_size=48"],
    "256 x 8, joint, Muon, fp32, 32 clips": ["model.depth=8", "model.hidden_size=256", "model.num_heads=4", "model.axes=[joint]", "train.optimizer=muon", "train.batch_size=32"],
    "L/4, factorized, fp32, 2 clips": ["model.size=L/4", "train.batch_size=2"],
}  # fmt: skip


def measured(overrides: list[str]) -> float:
    """The peak of resident memory of a training run, in bytes."""
    command = [sys.executable, str(TRAIN), "memory.yaml", *overrides, "train.resume=never"]
    with open("log.txt", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise ValueError(f"the run {overrides} failed: {Path('log.txt').read_text().splitlines()[-1]}")
    return usage.ru_maxrss * 1024.0


def planned(overrides: list[str]) -> float:
    """`plan.py`'s figure for the same run, in bytes."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        plan.main(["memory.yaml", *overrides, "--gpu", "cpu"])
    line = next(line for line in said.getvalue().splitlines() if line.strip().startswith("peak"))
    return float(line.split()[1]) * GIB


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("memory.yaml").write_text(BASE)
        quiet = io.StringIO()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            make_shapes.main(["--output", "shapes", "--num-clips", "48", "--size", "128"])
            source = ["data.root=shapes", "data.manifest=shapes/manifest.jsonl", "data.source=videos"]
            cache_latents.main(["memory.yaml", *source, "--output", "latents"])
        nothing, plan_of_nothing = measured(SMALLEST), planned(SMALLEST)
        print(f"the program itself: {nothing / GIB:.2f} GiB (subtracted)")
        for name, overrides in CASES.items():
            seen, said = measured(overrides) - nothing + plan_of_nothing, planned(overrides)
            worst = max(worst, abs(said / seen - 1))
            print(
                f"{name:<38} measured {seen / GIB:6.2f} GiB   planned {said / GIB:6.2f} GiB   {said / seen - 1:+.1%}",
                flush=True,
            )
    print(f"largest difference {worst:.1%}")
    return 0 if worst <= 0.2 else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(str(error))

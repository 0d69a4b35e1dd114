"""Train tiny models for ten steps and record losses and sample statistics, to compare the code before and after a refactor.

    python tests/golden/record.py            print the differences from the recorded numbers
    python tests/golden/record.py --write    record again; the commit must say which number changed, and why

Float32, AdamW and one thread; latents come from a file, so no VAE is in the loop. The run with Muon has its own
tolerance, because its iteration runs in bfloat16.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "tools"))

NUMBERS = HERE / "numbers.json"
DATA = {"data.source": "latents", "data.root": "latents", "data.workers": 0, "data.num_frames": 17}
SMALL = {
    "model.depth": 3, "model.hidden_size": 32, "model.num_heads": 2, "train.batch_size": 4, "train.warmup_steps": 2,
    "train.steps": 10, "train.decay_steps": 20, "train.optimizer": "adamw", "train.lr": 2e-3, "train.precision": "fp32",
    "train.checkpoint_every": 100, "train.preview_every": 100, "train.log_every": 5, "train.samples": 2,
    "train.sample_steps": 3, "train.ema_decay": 0.9, "objective.sampling_shift": None, **DATA,
}  # fmt: skip
# Name -> the config and its changes.
RUNS: dict[str, tuple[str, dict]] = yaml.safe_load((HERE / "runs.yaml").read_text())


def machine() -> str:
    """What determines the last bits of results: processor flags, torch's version and its CPU capability."""
    flags = next((line for line in _cpuinfo() if line.startswith("flags")), "")
    name = next((line for line in _cpuinfo() if line.startswith("model name")), "")
    digest = hashlib.sha256((name + " ".join(sorted(flags.split()))).encode()).hexdigest()[:12]
    return f"{digest}-{torch.__version__}-{torch.backends.cpu.get_cpu_capability()}"


def recorded_here() -> bool:
    """Whether the numbers were recorded on a machine like this one, where they must be equal bit for bit."""
    return NUMBERS.is_file() and json.loads(NUMBERS.read_text())["machine"] == machine()


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def run_one(name: str) -> dict:
    """Losses of every step and statistics of two samples of one run, in the current folder."""
    from stdit.recipes import train

    base, changes = RUNS[name]
    overrides = {**SMALL, **changes, "name": name, "text.cache": "captions"}
    config = HERE.parents[1] / "configs" / base
    given = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        code = train.run([str(config), *given])
    if code:
        raise RuntimeError(f"{name}: {errors.getvalue()[-2000:]}")
    with open(Path("output") / name / "training_metrics.csv", newline="") as stream:
        losses = [float(row["loss"]) for row in csv.DictReader(stream)]
    samples = torch.load(Path("output") / name / "generated_samples.pt", weights_only=True).double()
    moments = {
        "mean": samples.mean().item(), "std": samples.std().item(), "motion": samples.diff(dim=2).abs().mean().item(),
        "edges": samples.diff(dim=4).abs().mean().item(),
    }  # fmt: skip
    return {"losses": losses, "samples": moments}


def run_all(names: list[str] | None = None) -> dict[str, dict]:
    """Every run in a scratch folder on one thread."""
    threads, before = torch.get_num_threads(), Path.cwd()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        try:
            shutil.copytree(HERE / "latents", "latents")
            return {name: run_one(name) for name in names or RUNS}
        finally:
            os.chdir(before)
            torch.set_num_threads(threads)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    found = {"machine": machine(), "runs": run_all()}
    if args.write:
        NUMBERS.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    recorded = json.loads(NUMBERS.read_text())
    for name, numbers in found["runs"].items():
        print(f"{name:12} {'equal' if numbers == recorded['runs'].get(name) else 'DIFFERS'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

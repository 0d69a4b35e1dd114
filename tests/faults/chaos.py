"""Train under random faults for a while; the weights must be those of the undisturbed run, bit for bit.

python tests/faults/chaos.py --minutes 30 --seed 0

Faults: kills and signals to the run or its process group, loader processes killed or frozen, a disk on which checkpoints find
no room, a damaged newest checkpoint, a damaged record of metrics. Both runs hold the same broken files.
"""

import argparse
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from stdit.data.video_write import write_video
from stdit.training.state import list_checkpoints, load_checkpoint

ROOT = Path(__file__).resolve().parents[2]

CONFIG = """
name: {name}
data: {{root: clips, source: videos, num_frames: 5, height: 32, width: 32, workers: 2, timeout: 4, max_bad_fraction: 0.5,
       crop: random, flip: true}}
model: {{size: S/2, depth: 2, hidden_size: 32, num_heads: 2, axes: [joint]}}
train: {{steps: {steps}, decay_steps: {steps}, batch_size: 4, optimizer: muon, lr: 1.0e-3, ema_decay: 0.9, precision: fp32,
        checkpoint_every: 25, log_every: 5, preview_every: 1000000, samples: 0}}
"""


def make_clips(folder: Path) -> None:
    """Twelve clips of noise; two of them are broken files."""
    rng = np.random.default_rng(0)
    for i in range(12):
        write_video(folder / f"{i}.mp4", rng.integers(0, 255, (8, 32, 32, 3), np.uint8))
    (folder / "3.mp4").write_bytes(b"not a clip")
    whole = (folder / "8.mp4").read_bytes()
    (folder / "8.mp4").write_bytes(whole[: len(whole) // 2])


def start(name: str, largest_file: int | None = None) -> subprocess.Popen:
    """`stdit train` as a process group of its own. largest_file: bytes that a file may have, as on a disk without room."""

    def limit() -> None:
        if largest_file is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(f"{name}.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "stdit", "train", f"{name}.yaml"], stdout=log, stderr=log, env=environment,
            start_new_session=True, preexec_fn=limit,
        )  # fmt: skip


def loader_processes(run: subprocess.Popen) -> list[int]:
    """The process ids of a run's loader processes."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    try:
        found = [int(child) for child in children.read_text().split()]
        return [pid for pid in found if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    except OSError:
        return []


def damage_newest_checkpoint(name: str) -> None:
    """Flip a byte, unless it is the only checkpoint."""
    found = list_checkpoints(Path("checkpoints") / name)
    if len(found) > 1:
        file = found[0] / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)


def damage_metrics(name: str) -> None:
    """Cut the record in a row and append garbage."""
    file = Path("output") / name / "training_metrics.csv"
    if file.is_file():
        data = file.read_bytes()
        file.write_bytes(data[: int(0.9 * len(data))] + b"\0\0garbage")


def disturb(run: subprocess.Popen, fault: str) -> None:
    """Apply a fault to a run that is under way."""
    if fault in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
        os.kill(run.pid, getattr(signal, fault))
    elif fault == "SIGTERM to the group":
        os.killpg(run.pid, signal.SIGTERM)
    elif fault in ("kill a loader", "freeze a loader"):
        for pid in random.sample(found := loader_processes(run), min(1, len(found))):
            os.kill(pid, signal.SIGKILL if fault == "kill a loader" else signal.SIGSTOP)


FAULTS = (
    "SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGTERM to the group", "kill a loader", "kill a loader",
    "freeze a loader", "no room", "damage the newest checkpoint", "damage the record",
)  # fmt: skip


def chaos(seconds: float, seed: int) -> dict[str, int]:
    """Disturb the run "chaos" in the current folder for some time, then let it finish -> how often each fault was applied."""
    random.seed(seed)
    counts: dict[str, int] = {}
    until = time.monotonic() + seconds
    limit = None
    while True:
        run = start("chaos", limit)
        limit = None
        while run.poll() is None:
            left = until - time.monotonic()
            if left <= 0:
                run.wait()
                break
            try:
                run.wait(min(left, random.uniform(1, 20)))
            except subprocess.TimeoutExpired:
                fault = random.choice(FAULTS)
                counts[fault] = counts.get(fault, 0) + 1
                if fault == "no room":
                    run.kill()
                    run.wait()
                    limit = 20_000
                elif fault.startswith("damage"):
                    run.kill()
                    run.wait()
                    (damage_newest_checkpoint if "checkpoint" in fault else damage_metrics)("chaos")
                else:
                    disturb(run, fault)
        if run.returncode == 0:
            return counts
        if time.monotonic() > until + 600:
            raise SystemExit("the run did not finish; see chaos.log")


def tensors(name: str) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest checkpoint."""
    checkpoint = load_checkpoint(Path("checkpoints") / name)
    assert checkpoint is not None
    files = sorted(checkpoint.path.glob("*.safetensors"))
    return {f"{checkpoint.step}/{file.stem}/{key}": value for file in files for key, value in load_file(file).items()}


def main(argv: list[str] | None = None) -> int:
    """Run both, compare, print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="steps of both runs; default: more than the time allows")
    args = parser.parse_args(argv)
    home = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        os.chdir(folder)
        try:
            Path("clips").mkdir()
            make_clips(Path("clips"))
            # More steps than a disturbed run gets done in the time; it finishes the rest undisturbed.
            steps = args.steps or max(50, int(args.minutes * 60 * 25))
            for name in ("calm", "chaos"):
                Path(f"{name}.yaml").write_text(CONFIG.format(name=name, steps=steps))
            if start("calm").wait() != 0:
                print(Path("calm.log").read_text()[-2000:])
                return 1
            counts = chaos(60 * args.minutes, args.seed)
            calm, disturbed = tensors("calm"), tensors("chaos")
            equal = calm.keys() == disturbed.keys() and all(torch.equal(calm[key], disturbed[key]) for key in calm)
            print(
                f"{'PASS' if equal else 'FAIL'}: {steps} steps, {sum(counts.values())} faults {counts}, weights equal: {equal}"
            )
            if not equal:
                Path(home, "chaos.log").write_bytes(Path("chaos.log").read_bytes())
            return 0 if equal else 1
        finally:
            os.chdir(home)


if __name__ == "__main__":
    sys.exit(main())

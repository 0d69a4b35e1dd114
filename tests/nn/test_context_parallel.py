"""A model whose clips' frames are shared by two processes (gloo) is the model of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("context_parallel_run.py")


@pytest.fixture(scope="module")
def lines():
    """What two processes say of every case: its name and the largest differences of output and gradients."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    "case",
    ["joint", "factorized", "factorized of three heads", "rope", "causal", "window", "teacher forcing", "levels per patch",
     "captions", "checkpointing", "selective checkpointing"],
)  # fmt: skip
def test_output_and_gradients_are_those_of_one_process(lines, case):
    output, gradient = map(float, lines[case].split())
    assert output < 1e-5 and gradient < 1e-5


def test_samples_are_those_of_one_process(lines):
    assert float(lines["sample"]) < 1e-4


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("frames", "5 latent frames cannot be shared by 2 processes; use 4, or"),
        ("heads", "3 heads cannot be shared by 2 processes; use a context that divides num_heads"),
        ("in-context", "context parallelism needs trunk=stack or long_skip"),
        ("stream", "a stream makes frame after frame"),
    ],
)
def test_what_cannot_be_shared_is_refused_in_one_line(lines, case, message):
    assert message in lines[case]

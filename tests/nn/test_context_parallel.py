"""A model whose clips' frames are shared by two processes (gloo) is the model of one process."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stdit.nn import ring_attention
from stdit.nn.context_parallel import sent_by_attention
from stdit.nn.ring_attention import RING_KERNELS, attend_in_ring, torch_ring

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("context_parallel_run.py")


@pytest.fixture(scope="module")
def lines():
    """What two processes say of every case: its name and the largest differences of output and gradients."""
    return said_by("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(SCRIPT))


def said_by(*arguments):
    """The lines of a command of Python, by their names."""
    command = [sys.executable, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    "case",
    ["joint", "factorized", "factorized of three heads", "rope", "causal", "window", "teacher forcing", "levels per patch",
     "captions", "checkpointing", "selective checkpointing", "ring", "ring of three heads", "ring, factorized",
     "ring, levels per patch", "ring, captions", "ring, checkpointing", "ring, selective checkpointing"],
)  # fmt: skip
def test_output_and_gradients_are_those_of_one_process(lines, case):
    output, gradient = map(float, lines[case].split())
    assert output < 1e-5 and gradient < 1e-5


@pytest.mark.parametrize("case", ["sample", "ring, sample"])
def test_samples_are_those_of_one_process(lines, case):
    assert float(lines[case]) < 1e-4


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("frames", "5 latent frames cannot be shared by 2 processes; use 4, or"),
        ("heads", "3 heads cannot be shared by 2 processes; use train.parallel.ring=2"),
        ("ring, division", "2 processes cannot be divided into groups of 2 with rings of 3"),
        ("ring, causal", "ring=2 does not go with causal=true: ring attention takes no masks"),
        ("in-context", "context parallelism needs trunk=stack or long_skip"),
        ("stream", "a stream makes frame after frame"),
    ],
)
def test_what_cannot_be_shared_is_refused_in_one_line(lines, case, message):
    assert message in lines[case]


@pytest.fixture(scope="module")
def pairs():
    """What four processes say that form rings and share heads in pairs."""
    return said_by(str(SCRIPT.with_name("ring_of_pairs_run.py")))


def test_a_ring_of_processes_that_share_heads_in_pairs_has_output_and_gradients_of_one(pairs):
    output, gradient = map(float, pairs["pairs"].split())
    assert output < 1e-5 and gradient < 1e-5
    rings, pairs = zip(*ast.literal_eval(pairs["groups"]), strict=True)
    assert rings == ([0, 2], [1, 3], [0, 2], [1, 3]) and pairs == ([0, 1], [0, 1], [2, 3], [2, 3])


def test_a_plan_counts_the_bytes_that_four_processes_send(pairs):
    assert float(pairs["sent"]) == sent_by_attention(4, 2, forwards=1, size=4)


@pytest.mark.parametrize("device", list(RING_KERNELS))
def test_the_kernels_of_a_ring_take_what_the_ring_passes_on(device):
    forward, backward, further = RING_KERNELS[device]
    x = torch.empty(2, 3, 40, 8, dtype=torch.bfloat16, device="meta")
    out, sums, *rest = forward(x, x, x, is_causal=False)
    assert out.shape == x.shape and sums.shape == x.shape[:3]
    found = backward(
        grad_out=out, query=x, key=x, value=x, out=out, logsumexp=sums, is_causal=False, dropout_p=0.0,
        **dict(zip(further, rest, strict=False)),
    )  # fmt: skip
    assert [gradient.shape for gradient in found[:3]] == [x.shape] * 3


def test_a_device_or_a_torch_without_ring_attention_is_refused_in_one_line(monkeypatch):
    x = torch.empty(2, 40, 3, 8, device="meta")
    with pytest.raises(ValueError, match="not on meta in 32 bits with heads of 8; use train.precision=bf16"):
        attend_in_ring(x, x, x, None)
    assert [width for width in (64, 60, 512) if ring_attention.has_ring_kernels("cuda", width, in_16_bits=True)] == [64]
    assert not ring_attention.has_ring_kernels("cuda", 64, in_16_bits=False)
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor.experimental._context_parallel._attention", None)
    with pytest.raises(ValueError, match="lacks the ring attention"):
        torch_ring()

"""What keeps a run of several processes going: hangs are named, nothing holds the others, noise is drawn beside the step."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from stdit.data import pictures
from stdit.recipes import train
from stdit.rng import keyed_normal
from stdit.training import noise, parallel, previews
from stdit.training.background import BackgroundWriter
from stdit.training.curves import MOST, Curves
from stdit.training.metrics import LEVELS, MetricsLogger, columns
from stdit.training.noise import Draw, NoiseAhead
from stdit.training.previews import Previews
from stdit.training.signals import Interrupted, StopSignals
from stdit.training.state import load_checkpoint

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
TINY = """
name: t
data: {source: shapes, num_frames: 5, height: 32, width: 32, num_shapes: 24, workers: 0}
model: {size: S/2, depth: 1, hidden_size: 32, num_heads: 2}
train: {steps: 6, batch_size: 4, checkpoint_every: 100, preview_every: 2, samples: 2, sample_steps: 2, precision: fp32}
"""

# Processes of a run, forked: `body(rank)` runs in each, after the imports, which take longest.
FORKED = """
import multiprocessing, os, signal, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from pathlib import Path
from accelerate import PartialState
from stdit.recipes import train
from stdit.training.heartbeats import Heartbeats
from stdit.training.config import ParallelConfig
from stdit.training.parallel import make_mesh

def start(rank, count):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1])
    body(rank)

def run(count):
    processes = [multiprocessing.get_context("fork").Process(target=start, args=(rank, count)) for rank in range(count)]
    for one in processes:
        one.start()
    processes[0].join(60)
    print("exit code", processes[0].exitcode, flush=True)
    for one in processes[1:]:
        one.kill()
"""


def forked(tmp_path: Path, body: str, count: int, free_port: int) -> subprocess.CompletedProcess:
    script = tmp_path / "forked.py"
    script.write_text(f"{FORKED}\n{body}\nrun({count})\n")
    command = [sys.executable, str(script), str(free_port)]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, env=ONE_THREAD, cwd=tmp_path)


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_process_that_hangs_and_one_that_is_gone_are_named_before_the_timeout_by_the_one_that_waits(
    tmp_path, free_port
):
    body = """
def body(rank):
    PartialState(cpu=True, timeout=timedelta(seconds=4))
    began = time.monotonic()
    try:
        with Heartbeats(rank, 3, 4.0) as hearts:
            hearts.mark(7, "reading clips")
            if rank == 1:
                time.sleep(60)
            if rank == 2:
                time.sleep(0.5)
                os.kill(os.getpid(), signal.SIGSTOP)
            hearts.mark(7, "computing a loss")
            while hearts.named is None and time.monotonic() - began < 10:
                time.sleep(0.05)
            print("named after", time.monotonic() - began)
            dist.all_reduce(torch.ones(1))
    except ValueError as error:
        print("raised", error)
"""
    done = forked(tmp_path, body, 3, free_port)
    said = done.stderr.replace("\n", " | ")
    line = next(line for line in done.stderr.splitlines() if line.startswith("Process 1"))
    host = os.uname().nodename
    assert f"on {host}) has been at step 7, reading clips, for" in line and "; process 2 (pid" in line, said
    assert "does not answer, and was at step 7, reading clips; process 0 has waited for" in line
    assert "after 4 s (train.parallel.timeout)." in line
    assert done.stderr.count("Process ") == 1, said  # not by the one that hangs
    assert float(done.stdout.split("named after ")[1].split()[0]) < 4
    assert "raised Process 1 (pid" in done.stdout and "run the same command again to resume" in done.stdout


def test_groups_of_replicas_have_the_timeout_of_the_run(tmp_path, free_port):
    body = """
def body(rank):
    PartialState(cpu=True)
    mesh = make_mesh(ParallelConfig(shard="fsdp", replicas=2, timeout=77), "cpu", 4)
    if not rank:
        for name in mesh.mesh_dim_names:
            group = mesh.get_group(name)
            print(name, dist.get_process_group_ranks(group), group._get_backend(torch.device("cpu")).options._timeout)
    dist.barrier()
"""
    done = forked(tmp_path, body, 4, free_port)
    assert done.stdout.splitlines()[:2] == ["replicate [0, 2] 0:01:17", "shard [0, 1] 0:01:17"], done.stderr[-2000:]


def test_other_processes_go_on_while_the_main_one_writes_the_previews_of_all(tmp_path, free_port):
    (tmp_path / "t.yaml").write_text(TINY)
    body = """
def body(rank):
    real, losses = train.write_previews, train.Trainer.losses

    def slow(*args):
        began = time.monotonic()
        while not Path("went-on").is_file():
            assert time.monotonic() - began < 20
            time.sleep(0.05)
        return real(*args)

    def watched(self, *args):
        if rank == 1 and self.step == 4:  # two steps after the first previews
            Path("went-on").touch()
        return losses(self, *args)

    train.write_previews, train.Trainer.losses = slow, watched
    os._exit(train.run(["t.yaml", "train.trackers=[]"]))
"""
    done = forked(tmp_path, body, 2, free_port)
    assert "exit code 0" in done.stdout and "failed" not in done.stderr, done.stderr[-2000:]
    sheets = sorted(path.name for path in (tmp_path / "output/t/samples").glob("step-*.png"))
    assert sheets == ["step-0000002.png", "step-0000004.png"] and (tmp_path / "output/t/training_curves.png").is_file()


@pytest.mark.slow
def test_a_run_that_waits_for_a_process_that_hangs_ends_in_one_line_and_has_its_checkpoint(tmp_path, free_port):
    (tmp_path / "t.yaml").write_text(TINY)
    body = """
def body(rank):
    encode = train.load_vae

    def load_vae(name):
        vae = encode(name)
        real, calls = vae.encode, []

        def hangs(pixels):
            calls.append(1)
            if rank == 1 and len(calls) == 4:
                time.sleep(100)
            return real(pixels)

        vae.encode = hangs
        return vae

    train.load_vae = load_vae
    sys.exit(train.run(["t.yaml", "train.parallel.timeout=8", "train.checkpoint_every=2", "train.samples=0", "train.preview_every=100"]))
"""
    done = forked(tmp_path, body, 2, free_port)
    lines = [line for line in done.stderr.splitlines() if line.startswith("Process 1")]
    assert len(lines) == 2, done.stderr[-3000:]
    assert "at step 3, computing a loss at training/step.py:" in lines[0] and "given up after 8 s" in lines[0]
    assert lines[1].endswith("It was given up; run the same command again to resume.")
    assert "exit code 1" in done.stdout and "Traceback" not in done.stderr
    assert load_checkpoint(tmp_path / "checkpoints/t").step == 2


def test_a_forked_worker_takes_its_launcher_for_gone_when_it_is_and_not_before():
    script = """
import os, time
from stdit.training.signals import StopSignals

os.environ.update(TORCHELASTIC_RUN_ID="none", RANK="0")
reading, writing = os.pipe()
if os.fork():
    os.read(reading, 1)
    os._exit(0)
signals, deadline = StopSignals(says_so=False), time.monotonic() + 20
print(signals.asked, flush=True)
os.write(writing, b".")
while not signals.asked and time.monotonic() < deadline:
    time.sleep(0.01)
print(signals.asked, flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=ONE_THREAD)
    assert done.stdout.split() == ["False", "True"], done.stderr[-2000:]


def test_a_run_that_a_worker_of_torchrun_starts_without_its_rank_has_no_launcher(monkeypatch):
    monkeypatch.setattr(os, "getppid", lambda: -1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for rank, asked in ((None, False), ("0", True)):
        monkeypatch.delenv("RANK", raising=False) if rank is None else monkeypatch.setenv("RANK", rank)
        assert StopSignals(says_so=False).asked == asked


@pytest.mark.parametrize("caught", [Exception, BaseException])
def test_a_signal_while_a_picture_is_read_ends_the_wait_and_makes_no_file_a_bad_one(tmp_path, monkeypatch, caught):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(pictures, "_check_size", lambda image, path: os.kill(os.getpid(), signal.SIGUSR1))
    with StopSignals(says_so=False) as signals, pytest.raises(Interrupted), signals.ending_waits(), suppress(caught):
        pictures.read_picture(tmp_path / "a.png")  # what it raises is caught, as the loader and some libraries do


def test_noise_is_drawn_a_batch_ahead_and_is_that_of_its_keys(monkeypatch):
    drawn = threading.Event()

    def watched(self):
        assert threading.current_thread().name.startswith("stdit-noise")
        if self.keys[0][1] == 2:
            drawn.set()
        return keyed_normal(*self)

    monkeypatch.setattr(Draw, "__call__", watched)
    ahead = NoiseAhead()
    keys = [[(0, step, slot) for slot in range(2)] for step in range(1, 100)]
    taken = iter(keys)
    for step, one in enumerate(ahead.batches(taken, 3, lambda keys: [Draw("noise", tuple(keys), (4, 3, 2, 2))]), 1):
        assert one == keys[step - 1]
        if step == 1:
            assert drawn.wait(10)  # of the second batch, while the first is in use
        assert torch.equal(ahead("noise", one, (4, 3, 2, 2)), keyed_normal("noise", one, (4, 3, 2, 2)))
    assert step == 3 and next(taken) == keys[3]  # none is read beyond the last step
    monkeypatch.undo()
    assert torch.equal(ahead("noise", keys[5], (1,)), keyed_normal("noise", keys[5], (1,)))  # what was not foreseen


@pytest.mark.parametrize("strategy", ["mixed", "teacher_forcing"])
def test_all_noise_of_a_training_is_drawn_ahead(tmp_path, monkeypatch, strategy):
    threads = []
    real = Draw.__call__
    monkeypatch.setattr(
        noise.Draw, "__call__", lambda self: threads.append(threading.current_thread().name) or real(self)
    )
    monkeypatch.setattr(MetricsLogger, "curves", lambda *args, **options: None)
    monkeypatch.chdir(tmp_path)
    Path("t.yaml").write_text(TINY)
    causal = ["model.causal=true", "model.position_encoding=rope"] if strategy == "teacher_forcing" else []
    given = [f"objective.mask_strategy={strategy}", *causal, "train.steps=3", "train.micro_batch=2", "train.preview_every=100", "train.samples=0"]  # fmt: skip
    assert train.run(["t.yaml", *given]) == 0
    assert len(threads) == 6 * (1 + bool(causal)) and all(name.startswith("stdit-noise") for name in threads)


def test_a_run_goes_on_while_its_previews_are_written(tmp_path, monkeypatch):
    went_on = threading.Event()
    real, step = train.write_previews, train.Trainer.losses

    def slow(shown, folder, number):
        assert went_on.wait(20)
        return real(shown, folder, number)

    def watched(self, *args):
        if self.step == 4:
            went_on.set()
        return step(self, *args)

    monkeypatch.setattr(train, "write_previews", slow)
    monkeypatch.setattr(train.Trainer, "losses", watched)
    monkeypatch.setattr(MetricsLogger, "curves", lambda *args, **options: None)
    monkeypatch.chdir(tmp_path)
    Path("t.yaml").write_text(TINY)
    assert train.run(["t.yaml", "train.samples=1", "train.preview_every=2"]) == 0
    assert sorted(path.name for path in Path("output/t/samples").glob("step-*.png")) == [
        "step-0000002.png",
        "step-0000004.png",
    ]


class _Processes:
    """An accelerator as one of several processes sees it."""

    is_main_process = True

    def __init__(self, index, count):
        self.process_index, self.num_processes = index, count


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_previews_are_shared_out_and_put_together_in_order(monkeypatch, capsys, count):
    sampled = {}
    shown = Previews(3, lambda model, numbers: [f"{model}{number}" for number in numbers], write=lambda parts, step: {})
    for index in range(count):
        own = _Processes(index, count)
        sampled[index] = (shown.sample("clip", shown.numbers(own)) if shown.numbers(own) else [], "")

    def broadcast(sent, from_process):
        sent[0] = sampled[from_process]

    monkeypatch.setattr(previews, "broadcast_object_list", broadcast)
    together = [shown.sample_together(lambda: "clip", 1, _Processes(index, count)) for index in range(count)]
    assert together == [["clip0", "clip1", "clip2"]] * count
    sampled[count // 2] = ([], "no memory")
    if 1 < count <= 3:  # in one process
        assert shown.sample_together(lambda: "clip", 1, _Processes(0, count)) is None
        assert "the preview of step 1 failed (no memory); training goes on" in capsys.readouterr().err


def test_curves_are_means_of_a_bounded_number_of_groups(tmp_path):
    curves = Curves(["step", "loss"])
    rows = 4 * MOST + 3
    for step in range(1, rows + 1):
        curves.add({"step": str(step), "loss": "nan" if step == 1 else 2.0 * step})
    values = curves.values()
    assert len(values["step"]) == rows // 8 + 1 <= MOST
    assert values["step"][:2].tolist() == [4.5, 12.5] and values["step"][-1] == rows - 1
    assert (
        values["loss"][0] == 2 * np.mean(range(2, 9))
        and values["loss"][1:].tolist() == (2 * values["step"][1:]).tolist()
    )


def test_a_drawing_that_fails_is_said_and_the_run_goes_on(tmp_path, capsys):
    logger = MetricsLogger(tmp_path, 0)
    logger.write([{**dict.fromkeys(columns(LEVELS), 1), "step": 1}])
    (tmp_path / "training_curves.png").mkdir()
    (tmp_path / "training_curves.png" / "file").touch()
    logger.curves(last=True)
    logger.close()
    assert "the picture of the curves failed (" in capsys.readouterr().err


def test_a_process_with_another_config_is_named_in_every_process(monkeypatch):
    both = [{"checkpoint": 3, "config": "ab"}, {"checkpoint": 3, "config": "cd"}]
    for own in both:
        monkeypatch.setattr(parallel, "gather_object", lambda found, own=own: both if found == [own] else None)
        with pytest.raises(
            ValueError, match="process 1 has config cd, but process 0 has ab; start all nodes with one command"
        ):
            parallel.check_agreement(SimpleNamespace(num_processes=2), own)
    parallel.check_agreement(SimpleNamespace(num_processes=1), both[0])


def test_what_is_written_in_the_background_is_written_in_order():
    done, go = [], threading.Event()
    writer = BackgroundWriter()
    writer.run("first", lambda: (go.wait(10), done.append(1)))
    writer.run("second", lambda: done.append(2))
    assert writer.is_busy and not done
    go.set()
    writer.close()
    assert done == [1, 2] and not writer.is_busy


def test_shards_with_numbers_that_are_not_finite_are_skipped_for_the_checkpoint_before(tmp_path, capsys):
    for step in (1, 2):
        folder = tmp_path / f"step-{step}"
        folder.mkdir()
        (folder / "info.json").write_text(json.dumps({"step": step}))
        for part in (1, 2):
            value = torch.full((2, 3), float("nan") if step == part == 2 else 1.0)
            file = folder / f"model-0000{part}-of-00002.safetensors"
            save_file({"w": value}, file, metadata={"rows": json.dumps({"w": 2 * part - 2})})
        described = {
            file.name: {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "bytes": file.stat().st_size}
            for file in folder.iterdir()
        }
        (folder / "MANIFEST.json").write_text(json.dumps(described))
    assert load_checkpoint(tmp_path).step == 1
    assert "step-2 is damaged" in capsys.readouterr().err

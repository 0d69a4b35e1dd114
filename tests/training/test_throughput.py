"""What a run says of its speed."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stdit.model.cost import flops_of_config
from stdit.model.stdit import STDiT
from stdit.progress import Progress
from stdit.recipes import train
from stdit.training import throughput
from stdit.training.curves import draw_curves
from stdit.training.throughput import COLUMNS, Throughput, Work, summary

CONFIG = """
name: t
data: {source: shapes, num_frames: 5, height: 32, width: 32, num_shapes: 12, workers: 0}
model: {size: S/2, depth: 1, hidden_size: 32, num_heads: 2}
train: {steps: 4, batch_size: 4, lr: 1.0e-3, log_every: 2, preview_every: 100, samples: 0, precision: fp32}
"""


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    return now


def test_rates_are_those_of_the_steps_since_the_last_call_without_pauses(clock):
    found = Throughput(torch.device("cpu"), 2)
    found.peak = 1.0
    found.add(Work(4, 100, 1e12))
    with found.waiting():
        clock[0] += 1
    clock[0] += 3
    with found.paused():
        clock[0] += 50
    rates = found.rates()
    assert (rates["clips_per_second"], rates["tokens_per_second"], rates["tflops"]) == (1.0, 25.0, 0.25)
    assert (rates["utilisation"], rates["waiting"]) == (0.125, 0.25) and tuple(rates) == COLUMNS
    rates["memory_gb"] = 1.234
    assert summary(rates) == "1 clips/s, 25 tokens/s, 0.25 Tflop/s (12%), 25% waiting, 1.2 GB"
    clock[0] += 1
    assert found.rates()["clips_per_second"] == 0


def test_the_bar_of_a_large_run_says_tokens_and_memory_within_120_columns():
    rates = dict(zip(COLUMNS, (278.0, 71234.0, 185.0, 0.234, 0.0, 79.94), strict=True))
    assert summary(rates) == "278 clips/s, 71.2k tokens/s, 185 Tflop/s (23%), 79.9 GB"
    postfix = f"loss 0.1234, {summary(rates)}"
    bar = Progress.format_meter(20_000, 100_000, 4000.0, ncols=120, unit="step", postfix=postfix)
    assert "79.9 GB" in bar and len(bar) <= 120
    rates |= {"tokens_per_second": 1.25e6, "waiting": 0.05}
    assert "1.25M tokens/s" in summary(rates) and "5% waiting" in summary(rates)
    few = {**rates, "tokens_per_second": 0.0, "tflops": 0.0, "waiting": 0.0, "memory_gb": float("nan")}
    assert summary(few) == "278 clips/s"


@pytest.mark.parametrize(("name", "tflops"), [("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA GeForce RTX 4090", 165.0), ("A card of tomorrow", None)])  # fmt: skip
def test_the_peak_of_a_gpu_is_found_by_its_name(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert throughput.peak_tflops(torch.device("cuda", 0)) == tflops


def test_twice_the_blocks_and_twice_the_frames_take_more_operations():
    def flops(depth, frames):
        model = STDiT(depth=depth, hidden_size=32, num_heads=2, in_channels=4, num_classes=2)
        return flops_of_config(model.config, (frames, 8, 8))

    assert 1.6 < flops(4, 2) / flops(2, 2) < 2 and 1.9 < flops(2, 4) / flops(2, 2) < 2.5


def test_a_run_logs_clips_tokens_operations_waiting_and_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("t.yaml").write_text(CONFIG)
    assert train.run(["t.yaml"]) == 0
    with open("output/t/training_metrics.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    last = {name: float(rows[-1][name]) for name in COLUMNS}
    assert last["tokens_per_second"] == pytest.approx(8 * last["clips_per_second"], rel=0.01)  # 2 x 4 patches of a clip
    assert last["tflops"] > 0 and 0 <= last["waiting"] <= 1 and last["memory_gb"] > 0.05
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shown = events.EventAccumulator("output/t/tensorboard").Reload()
    for name in COLUMNS:  # trackers get the same numbers, of the same step
        event = shown.Scalars(f"train/{name}")[-1]
        assert event.step == 4 and event.value == pytest.approx(last[name], rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("peak", [989.0, None])
def test_curves_show_throughput_and_memory_and_the_share_of_a_peak_that_is_known(tmp_path, monkeypatch, peak):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **k: drawn.append(self) or Path(path).touch())
    names = ["step", "loss", "lr", "grad_norm", *COLUMNS]
    values = {name: np.arange(1.0, 9.0) for name in names}
    values["utilisation"] = values["tflops"] / (peak or np.nan)
    draw_curves(values, tmp_path / "curves.png", "loss", parts={}, held_out=None)
    axes = {axis.get_title(): axis for axis in drawn[0].axes}
    for name in ("clips per second", "tokens per second", "largest memory so far, GB"):
        assert axes[name].lines[0].get_ydata().tolist() == list(range(1, 9))
    work = next(axis for title, axis in axes.items() if title.startswith("Tflop/s"))
    assert ("peak" in work.get_title()) == bool(work.child_axes) == (peak is not None)


def test_a_held_out_loss_that_rises_above_the_loss_stays_in_the_picture(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **k: drawn.append(self) or Path(path).touch())
    values = {name: np.full(400, np.nan) for name in ("lr", "grad_norm", *COLUMNS)}
    values |= {"step": np.arange(400.0), "loss": np.linspace(0.3, 0.05, 400)}
    values["held_out_loss"] = np.append(np.full(399, 0.3), 0.9)  # rises at the end, which a quantile leaves out
    values |= {f"part_{i}": values["loss"] for i in range(4)}
    parts = {f"part_{i}": str(i) for i in range(4)}
    draw_curves(values, tmp_path / "curves.png", "loss", parts=parts, held_out="held_out_loss")
    loss = drawn[0].axes[0]
    assert loss.get_ylim()[1] > 0.85
    colours = [line.get_color() for line in loss.lines]
    assert len(set(colours)) == len(colours)


def test_curves_of_a_run_without_numbers_of_its_speed_are_drawn(tmp_path):
    values = {name: np.full(4, np.nan) for name in ("loss", "lr", "grad_norm", *COLUMNS)}
    draw_curves({**values, "step": np.arange(4.0)}, tmp_path / "c.png", "loss", parts={}, held_out=None)
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_a_profile_is_a_trace_of_the_steps_after_the_warm_up_and_changes_no_step(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.yaml").write_text(CONFIG.replace("steps: 4", "steps: 6"))
    assert train.run(["t.yaml", "name=plain"]) == 0
    assert train.run(["t.yaml", "name=traced", "train.profile=2"]) == 0
    said = capsys.readouterr().out
    assert "output/traced/trace.json: 2 steps" in said and "aten::addmm" in said
    trace = json.loads(Path("output/traced/trace.json").read_text())
    names = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert sorted(name for name in names if name.startswith("ProfilerStep")) == ["ProfilerStep#1", "ProfilerStep#2"]
    assert not Path("output/plain/trace.json").exists() and not list(Path("output/traced").glob(".*trace*"))
    weights = [load_file(f"checkpoints/{name}/step-6/model.safetensors") for name in ("plain", "traced")]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    # A run that goes on traces again, beside the first trace; one without room for a trace says so.
    assert train.run(["t.yaml", "name=traced", "train.profile=20", "train.steps=10"]) == 0
    assert "output/traced/trace-2.json: 1 steps" in capsys.readouterr().out
    assert train.run(["t.yaml", "name=traced", "train.profile=1", "train.steps=12"]) == 0
    assert "no trace, since the run takes 2 more" in capsys.readouterr().out

"""Checks of `stdit gpu-check --section long`: speed and memory of images, of long clips and of their VAE; runs that fit."""

import argparse
import contextlib
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch

from stdit.config import Config, load_typed
from stdit.model.cost import Shape
from stdit.model.stdit import STDiT
from stdit.precision import autocast
from stdit.recipes import train
from stdit.recipes.gpu_models import published_size
from stdit.recipes.gpu_speed import image_batch, step_report
from stdit.recipes.machine import Machine, gib
from stdit.recipes.plan import arguments_of, find_vae, planned
from stdit.recipes.planned import GIB, RESERVED, Choice, find_fit, parse_memory
from stdit.vae import load_vae

_VIDEO = {"in_channels": 16, "num_classes": 12, "learn_sigma": False, "qk_norm": True}
_FACTORIZED = ["spatial", "temporal"]
_CONTEXT = 0.7 * GIB  # of a device, which CUDA itself takes beside what torch allocates


def image_speed(machine: Machine) -> str:
    """The training step of DiT-XL/2 at 256 px, in bfloat16."""
    return step_report(machine, published_size(machine, axes=["spatial"]), image_batch(machine))


def long_clip_speed(machine: Machine) -> str:
    """The training step of a factorized XL/2 on 81 frames of 480 x 832 pixels (a VAE of strides 4 and 8)."""
    arguments = published_size(machine, axes=_FACTORIZED, **_VIDEO)
    clips = (1, machine.pick((21, 60, 104), (3, 8, 8)))
    return step_report(machine, arguments, clips, checkpointing=True)


def joint_clip_speed(machine: Machine) -> str:
    """The same with joint attention."""
    arguments = published_size(machine, axes=["joint"], position_encoding="rope_3d", **_VIDEO)
    clips = (1, machine.pick((21, 60, 104), (3, 8, 8)))
    return step_report(machine, arguments, clips, checkpointing=True)


@torch.no_grad()
def host_keeps_ahead(machine: Machine) -> str:
    """The time in which the host issues a forward pass of a long clip, beside that in which the device computes it."""
    arguments = published_size(machine, axes=["joint"], position_encoding="rope_3d", **_VIDEO)
    latent = machine.pick((21, 60, 104), (3, 8, 8))
    with torch.device(machine.device):
        model = STDiT(**arguments).eval()
    x = torch.randn((1, 16, *latent), device=machine.device)
    t, y = torch.full((1,), 500.0, device=machine.device), torch.zeros(1, dtype=torch.long, device=machine.device)
    issued = []

    def forward() -> None:
        began = time.perf_counter()
        with autocast("bf16", machine.device):
            model(x, t, y)
        issued.append(time.perf_counter() - began)

    whole = machine.seconds(forward, rounds=machine.pick(5, 2))
    host = sorted(issued)[len(issued) // 2]
    assert machine.device.type != "cuda" or host < 0.8 * whole, f"the host takes {host:.3g} of {whole:.3g} s"
    return f"issued in {host:.3g} s, computed in {whole:.3g} s"


def time_grows_with_frames(machine: Machine) -> str:
    """The power of the frames with which a forward and backward pass grows, for factorized, windowed and joint attention."""
    frames, side = machine.pick((16, 64), (2, 4)), machine.pick(32, 8)
    kinds: dict[str, dict] = {
        "factorized": {"axes": _FACTORIZED},
        "window of 4": {"axes": ["joint"], "causal": True, "window": 4, "position_encoding": "rope_3d"},
        "joint": {"axes": ["joint"], "position_encoding": "rope_3d"},
    }
    found = {}
    for name, changes in kinds.items():
        few, many = (_pass_seconds(machine, (count, side, side), changes) for count in frames)
        found[name] = math.log(many / few) / math.log(frames[1] / frames[0])
    if machine.full:
        assert found["factorized"] < found["joint"], found
    return ", ".join(f"{name} {value:.2f}" for name, value in found.items()) + f" ({frames[0]} to {frames[1]} frames)"


def _pass_seconds(machine: Machine, latent: Shape, changes: dict) -> float:
    """Seconds of a forward and backward pass of one clip in bfloat16."""
    size = machine.pick(
        {"depth": 4, "hidden_size": 768, "num_heads": 12}, {"depth": 2, "hidden_size": 32, "num_heads": 2}
    )
    with torch.device(machine.device):
        model = STDiT(**{**size, **_VIDEO, "sample_size": latent, **changes})
    x = torch.randn((1, 16, *latent), device=machine.device)
    t, y = torch.full((1,), 500.0, device=machine.device), torch.zeros(1, dtype=torch.long, device=machine.device)

    def both() -> None:
        with autocast("bf16", machine.device):
            out = model(x, t, y)
        out.float().square().mean().backward()
        model.zero_grad()

    return machine.seconds(both, rounds=machine.pick(5, 1), warmup=machine.pick(2, 1))


@torch.no_grad()
def vae_streams(machine: Machine) -> str:
    """The tiny VAE takes little more memory for a clip of eight times the frames, besides its pixels and latents."""
    vae, side = load_vae("tiny").to(machine.device), machine.pick(256, 32)
    found = []
    for frames in machine.pick((33, 257), (5, 33)):
        pixels = torch.rand((1, 3, frames, side, side), device=machine.device) * 2 - 1
        peaks: list[float | None] = []
        latents = vae.encode(pixels)
        peaks.append(machine.peak(partial(vae.encode, pixels)))
        peaks.append(machine.peak(partial(vae.decode, latents)))
        found.append((pixels.nbytes, peaks))
    (few, before), (many, after) = found
    for a, b in zip(before, after, strict=True):
        if a is not None and b is not None:
            # Decoded pixels, and their clamped copy, grow with the clip; activations must not.
            assert b - a < 3 * (many - few) + 256 * 2**20, f"{gib(b)} where {gib(a)} were expected to do"
    return "; ".join(f"{gib(size)} of pixels: encode {gib(peaks[0])}, decode {gib(peaks[1])}" for size, peaks in found)


def fit_stays_under(machine: Machine) -> str:
    """Training with what `stdit plan --fit` proposes stays below that memory, which the allocator then refuses to exceed."""
    return _fit(machine, machine.pick("24GB", "2GB"))[1]


def host_memory_stays_under(machine: Machine) -> str:
    """The same with so little memory that weights, gradients, averages and moments wait in the host's."""
    choice, said = _fit(machine, machine.pick("7GB", "2GB"))
    assert choice.offload or not machine.full, f"without the host's memory: {said}"
    return said


def _fit(machine: Machine, limit: str) -> tuple[Choice, str]:
    tiny = [
        "model.size=S/2",
        "model.depth=2",
        "model.hidden_size=32",
        "model.num_heads=2",
        "data.height=32",
        "data.width=32",
    ]
    overrides = [
        "data.source=shapes", "data.num_shapes=64", "data.workers=0", "vae.name=tiny", "train.steps=3",
        f"train.batch_size={machine.pick(32, 4)}", "train.micro_batch=null", "train.samples=0", "train.trackers=[]",
        "train.precision=bf16", *machine.pick([], tiny),
    ]  # fmt: skip
    config = load_typed(Config, "video", overrides)
    args = argparse.Namespace(
        gpu="H100",
        count=1,
        utilisation=0.4,
        tflops=None,
        memory=None,
        shard=None,
        context=None,
        ring=None,
        bandwidth=50.0,
        host_bandwidth=25.0,
    )
    vae, room = find_vae("tiny"), parse_memory(limit)
    run, current = planned(args, config, arguments_of(config, vae), vae)
    choice = find_fit(run, current, room, path="video", overrides=overrides)
    assert choice is not None, f"nothing fits into {limit}"
    proposed = choice.overrides(current)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), machine.limited(room - _CONTEXT):
        peak = machine.peak(lambda: _run(["video", *overrides, *proposed]))
    planned_peak = run.need(choice, run.memory(choice)) - RESERVED
    said = f"{' '.join(proposed) or 'as configured'}: planned {planned_peak / GIB:.1f}, measured {gib(peak)} of {limit}"
    return choice, said


def _run(arguments: list[str]) -> None:
    assert train.run(arguments) == 0, "the run failed"


CHECKS: list[Callable[[Machine], str]] = [
    image_speed, long_clip_speed, joint_clip_speed, host_keeps_ahead, time_grows_with_frames, vae_streams, fit_stays_under,
    host_memory_stays_under,
]  # fmt: skip

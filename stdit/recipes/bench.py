"""Measure speed. What is compared runs in turn, and medians are reported.

stdit bench loader --root path/to/clips      the data loader against PyAV alone on the same clips
stdit bench step                             training steps of small models
stdit bench floor                            the quickstart's step against its matrix products alone
stdit bench attention                        explicit attention against the fused kernel
stdit bench windows                          causal windows by chunks against a mask of all tokens, 8 to 128 frames
stdit bench vae                              encoding and decoding by the tiny VAE
stdit bench packing                          clips of many shapes: packed, padded, or in buckets
stdit bench peers --peers FOLDER             DiT, Latte and diffusers beside stdit, training and sampling
stdit bench quickstart --root data/shapes    reading and encoding the quickstart's clips
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import av
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch.utils.flop_counter import FlopCounterMode

from stdit.config import Config, load_typed
from stdit.diffusion.objective import ObjectiveConfig, build_objective
from stdit.model.config import model_arguments
from stdit.model.stdit import STDiT
from stdit.nn.attention import explicit_attention
from stdit.precision import autocast, native_bf16, resolve
from stdit.recipes.bench_data import bench_loader, bench_quickstart
from stdit.recipes.bench_peers import bench_peers
from stdit.recipes.bench_scale import bench_scale
from stdit.recipes.bench_windows import bench_windows
from stdit.recipes.entry import command, command_parser
from stdit.recipes.machine import timed
from stdit.rng import keyed_rng
from stdit.training.allocator import reuse_freed_memory
from stdit.training.optim import build_optimizers
from stdit.training.step import LatentBatch, diffusion_losses
from stdit.vae import load_vae


def bench_step(args: argparse.Namespace) -> None:
    """Measure training steps of a small model for each choice of axes, optimizer and precision."""
    print(
        f"bf16 in hardware: {native_bf16()}; {torch.get_num_threads()} threads; forward + backward + optimizer, median of {args.rounds}"
    )
    objective = build_objective(ObjectiveConfig())
    latents, labels = torch.randn((32, 16, 5, 8, 8)), torch.randint(0, 12, (32,))
    for axes in (["joint"], ["spatial", "temporal"]):
        for optimizer in ("adamw", "muon"):
            for precision in ("fp32", "bf16"):
                model = STDiT(8, 256, 4, in_channels=16, num_classes=12, axes=axes, learn_sigma=False, qk_norm=True)
                optimizers = build_optimizers(model, optimizer, 1e-3)
                seconds = []
                for i in range(args.rounds + 1):
                    began = time.perf_counter()
                    with autocast(precision, "cpu"):
                        losses = diffusion_losses(
                            model,
                            objective,
                            [LatentBatch(latents)],
                            {"label": labels[:, None]},
                            keys=[(0, i, s) for s in range(32)],
                        )
                    losses.clips.mean().backward()
                    for one in optimizers:
                        one.step()
                    model.zero_grad()
                    seconds.append(time.perf_counter() - began)
                print(
                    f"{'+'.join(axes):<17} {optimizer:<6} {precision}: {32 / statistics.median(seconds[1:]):6.1f} clips/s"
                )


def bench_floor(args: argparse.Namespace) -> None:
    """The quickstart's training step against its floor: the time of its operations at the rate of large products."""
    reuse_freed_memory()  # as training does
    config = load_typed(Config, "quickstart")
    precision = resolve(config.train.precision)
    model = STDiT(**{**model_arguments(config.model), "in_channels": 16, "num_classes": 12, "learn_sigma": False})
    optimizers = build_optimizers(model, config.train.optimizer, 1e-3)
    objective, batch = build_objective(config.objective), config.train.batch_size
    latents, labels = torch.randn((batch, 16, 5, 8, 8)), torch.randint(0, 12, (batch, 1))

    def gradient(step: int) -> None:
        keys = [(0, step, slot) for slot in range(batch)]
        clips = [LatentBatch(latents, lambda mask: latents.transpose(1, 2)[mask])]
        with autocast(precision, "cpu"):
            losses = diffusion_losses(model, objective, clips, {"label": labels}, keys=keys, patch=model.patch_size)
        losses.clips.mean().backward()

    def update() -> None:
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    square = torch.randn(1024, 1024).to(dtype)
    counted = []
    for part in (lambda: gradient(0), update):
        with FlopCounterMode(display=False) as counter:
            part()
        counted.append(counter.get_total_flops())
    seconds: dict[str, list[float]] = {"gradient": [], "update": [], "product": []}
    for i in range(args.rounds * 4 + 2):
        seconds["gradient"].append(timed(lambda i=i: gradient(i + 1)))
        seconds["update"].append(timed(update))
        seconds["product"].append(timed(lambda: square @ square))
    medians = {name: statistics.median(values[2:]) for name, values in seconds.items()}
    rate = 2 * 1024**3 / medians["product"]
    print(
        f"{torch.backends.cpu.get_cpu_capability()}, {precision}, {torch.get_num_threads()} threads: products of 1024 x 1024 at {rate / 1e9:.0f} Gflop/s"
    )
    for name, flops in zip(("gradient", "update"), counted, strict=True):
        print(
            f"{name}: {flops / 1e9:.1f} Gflop, floor {1e3 * flops / rate:.0f} ms, measured {1e3 * medians[name]:.0f} ms"
        )
    whole = medians["gradient"] + medians["update"]
    print(f"step: {1e3 * whole:.0f} ms, {sum(counted) / rate / whole:.0%} of the floor's speed")


def bench_attention(args: argparse.Namespace) -> None:
    """Compare explicit attention with the fused kernel, forward and backward, at the lengths of small models."""
    for batch, heads, length, dim in ((32, 2, 80, 64), (160, 2, 16, 64), (512, 2, 5, 64), (2, 6, 512, 64)):
        for dtype in (torch.bfloat16, torch.float32):
            tensors = [torch.randn(batch, length, heads, dim, dtype=dtype, requires_grad=True) for _ in range(3)]
            seconds: dict[str, list[float]] = {"fused": [], "explicit": []}
            for _ in range(args.rounds + 1):
                for name, function in (("fused", dispatch_attention_fn), ("explicit", explicit_attention)):
                    seconds[name].append(timed(lambda f=function, t=tensors: f(*t).sum().backward()))
            fused, explicit = (statistics.median(values[1:]) for values in seconds.values())
            print(
                f"{batch} x {heads} heads x {length} tokens x {dim}, {dtype}: fused {1e3 * fused:.2f} ms, explicit {1e3 * explicit:.2f} ms, ratio {fused / explicit:.1f}"
            )


@torch.no_grad()
def bench_vae(args: argparse.Namespace) -> None:
    """Measure encoding and decoding by the tiny VAE at three sizes."""
    vae = load_vae("tiny")
    for size in (64, 128, 256):
        clip = torch.rand((4, 3, 17, size, size)) * 2 - 1
        with autocast("auto", "cpu"):
            latents = vae.encode(clip)
            encode = statistics.median(timed(lambda clip=clip: vae.encode(clip)) for _ in range(args.rounds))
            decode = statistics.median(timed(lambda latents=latents: vae.decode(latents)) for _ in range(args.rounds))
        print(f"{size:>3} px, 17 frames: encode {4 / encode:6.1f} clips/s, decode {4 / decode:6.1f} clips/s")


Grid = tuple[int, int, int]


def _tokens(grid: Grid) -> int:
    return grid[0] * grid[1] * grid[2] // 4


def _packs(shapes: list[Grid], budget: int) -> list[list[Grid]]:
    packs: list[list[Grid]] = [[]]
    for shape in shapes:
        if sum(map(_tokens, packs[-1])) + _tokens(shape) > budget:
            packs.append([])
        packs[-1].append(shape)
    return packs


def bench_packing(args: argparse.Namespace) -> None:
    """Compare clips of many shapes packed, padded to the largest, and in buckets: tokens per second without padding.

    Forward and backward passes are timed.
    """
    # A mix like that of real folders: images and clips of 1 to 4 seconds, three aspects (latent frames, rows, columns).
    grids = [(t, *space) for t in (1, 3, 5, 9) for space in ((8, 8), (6, 10), (10, 6))]
    shapes = [grids[i] for i in keyed_rng("order", 0).integers(len(grids), size=64)]
    axes = [args.axes] if args.axes else ["spatial", "temporal"]
    model = STDiT(depth=6, hidden_size=192, num_heads=6, in_channels=16, axes=axes)
    largest = tuple(max(shape[i] for shape in shapes) for i in range(3))
    budget = 8 * _tokens(largest)  # tokens per step, the same for all three

    def dense(grid: Grid, count: int) -> None:
        model(torch.randn(count, 16, *grid), torch.full((count,), 500.0)).square().mean().backward()

    def in_one_row(pack: list[Grid]) -> None:
        out = model([torch.randn(16, *grid) for grid in pack], [torch.tensor(500.0)] * len(pack))
        sum(x.square().mean() for x in out).backward()

    steps: dict[str, list[tuple]] = {
        "padded": [(dense, largest, 8)] * (len(shapes) // 8),
        "buckets": [
            (dense, grid, min(budget // _tokens(grid), shapes.count(grid) - first))
            for grid in grids
            for first in range(0, shapes.count(grid), budget // _tokens(grid))
        ],
        "packed": [(in_one_row, pack) for pack in _packs(shapes, budget)],
    }

    def run(name: str) -> None:
        for step, *what in steps[name]:
            step(*what)
            model.zero_grad()

    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name in steps:
            seconds[name].append(timed(lambda name=name: run(name)))
    for name, values in seconds.items():
        ratio = statistics.median(p / v for p, v in zip(seconds["padded"], values, strict=True))
        rate = sum(map(_tokens, shapes)) / statistics.median(values)
        print(f"{name}: {len(steps[name])} steps, {rate:.0f} tokens/s, {ratio:.2f} times padded")


BENCHES = {
    "loader": bench_loader,
    "attention": bench_attention,
    "windows": lambda args: bench_windows(args.rounds),
    "step": bench_step,
    "floor": bench_floor,
    "vae": bench_vae,
    "quickstart": bench_quickstart,
    "packing": bench_packing,
    "peers": lambda args: bench_peers(args.peers, args.rounds),
    "scale": lambda args: bench_scale(args.rows),
}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark."""
    parser = command_parser("bench", __doc__)
    parser.add_argument("what", choices=BENCHES)
    parser.add_argument("--root", default="data/shapes", help="folder of clips")
    parser.add_argument("--rounds", type=int, default=5, help="of every measurement, whose median is printed")
    parser.add_argument("--samples", type=int, default=128, help="clips that the loader reads")
    parser.add_argument(
        "--axes", help="packing: the axis of all blocks, such as joint; default: spatial and temporal in turn"
    )
    parser.add_argument(
        "--peers", type=Path, default=Path("peers"), help="peers: folder with the sources of DiT, Latte and timm"
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="scale: the largest number of rows")
    args = parser.parse_args(argv)
    av.logging.set_level(None)
    BENCHES[args.what](args)
    return 0

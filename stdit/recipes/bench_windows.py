"""How a training step of a windowed causal model grows with the frames (`stdit bench windows`)."""

import math
import statistics
import time

import torch

from stdit.model.stdit import STDiT
from stdit.nn import frame_mask

_FRAMES = (8, 16, 32, 64, 128)
_WHOLE = 1 << 62  # queries of a chunk: all of a clip are one, whose mask is that of all tokens


def bench_windows(rounds: int, patches: int = 8) -> None:
    """Print forward and backward passes of one block in chunks and with a mask of all tokens, in turn."""
    torch.manual_seed(0)
    model = STDiT(depth=1, hidden_size=64, num_heads=2, in_channels=4, causal=True, window=4, position_encoding="rope")
    model.final_layer.linear.weight.data.normal_(std=0.1)
    ways = {"chunks": frame_mask.LEAST_QUERIES, "one mask": _WHOLE}
    found: dict[str, list[float]] = {name: [] for name in ways}
    try:
        for frames in _FRAMES:
            clip, level = torch.randn((1, 4, frames, 2 * patches, 2 * patches)), torch.full((1,), 500.0)
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(rounds + 1):
                for name, least in ways.items():
                    frame_mask.LEAST_QUERIES = least
                    began = time.perf_counter()
                    model(clip, level).square().mean().backward()
                    seconds[name].append(time.perf_counter() - began)
            for name, values in seconds.items():
                found[name].append(statistics.median(values[1:]))
            shown = ", ".join(f"{name} {1e3 * values[-1]:.1f} ms" for name, values in found.items())
            print(f"{frames:>4} latent frames of {patches} x {patches} patches, window 4: {shown}", flush=True)
    finally:
        frame_mask.LEAST_QUERIES = ways["chunks"]
    for name, values in found.items():
        grown = math.log(values[-1] / values[0], _FRAMES[-1] / _FRAMES[0])
        last = math.log(values[-1] / values[-3], 4)
        print(f"{name}: time grows with the frames to the power {grown:.2f}, from {_FRAMES[-3]} frames on {last:.2f}")

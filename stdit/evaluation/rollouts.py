"""Long rollouts of a causal model on moving shapes: what is left of the object, and what a frame costs."""

import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stdit.data.video_write import to_uint8
from stdit.evaluation.operations import EvalResult, HeldOut, Metric, same_object, told
from stdit.evaluation.shapes import measure_shape, wilson


def rollout(pipe: Any, data: HeldOut, known: int, new: int, **options) -> EvalResult:
    """`new` frames after the first `known`: shape and colour in the last 17, motion, time and memory for a frame."""
    seconds, memory, shown = [], [], [data.pixels[:8, :, :known]]
    last_parts: deque[Tensor] = deque(maxlen=5)  # all that is kept: memory is measured too
    every = max(1, new // 4 // 12)
    stream = pipe.stream(data.pixels[:, :, :known], new, **told(pipe, data), **options)
    while True:
        began = time.perf_counter()
        part = next(stream, None)
        if part is None:
            break
        seconds.append((time.perf_counter() - began) / part.shape[2])
        memory.append(_resident())
        last_parts.append(part)
        if len(seconds) % every == 0:
            shown.append(part[:8, :, -1:].clone())  # a view would keep the whole part
    made = torch.cat(list(last_parts), 2)
    tenth = max(1, len(seconds) // 10)
    end = [measure_shape(to_uint8(clip)[-17:]) for clip in made]
    size = made.shape[3]
    right = np.array([same_object(v, t) for v, t in zip(end, data.truths, strict=True)])
    # A bounce may turn it round, so the path counts, not the distance from start to end.
    paths = np.array([np.linalg.norm(np.diff(v.centers, axis=0), axis=1).mean() for v in end])
    inside = np.array([bool(((v.centers > 0) & (v.centers < size)).all()) and v.shape is not None for v in end])
    alive = inside & (paths > 0.3)
    first, last = np.median(seconds[1 : 1 + tenth]), np.median(seconds[-tenth:])
    name = f"rollout of {new} frames"
    figures = [
        Metric(f"{name}: shape and colour right at the end", float(right.mean()), "%", 0.8, interval=wilson(right)),
        Metric(f"{name}: moving and inside the frame at the end", float(alive.mean()), "%", interval=wilson(alive)),
        Metric(f"{name}: seconds a frame, last tenth over first", float(last / first), "", most=1.1),
        Metric(f"{name}: seconds a frame for {len(made)} clips", float(np.median(seconds)), "s"),
        Metric(f"{name}: memory of the process, last over first tenth", memory[-1] / memory[tenth], "", most=1.1),
    ]
    return EvalResult(figures, [to_uint8(clip) for clip in torch.cat(shown, 2)])


def _resident() -> float:
    """Bytes of this process in memory (Linux; else 1)."""
    path = Path("/proc/self/statm")
    return float(path.read_text().split()[1]) * 4096 if path.is_file() else 1.0

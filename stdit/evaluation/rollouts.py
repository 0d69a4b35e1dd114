"""Long rollouts of a causal model on moving shapes: the object at the end, and time and memory per frame."""

import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stdit.data.video_write import to_uint8
from stdit.evaluation.held_out import EvalResult, HeldOut, Metric, label_kwargs, same_object
from stdit.evaluation.shapes import measure_shape
from stdit.sampling.pipeline import STDiTPipeline

# Pixels per frame; an object that moves less has stopped. Shapes in frames of 64 pixels are drawn at 0.77 or more.
_MIN_STEP = 0.3


def rollout(pipe: STDiTPipeline, data: HeldOut, known: int, new: int, **options: Any) -> EvalResult:
    """Stream `new` frames after the first `known`; measure the object in the last 17, and time and memory per frame.

    `options` are those of `pipe.stream`.
    """
    seconds, memory, shown = [], [], [data.pixels[:8, :, :known]]
    last_parts: deque[Tensor] = deque(maxlen=5)  # the others are dropped, since the memory of the process is measured
    every = max(1, new // 4 // 12)  # shows about 12 frames in the contact sheet; a part has 4 frames
    stream = pipe.stream(data.pixels[:, :, :known], new, **label_kwargs(pipe, data), **options)
    with _Stopwatch(pipe.transformer) as network:
        while True:
            started = time.perf_counter()
            part = next(stream, None)
            if part is None:
                break
            seconds.append((time.perf_counter() - started) / part.shape[2])
            memory.append(_resident())
            last_parts.append(part)
            if len(seconds) % every == 0:
                shown.append(part[:8, :, -1:].clone())  # a view would hold the memory of the whole part
    generated = torch.cat(list(last_parts), 2)
    tenth = max(1, len(seconds) // 10)
    end = [measure_shape(to_uint8(clip)[-17:]) for clip in generated]
    size = generated.shape[3]
    correct = np.array([same_object(m, t) for m, t in zip(end, data.truths, strict=True)])
    # A bounce reverses the object, so the length of the path counts, not the distance from start to end.
    paths = np.array([np.linalg.norm(np.diff(m.centers, axis=0), axis=1).mean() for m in end])
    inside = np.array([bool(((m.centers > 0) & (m.centers < size)).all()) and m.shape is not None for m in end])
    moving = inside & (paths > _MIN_STEP)
    first, last = np.median(seconds[1 : 1 + tenth]), np.median(seconds[-tenth:])
    name = f"rollout of {new} frames"
    metrics = [
        Metric.share(f"{name}: shape and colour right at the end", correct, least=0.8),
        Metric.share(f"{name}: moving and inside the frame at the end", moving),
        Metric(f"{name}: seconds per frame, last tenth over first", float(last / first), "", most=1.1),
        Metric(f"{name}: seconds per frame for {len(generated)} clips", float(np.median(seconds)), "s"),
        Metric(f"{name}: of these in the network, without decoding", network.seconds / new, "s"),
        Metric(f"{name}: memory of the process, last over first tenth", memory[-1] / memory[tenth], "", most=1.1),
    ]
    return EvalResult(metrics, [to_uint8(clip) for clip in torch.cat(shown, 2)])


class _Stopwatch:
    """Adds up the seconds of a network's calls within a context; a device is waited for."""

    def __init__(self, network: nn.Module):
        self.seconds = 0.0
        self._network = network

    def __enter__(self) -> "_Stopwatch":
        hooks = (self._network.register_forward_pre_hook(self._start), self._network.register_forward_hook(self._stop))
        self._hooks = hooks
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _start(self, network: nn.Module, inputs: Any) -> None:
        self._began = _now(network)

    def _stop(self, network: nn.Module, inputs: Any, output: Any) -> None:
        self.seconds += _now(network) - self._began


def _now(network: nn.Module) -> float:
    if next(network.parameters()).device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _resident() -> float:
    """The resident memory of this process in bytes (on Linux; elsewhere 1)."""
    path = Path("/proc/self/statm")
    page = 4096  # bytes of a page; statm counts pages
    return float(path.read_text().split()[1]) * page if path.is_file() else 1.0

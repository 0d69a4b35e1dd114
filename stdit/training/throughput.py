"""What a run makes of its device: operations, tokens and clips a second, time spent waiting for data, memory."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

# Dense bfloat16 Tflops (a multiply-add counts as two) and memory in GiB, from the manufacturers' data sheets.
GPUS = {
    "B200": (2250.0, 180), "H200": (989.0, 141), "H100": (989.0, 80), "A100": (312.0, 80), "A100-40": (312.0, 40),
    "L40S": (362.0, 48), "L4": (121.0, 24), "4090": (165.0, 24), "3090": (71.0, 24), "MI300X": (1307.0, 192),
}  # fmt: skip
COLUMNS = ("clips_per_second", "tokens_per_second", "tflops", "utilisation", "waiting", "memory_gb")


class Work(NamedTuple):
    """What a step has done, over all processes: clips, their tokens, and floating-point operations."""

    clips: int = 0
    tokens: int = 0
    flops: float = 0.0


def peak_tflops(device: torch.device) -> float | None:
    """The dense bfloat16 Tflops of a GPU by its name, None for one that `GPUS` does not list and for other devices."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((GPUS[word][0] for word in words if word in GPUS), None)


def memory_peak(device: torch.device) -> float:
    """The largest memory so far, in bytes: that of the allocator of a GPU, or of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


class Throughput:
    """Rates since the last time that they were asked for. devices: the number of them, with `peak` Tflops each."""

    def __init__(self, device: torch.device, devices: int):
        self.device, self.devices, self.peak = device, devices, peak_tflops(device)
        self.restart()

    def restart(self) -> None:
        """Begin to measure anew, without what was done meanwhile."""
        self._began, self._waited, self._paused = time.perf_counter(), 0.0, 0.0
        self._work = Work()

    def add(self, work: Work) -> None:
        """Count what a step has done."""
        self._work = Work(*(a + b for a, b in zip(self._work, work, strict=True)))  # type: ignore[arg-type]

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context manager whose time counts as waiting for data."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context manager whose time does not count."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - began

    def rates(self) -> dict[str, float]:
        """The columns `COLUMNS`, of the steps since the last call; utilisation is nan where the peak is unknown."""
        seconds = max(time.perf_counter() - self._began - self._paused, 1e-9)
        tflops = self._work.flops / seconds / 1e12
        found = (
            self._work.clips / seconds, self._work.tokens / seconds, tflops,
            float("nan") if self.peak is None else tflops / (self.peak * self.devices),
            self._waited / seconds, memory_peak(self.device) / 1e9,
        )  # fmt: skip
        self.restart()
        return {name: float(f"{value:.4g}") for name, value in zip(COLUMNS, found, strict=True)}


def summary(rates: dict[str, float]) -> str:
    """The rates and the largest memory so far as they stand in the progress bar; Tflop/s with their share of the peak."""
    parts = [f"{_short(rates['clips_per_second'])} clips/s"]
    if rates["tokens_per_second"]:  # training of a VAE counts none
        parts.append(f"{_short(rates['tokens_per_second'])} tokens/s")
    if rates["tflops"]:
        used = rates["utilisation"]
        parts.append(f"{rates['tflops']:.3g} Tflop/s" + (f" ({used:.0%})" if used == used else ""))
    if rates["waiting"] >= 0.01:
        parts.append(f"{rates['waiting']:.0%} waiting")
    if rates["memory_gb"] == rates["memory_gb"]:
        parts.append(f"{rates['memory_gb']:.1f} GB")
    return ", ".join(parts)


def _short(number: float) -> str:
    """Three digits of a number, with k or M for thousands and millions."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"

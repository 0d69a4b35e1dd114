"""A device on which something is measured: its clock, its memory, and the size of what is run on it."""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch

from stdit.training.throughput import peak_tflops

T = TypeVar("T")


def timed(function: Callable[..., Any]) -> float:
    """The seconds that a call of `function` takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


class Machine(NamedTuple):
    """Where checks and races run. full: at the sizes of published models; else at tiny ones, which any CPU runs in seconds."""

    device: torch.device
    full: bool = True

    @property
    def name(self) -> str:
        """The name of the device, for reports."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def compiler(self) -> str:
        """The back end of torch.compile: for tiny models one that makes the graphs and no code."""
        return "inductor" if self.full else "aot_eager"

    def pick(self, full: T, tiny: T) -> T:
        """What a check uses at full size, or a tiny one."""
        return full if self.full else tiny

    def wait(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], Any], rounds: int = 5, *, warmup: int = 2) -> float:
        """The median of the seconds that a call takes until the device is done, after calls that are not counted."""
        for _ in range(warmup):
            call()
        self.wait()

        def whole() -> None:
            call()
            self.wait()

        return statistics.median(timed(whole) for _ in range(rounds))

    def peak(self, call: Callable[[], Any]) -> float | None:
        """The largest memory in bytes while a call runs, beyond what was allocated before; None if the device has no count."""
        if self.device.type != "cuda":
            call()
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.wait()
        return float(torch.cuda.max_memory_allocated(self.device) - before)

    @contextmanager
    def limited(self, size: float) -> Iterator[None]:
        """A context manager in which torch allocates at most `size` bytes; without effect where it has no such limit."""
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.empty_cache()
        # The limit is set for a device with a number.
        device = torch.cuda.current_device() if self.device.index is None else self.device.index
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / total), device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)

    def clear(self) -> None:
        """Give the memory of deleted tensors back, and forget compiled graphs."""
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        if self.device.type == "cuda":
            gc.collect()  # compiled models and pipelines refer to themselves
            torch.cuda.empty_cache()

    def rate(self, flops: float, seconds: float) -> str:
        """Operations a second, and the share of the device's peak if that is known, as text."""
        found, peak = flops / seconds / 1e12, peak_tflops(self.device)
        return f"{found:.3g} Tflop/s" + ("" if peak is None else f" ({found / peak:.0%} of the peak)")


def gib(size: float | None) -> str:
    """A number of bytes as text."""
    return "memory not measured" if size is None else f"{size / 2**30:.1f} GiB"

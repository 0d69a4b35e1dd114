"""A trace of some training steps by torch's profiler, and a table of the dearest operations."""

import os
import sys
from pathlib import Path
from typing import Any

from torch.profiler import profile, schedule

WARM_UP = 3  # steps before the trace: the first ones allocate memory and choose kernels
_ROWS = 12


class StepProfiler:
    """Traces `steps` training steps after a warm-up, and writes them into a folder as trace.json, for ui.perfetto.dev.

    remaining: the steps that the run still takes.
    """

    def __init__(self, steps: int, folder: Path, remaining: int):
        self.steps, self.folder = min(steps, max(0, remaining - WARM_UP)), folder
        self._taken = 0
        self._profile: Any = None
        if steps and not self.steps:
            print(
                f"train.profile={steps}: no trace, since the run takes {remaining} more step(s) and {WARM_UP} warm up."
            )

    def step(self) -> None:
        """Count a step that was taken."""
        self._taken += 1
        if self._profile is not None:
            self._profile.step()
        elif self.steps and self._taken == WARM_UP - 1:  # the last step of the warm-up is the profiler's own
            self._profile = profile(
                schedule=schedule(wait=0, warmup=1, active=self.steps, repeat=1), on_trace_ready=self._write
            )
            self._profile.start()
        if self._profile is not None and self._taken == WARM_UP + self.steps:
            self._profile.stop()
            self.steps, self._profile = 0, None

    def _write(self, traced: Any) -> None:
        path, number = self.folder / "trace.json", 1
        while path.exists():  # of a run that was resumed
            number += 1
            path = self.folder / f"trace-{number}.json"
        partial = path.with_name(f".{os.getpid()}-{path.name}")
        try:
            traced.export_chrome_trace(str(partial))
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:  # the training goes on
            print(f"the trace could not be written to {path}: {' '.join(str(error).split())[:200]}", file=sys.stderr)
            return
        print(f"\n{path}: {self.steps} steps, to be opened at https://ui.perfetto.dev\n{table(traced)}", flush=True)


def table(traced: Any, rows: int = _ROWS) -> str:
    """The operations of a profile that took the most time by themselves, on the accelerator if there is one."""
    events = [event for event in traced.key_averages() if not event.key.startswith("ProfilerStep")]
    accelerated = any(event.self_device_time_total for event in events)
    own = "self_device_time_total" if accelerated else "self_cpu_time_total"
    total = max(1e-9, sum(getattr(event, own) for event in events))
    dearest = sorted(events, key=lambda event: getattr(event, own), reverse=True)[:rows]
    lines = [f"{'operation':<60} {'calls':>8} {'ms':>10} {'share':>6}"]
    for event in dearest:
        time = getattr(event, own)
        lines.append(f"{event.key[:60]:<60} {event.count:>8} {time / 1e3:>10.1f} {time / total:>6.0%}")
    return "\n".join(lines)

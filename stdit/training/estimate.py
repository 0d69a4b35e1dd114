"""How long a run takes, estimated from its first steps."""

import time

# The remaining time is estimated after this many steps or seconds, without the first steps, which are slower.
ESTIMATE_STEPS, ESTIMATE_SECONDS, WARM_UP_STEPS = 20, 30.0, 2


class Estimate:
    """Estimates once, from the first steps, how long the run will take."""

    def __init__(self, step: int, steps: int):
        self.first, self.steps = step + WARM_UP_STEPS, steps
        self.began: float | None = None
        self.reported = False

    def after(self, step: int) -> str | None:
        """The message to print after a step, or None."""
        now = time.perf_counter()
        if step <= self.first:
            self.began = now
            return None
        assert self.began is not None
        done, elapsed = step - self.first, now - self.began
        if self.reported or (done < ESTIMATE_STEPS and elapsed < ESTIMATE_SECONDS):
            return None
        self.reported = True
        rest = (self.steps - step) * elapsed / done
        until = time.strftime("%H:%M" if rest < 12 * 3600 else "%Y-%m-%d %H:%M", time.localtime(time.time() + rest))
        return f"{done / elapsed:.2f} steps/s: the remaining {self.steps - step} steps take about {duration(rest)}, until {until}"


def duration(seconds: float) -> str:
    """Format a duration in a suitable unit: "40 s", "12 min", "3.5 h", "27 days"."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.1f} {name}" if name == "h" else f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} days"

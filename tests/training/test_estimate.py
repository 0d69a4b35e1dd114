"""How long a run takes is said once, from its first steps."""

import pytest

from stdit.training import estimate


@pytest.mark.parametrize(
    ("seconds", "said"), [(40, "40 s"), (700, "12 min"), (5400, "1.5 h"), (27 * 86400, "27 days"), (89.6, "90 s")]
)
def test_times_are_written_as_people_say_them(seconds, said):
    assert estimate.duration(seconds) == said


@pytest.mark.parametrize(("seconds_per_step", "after"), [(0.1, 22), (12.0, 5)])
def test_the_time_is_estimated_once_without_the_first_steps(monkeypatch, seconds_per_step, after):
    clock = 0.0
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: clock)
    found_estimate = estimate.Estimate(100, 1100)
    said = {}
    for step in range(101, 200):
        clock += 50.0 if step == 101 else seconds_per_step  # the first step compiles and warms up
        said[step] = found_estimate.after(step)
    found = {step: text for step, text in said.items() if text}
    assert list(found) == [100 + after]
    rest = (1000 - after) * seconds_per_step
    assert f"the remaining {1000 - after} steps take about {estimate.duration(rest)}" in found[100 + after]

"""A comparison of training runs: its specification, its runs, and its report in markdown."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Budget:
    """The budget of every run, of which exactly one field is given."""

    minutes: float | None = None  # minutes of training on this machine
    tokens: float | None = None  # patches over the whole run
    gflops: float | None = None  # Gflops of forward and backward passes (three times a forward pass) over the whole run
    steps: int | None = None  # training steps

    @property
    def kind(self) -> str:
        """The name of the field that is given; ValueError unless there is exactly one, above 0."""
        given = [name for name in ("minutes", "tokens", "gflops", "steps") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"budget gives {', '.join(given) or 'nothing'}; give one of minutes, tokens, gflops, steps."
            )
        if getattr(self, given[0]) <= 0:
            raise ValueError(f"budget.{given[0]} must be > 0, got {getattr(self, given[0])}; use a positive number.")
        return given[0]

    def steps_for(self, *, seconds_per_step: float, tokens_per_step: float, gflops_per_step: float) -> int:
        """The number of steps within the budget, at least 1."""
        if self.steps is not None:
            return int(self.steps)
        price = {"minutes": seconds_per_step / 60, "tokens": tokens_per_step, "gflops": gflops_per_step}[self.kind]
        return max(1, round(getattr(self, self.kind) / price))

    def __str__(self) -> str:
        return f"{getattr(self, self.kind):g} {self.kind}"


@dataclass
class Comparison:
    """The specification of a comparison of training runs."""

    name: str = "comparison"  # name of the comparison, and the first part of the names of its runs
    title: str = ""  # title of the page; empty: the name
    base: str = "configs/quickstart.yaml"  # config of `stdit train` that all runs start from
    overrides: dict[str, Any] = field(default_factory=dict)  # keys of the base that all runs change
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)  # variant -> the keys of the base that it changes
    seeds: list[int] = field(default_factory=lambda: [0])  # every variant is trained once with each seed
    budget: Budget = field(default_factory=Budget)  # the budget of every run; give one of its keys
    clips: int = 96  # clips that are sampled from each run and measured
    reference: int = 96  # real clips that they are compared with; 0: no distance
    guidance: float = 3.0  # guidance scale of the sampled clips
    sample_steps: int = 20  # solver steps of the sampled clips
    features: str = "vae"  # features of the distance, as in `stdit evaluate --features`

    def __post_init__(self) -> None:
        if not self.variants:
            raise ValueError("variants is empty; give each variant a name and its changes of the base ({} for none).")
        self.budget.kind  # noqa: B018 (raises ValueError)
        if not self.seeds:
            raise ValueError("seeds is empty; give one number or more.")
        if self.clips < 2:
            raise ValueError(f"clips must be >= 2, got {self.clips}; distances need a spread, so use 2 or more.")
        for name in self.variants:
            if not name or any(c in name for c in "/\\ ."):
                raise ValueError(f"variant {name!r} becomes part of a folder's name; use letters, digits, - and _.")


@dataclass
class Run:
    """A trained variant and its measurements."""

    variant: str
    seed: int
    changes: dict[str, Any]
    steps: int
    parameters: int
    gflops: float  # multiply-adds of one forward of one clip, in 1e9
    minutes: float = math.nan
    clips_per_second: float = math.nan
    losses: dict[str, float] = field(default_factory=dict)  # by noise level, of the EMA weights
    shape: float = math.nan
    direction: float = math.nan
    both: float = math.nan
    frechet: float = math.nan

    @property
    def loss(self) -> float:
        """The mean of the losses at the measured levels."""
        return float(np.mean(list(self.losses.values())))


def table(runs: Sequence[Run], distance: str) -> str:
    """A markdown table with one row per variant: mean and standard deviation over seeds."""
    levels = list(runs[0].losses)
    head = ["variant", "parameters", "Gflops", "steps", "minutes", "clips/s", *[f"loss at {level}" for level in levels],
            "shape", "direction", "both", distance]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, group in by_variant(runs).items():
        first = group[0]
        cells = [
            name, f"{first.parameters / 1e6:.2f} M", f"{first.gflops:.3f}", f"{first.steps}",
            _spread([run.minutes for run in group], ".1f"), _spread([run.clips_per_second for run in group], ".0f"),
            *[_spread([run.losses[level] for run in group], ".3f") for level in levels],
            *[_spread([100 * getattr(run, key) for run in group], ".1f", " %") for key in ("shape", "direction", "both")],
            _spread([run.frechet for run in group], ".2f"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_variant(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs grouped by variant, in the order of their first run."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.variant, []).append(run)
    return groups


def order(runs: Sequence[Run], key: str = "frechet") -> str:
    """Order the variants from best to worst by the mean over seeds.

    "<" stands between neighbours that differ by more than the sum of their standard deviations, "~" between others.
    """
    sign = -1 if key in ("shape", "direction", "both") else 1
    groups = {name: [getattr(run, key) for run in group] for name, group in by_variant(runs).items()}
    ranked = sorted(groups, key=lambda name: sign * float(np.mean(groups[name])))
    parts = ranked[:1]
    for a, b in itertools.pairwise(ranked):
        gap = abs(float(np.mean(groups[a]) - np.mean(groups[b])))
        spread = float(np.std(groups[a]) + np.std(groups[b]))
        parts.append(f"{'<' if gap > spread else '~'} {b}")
    return " ".join(parts)


def differences(changes: Mapping[str, Any]) -> str:
    """Describe the changes of a variant, with a note if there is more than one."""
    words = ", ".join(f"`{key}={value}`" for key, value in changes.items())
    return words if len(changes) < 2 else f"{words} (differs in {len(changes)} things)"


def _spread(values: Sequence[float], form: str, unit: str = "") -> str:
    """Mean and standard deviation as text; "-" for values that were not measured."""
    mean = float(np.mean(values))
    if math.isnan(mean):
        return "-"
    return f"{mean:{form}}{unit}" + (f" ± {np.std(values):{form}}" if len(values) > 1 else "")


def page(spec: Comparison, runs: Sequence[Run], command: str, pictures: Sequence[Path], distance: str) -> str:
    """The report in markdown: the setup, the table, the orders, pictures, and the changes of each variant."""
    seeds = ", ".join(map(str, spec.seeds))
    lines = [
        f"# {spec.title or spec.name}",
        "",
        f"`{command}`: base `{spec.base}`, {spec.budget} per run, seeds {seeds}; {spec.clips} clips per run, "
        f"{spec.sample_steps} steps, guidance {spec.guidance:g}. Losses are of the EMA weights, by noise level.",
        "",
        table(runs, distance),
        "",
        f"By {distance}, best first (`<`: differ by more than the sum of their deviations, `~`: do not): {order(runs)}.",
        f"By loss, the mean over levels, best first: {order(runs, 'loss')}.",
        f"By measured shape and direction, best first: {order(runs, 'both')}.",
        "",
        *[f"![{picture.stem}]({picture.name})" for picture in pictures],
        "",
        "What each variant changes of the base:",
        "",
        *[f"- **{name}**: {differences(changes) or 'nothing'}" for name, changes in spec.variants.items()],
        "",
    ]
    return "\n".join(lines)

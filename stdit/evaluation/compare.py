"""A comparison of training runs: what was asked for, what each run is, and the page a person reads."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Budget:
    """What every run may spend; exactly one is given. minutes of training on this machine, tokens or Gflops (forward and
    backward: three times a forward) over the whole run, or steps."""

    minutes: float | None = None
    tokens: float | None = None
    gflops: float | None = None
    steps: int | None = None

    @property
    def kind(self) -> str:
        """Which of the four it is; ValueError if that cannot be told."""
        given = [name for name in ("minutes", "tokens", "gflops", "steps") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"budget gives {given or 'nothing'}; give one of minutes, tokens, gflops, steps.")
        if getattr(self, given[0]) <= 0:
            raise ValueError(f"budget.{given[0]}={getattr(self, given[0])} buys nothing; use more than 0.")
        return given[0]

    def steps_for(self, seconds_a_step: float, tokens_a_step: float, gflops_a_step: float) -> int:
        """How many steps it buys."""
        if self.steps is not None:
            return int(self.steps)
        price = {"minutes": seconds_a_step / 60, "tokens": tokens_a_step, "gflops": gflops_a_step}[self.kind]
        return max(1, round(getattr(self, self.kind) / price))

    def __str__(self) -> str:
        return f"{getattr(self, self.kind):g} {self.kind}"


@dataclass
class Comparison:
    """What to compare. base: a config of `tools/train.py`; variants: by name, what each changes of it.

    clips: as many are made of every run for judging; reference: real clips they are compared with (0: no distance).
    """

    name: str = "comparison"
    title: str = ""
    base: str = "configs/quickstart.yaml"
    overrides: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    budget: Budget = field(default_factory=Budget)
    clips: int = 96
    reference: int = 96
    guidance: float = 3.0
    sample_steps: int = 20
    features: str = "vae"

    def __post_init__(self) -> None:
        if not self.variants:
            raise ValueError("a comparison needs variants: a name for each, and what it changes ({} for the base).")
        self.budget.kind  # noqa: B018 (says what is wrong with it)
        if not self.seeds:
            raise ValueError("seeds is empty; give one number or more.")
        if self.clips < 2:
            raise ValueError(f"clips={self.clips} cannot be compared; use 2 or more.")
        for name in self.variants:
            if not name or any(c in name for c in "/\\ ."):
                raise ValueError(f"variant {name!r} becomes part of a folder's name; use letters, digits, - and _.")


@dataclass
class Run:
    """One trained variant and what was measured of it."""

    variant: str
    seed: int
    changes: dict[str, Any]
    steps: int
    parameters: int
    gflops: float  # multiply-adds of one forward of one clip, in 1e9
    minutes: float = math.nan
    clips_per_second: float = math.nan
    losses: dict[str, float] = field(default_factory=dict)  # by noise level, of the averaged weights
    shape: float = math.nan
    direction: float = math.nan
    both: float = math.nan
    frechet: float = math.nan

    @property
    def loss(self) -> float:
        """The mean over the measured levels."""
        return float(np.mean(list(self.losses.values())))


def table(runs: Sequence[Run], distance: str) -> str:
    """One row a variant, mean and spread (standard deviation) over seeds, in markdown."""
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
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.variant, []).append(run)
    return groups


def order(runs: Sequence[Run], key: str = "frechet") -> str:
    """Variants from best to worst by the mean over seeds, and whether neighbours' spreads overlap."""
    best = -1 if key in ("shape", "direction", "both") else 1
    groups = {name: [getattr(run, key) for run in group] for name, group in by_variant(runs).items()}
    ranked = sorted(groups, key=lambda name: best * float(np.mean(groups[name])))
    said = ranked[:1]
    for a, b in itertools.pairwise(ranked):
        gap = abs(float(np.mean(groups[a]) - np.mean(groups[b])))
        within = float(np.std(groups[a]) + np.std(groups[b]))
        said.append(f"{'<' if gap > within else '~'} {b}")
    return " ".join(said)


def differences(changes: Mapping[str, Any]) -> str:
    """What a variant changes, in words; more than one thing is said so."""
    words = ", ".join(f"`{key}={value}`" for key, value in changes.items())
    return words if len(changes) < 2 else f"{words} (differs in {len(changes)} things)"


def _spread(values: Sequence[float], form: str, unit: str = "") -> str:
    mean = float(np.mean(values))
    if math.isnan(mean):
        return "-"
    return f"{mean:{form}}{unit}" + (f" ± {np.std(values):{form}}" if len(values) > 1 else "")


def page(spec: Comparison, runs: Sequence[Run], command: str, pictures: Sequence[Path], distance: str) -> str:
    """The whole page, in markdown: what was done, the table, the order, curves, and what each variant is."""
    seeds = ", ".join(map(str, spec.seeds))
    lines = [
        f"# {spec.title or spec.name}",
        "",
        f"`{command}`: base `{spec.base}`, {spec.budget} a run, seeds {seeds}; {spec.clips} clips a run, "
        f"{spec.sample_steps} steps, guidance {spec.guidance:g}. Losses are of the averaged weights, by noise level.",
        "",
        table(runs, distance),
        "",
        f"By {distance}, best first (`<`: apart by more than their spreads together, `~`: not): {order(runs)}.",
        f"By loss, the mean over levels, best first: {order(runs, 'loss')}.",
        f"By the judge (shape and direction), best first: {order(runs, 'both')}.",
        "",
        *[f"![{picture.stem}]({picture.name})" for picture in pictures],
        "",
        "What each variant changes of the base:",
        "",
        *[f"- **{name}**: {differences(changes) or 'nothing'}" for name, changes in spec.variants.items()],
        "",
    ]
    return "\n".join(lines)

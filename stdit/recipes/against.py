"""A measurement against a saved one of the same clips: `--against FILE`, and the differences, clip by clip."""

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stdit.files import read_json

AGAINST = "of the same seed: print the differences, clip by clip"  # what --against says of its file


def read_saved(args: argparse.Namespace, key: str, output: Path | None = None, **expected: int) -> dict[str, Any]:
    """Read the file of `args.against`, and return its part `key`, which holds a value of each clip.

    output: the file that this measurement writes. expected: the seed, size, ... of the clips to compare. ValueError for that
    file, for one without clips, and for one of others than these.
    """
    path = Path(args.against)
    if output is not None and path.resolve() == output.resolve():
        raise ValueError(f"--against {path} is what this evaluation writes; copy it to another name first.")
    if not path.is_file():
        raise ValueError(f"--against {path} is no file; give one that this command has written.")
    found = read_json(path)
    saved = found.get(key)
    if not isinstance(saved, dict) or not saved:
        raise ValueError(f"{path} holds no clips to compare with; measure that model again.")
    for values in saved.values():
        for each in values.values() if isinstance(values, dict) else [values]:
            if not isinstance(each, list) or not all(isinstance(one, float | int | None) for one in each):
                raise ValueError(f"{path} has a value that is not one of a clip; measure that model again.")
    for name, value in expected.items():
        if (theirs := found.get(name)) not in (None, value):
            remedy = f"add --{name} {theirs}" if hasattr(args, name) else f"give a file of {name} {value}"
            raise ValueError(
                f"{path} was measured with {name} {theirs}, which cannot be compared with {name} {value}; {remedy}."
            )
    return saved


def print_differences(
    ours: Iterable[tuple[str, str, Sequence]], theirs: Mapping[str, Sequence], path: str | Path
) -> None:
    """Print the differences to a saved measurement over the clips that both have, with 95 % intervals.

    ours: name, unit ("%" for shares) and the clips' values of each measurement. theirs: name -> values. A value may be None.
    """
    rows = [(name, unit, values, theirs[name]) for name, unit, values in ours if name in theirs]
    if not rows and theirs:
        print(f"{path} has other measurements, none of which can be compared")
    width = max((len(name) for name, *_ in rows), default=0)
    for name, unit, values, others in rows:
        # Of shares, the saved measurement may have more clips or fewer.
        pairs = [pair for pair in zip(values, others, strict=False) if None not in pair]
        if not pairs:
            continue
        scale, digits, shown = (100, 1, "points") if unit == "%" else (1, 2, unit)
        found, low, high = (f"{scale * part:+.{digits}f}" for part in paired_difference(*zip(*pairs, strict=True)))
        if unit == "dB":
            shown += " (mean of clips)"
        print(f"{name:<{max(width, 16)}} {len(pairs):>5} {found:>6} {shown} against {path} (95 %: {low} to {high})")


def paired_difference(ours: Sequence, theirs: Sequence) -> tuple[float, float, float]:
    """The difference of two means over the same clips, and its 95 % interval.

    Of true and false the means are shares (Agresti and Min, 2005); of numbers the interval is the normal one.
    """
    a, b = np.asarray(ours), np.asarray(theirs)
    if a.dtype == bool and b.dtype == bool:
        n, won, lost = len(a) + 2, int((a & ~b).sum()) + 0.5, int((~a & b).sum()) + 0.5
        middle, spread = (won - lost) / n, 1.96 * math.sqrt(won + lost - (won - lost) ** 2 / n) / n
        return float(a.mean() - b.mean()), max(middle - spread, -1.0), min(middle + spread, 1.0)
    differences = a.astype(float) - b.astype(float)
    mean, count = float(differences.mean()), len(differences)
    spread = 1.96 * float(differences.std(ddof=1)) / math.sqrt(count) if count > 1 else math.inf
    return mean, mean - spread, mean + spread

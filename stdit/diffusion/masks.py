"""Generation masks for training: which frames (or patches) of a clip are known, and which are to be generated.

Masks are bool, true = to be generated: (T,), or per patch (T, rows, columns).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from stdit.rng import keyed_generator

Grid = tuple[int, int, int]  # latent frames, rows and columns of patches


def _everything(generator: torch.Generator, grid: Grid) -> Tensor:
    """No frame is known."""
    return torch.ones(grid[0], dtype=torch.bool)


def _prefix(generator: torch.Generator, grid: Grid) -> Tensor:
    """The first frames are known, at least one."""
    mask = _everything(generator, grid)
    mask[: 1 + _below(generator, grid[0] - 1)] = grid[0] == 1
    return mask


def _motion(generator: torch.Generator, grid: Grid) -> Tensor:
    """The first frames are known, at least two, since a single frame shows no motion."""
    if grid[0] < 3:
        return _prefix(generator, grid)
    mask = _everything(generator, grid)
    mask[: 2 + _below(generator, grid[0] - 2)] = False
    return mask


def _suffix(generator: torch.Generator, grid: Grid) -> Tensor:
    """The last frames are known, at least one."""
    return _prefix(generator, grid).flip(0)


def _ends(generator: torch.Generator, grid: Grid) -> Tensor:
    """All frames are known except a gap that touches neither end."""
    frames = grid[0]
    if frames < 3:
        return _prefix(generator, grid)
    gap = 1 + _below(generator, frames - 2)
    start = 1 + _below(generator, frames - gap - 1)
    mask = torch.zeros(frames, dtype=torch.bool)
    mask[start : start + gap] = True
    return mask


def _random(generator: torch.Generator, grid: Grid) -> Tensor:
    """Each frame is known with probability 1/2; at least one is to be generated."""
    mask = torch.rand(grid[0], generator=generator) >= 0.5
    mask[_below(generator, grid[0])] = True
    return mask


def _every_kth(generator: torch.Generator, grid: Grid) -> Tensor:
    """Every k-th frame is known, starting with the first; k >= 2 is drawn at random."""
    mask = _everything(generator, grid)
    mask[:: 2 + _below(generator, grid[0] - 1)] = grid[0] == 1
    return mask


def _region(generator: torch.Generator, grid: Grid) -> Tensor:
    """A box of patches, or everything outside a box, is to be generated, in all frames or in a range of frames."""
    frames, rows, columns = grid
    box = torch.zeros(grid, dtype=torch.bool)
    spans = [_span(generator, size) for size in (rows, columns)]
    box[:, slice(*spans[0]), slice(*spans[1])] = True
    mask = box if torch.rand((), generator=generator) < 0.5 or bool(box.all()) else ~box
    if torch.rand((), generator=generator) < 0.5:
        stretch = torch.zeros(frames, 1, 1, dtype=torch.bool)
        stretch[slice(*_span(generator, frames))] = True
        mask = mask & stretch
    return mask


class MaskStrategy(NamedTuple):
    """How a training clip is masked.

    draw_mask: (generator, grid) -> mask. level_per_frame: every generated frame has its own noise level (Chen et al.,
    "Diffusion Forcing"); otherwise they share one. teacher_forcing: each frame is predicted from the clean frames
    before it, for all frames of a clip at once. per_patch: patches of a frame have different noise levels.
    """

    draw_mask: Callable[[torch.Generator, Grid], Tensor] = _everything
    level_per_frame: bool = False
    teacher_forcing: bool = False
    per_patch: bool = False


MASK_STRATEGIES: dict[str, MaskStrategy] = {
    "shared": MaskStrategy(),
    "per_frame": MaskStrategy(level_per_frame=True),
    "prefix": MaskStrategy(_prefix),
    "motion": MaskStrategy(_motion),
    "suffix": MaskStrategy(_suffix),
    "ends": MaskStrategy(_ends),
    "random": MaskStrategy(_random),
    "every_kth": MaskStrategy(_every_kth),
    "region": MaskStrategy(_region, per_patch=True),
    "teacher_forcing": MaskStrategy(level_per_frame=True, teacher_forcing=True),
}


def choose(generator: torch.Generator, probabilities: Mapping[str, float]) -> str:
    """Draw a name with probability proportional to its entry."""
    names = sorted(probabilities)
    weights = torch.tensor([probabilities[name] for name in names], dtype=torch.float64)
    return names[int(torch.multinomial(weights, 1, generator=generator))]


def choose_strategy(key: tuple[int, int, int], probabilities: Mapping[str, float]) -> str:
    """Choose the mask strategy of one training clip as a function of its key (seed, step, slot).

    A clip with per-patch levels needs per-patch modulation of its whole batch, so such clips are grouped: in some steps
    they are a quarter of the clips, in the others there are none. With a probability above 1/4 they occur in all steps.
    """
    generator = keyed_generator("strategy", *key)
    per_patch = {name: p for name, p in probabilities.items() if MASK_STRATEGIES[name].per_patch}
    if per_patch:
        share = sum(per_patch.values()) / sum(probabilities.values())
        steps = min(1.0, 4 * share)
        grouped = _uniform(keyed_generator("grouped", *key[:2])) < steps
        rest = {name: p for name, p in probabilities.items() if name not in per_patch}
        probabilities = per_patch if grouped and _uniform(generator) < share / steps else rest
    return choose(generator, probabilities)


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))


def _below(generator: torch.Generator, high: int) -> int:
    return int(torch.randint(max(high, 1), (), generator=generator))


def _span(generator: torch.Generator, size: int) -> tuple[int, int]:
    """Start and end of a random range of length 1 to `size`."""
    length = 1 + _below(generator, size)
    start = _below(generator, size - length + 1)
    return start, start + length

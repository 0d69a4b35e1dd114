"""Noise levels: what training takes as known, how it draws the rest, and how size shifts them."""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stdit.rng import keyed_generator

Distribution = Literal["logit_normal", "uniform"]
Grid = tuple[int, int, int]  # latent frames, rows and columns of patches


class LevelSample(NamedTuple):
    """Levels of one clip and what of it is known, (T,) or per patch (T, rows, columns). Loss counts where not known.

    history: the level of the copy in which each frame sees those before it (teacher forcing), or None.
    """

    levels: Tensor
    known: Tensor
    history: Tensor | None = None


def _nothing(generator: torch.Generator, grid: Grid) -> Tensor:
    return torch.zeros(grid[0], dtype=torch.bool)


def _prefix(generator: torch.Generator, grid: Grid) -> Tensor:
    """The first frames, at least one."""
    known = _nothing(generator, grid)
    known[: 1 + _below(generator, grid[0] - 1)] = grid[0] > 1
    return known


def _motion(generator: torch.Generator, grid: Grid) -> Tensor:
    """The first frames, at least two: one does not tell how things move."""
    if grid[0] < 3:
        return _prefix(generator, grid)
    known = _nothing(generator, grid)
    known[: 2 + _below(generator, grid[0] - 2)] = True
    return known


def _suffix(generator: torch.Generator, grid: Grid) -> Tensor:
    """The last frames, at least one."""
    return _prefix(generator, grid).flip(0)


def _ends(generator: torch.Generator, grid: Grid) -> Tensor:
    """All but a gap that touches neither end."""
    frames = grid[0]
    if frames < 3:
        return _prefix(generator, grid)
    gap = 1 + _below(generator, frames - 2)
    start = 1 + _below(generator, frames - gap - 1)
    known = torch.ones(frames, dtype=torch.bool)
    known[start : start + gap] = False
    return known


def _random(generator: torch.Generator, grid: Grid) -> Tensor:
    """Each frame by the toss of a coin; one at least stays to be predicted."""
    known = torch.rand(grid[0], generator=generator) < 0.5
    known[_below(generator, grid[0])] = False
    return known


def _every(generator: torch.Generator, grid: Grid) -> Tensor:
    """Every k-th frame from the first."""
    known = _nothing(generator, grid)
    known[:: 2 + _below(generator, grid[0] - 1)] = grid[0] > 1
    return known


def _region(generator: torch.Generator, grid: Grid) -> Tensor:
    """All but a box of patches, or nothing but a box; over all frames, or over a stretch of them (T, rows, columns)."""
    frames, rows, columns = grid
    box = torch.zeros(grid, dtype=torch.bool)
    spans = [_span(generator, size) for size in (rows, columns)]
    box[:, slice(*spans[0]), slice(*spans[1])] = True
    made = box if torch.rand((), generator=generator) < 0.5 or bool(box.all()) else ~box
    if torch.rand((), generator=generator) < 0.5:
        stretch = torch.zeros(frames, 1, 1, dtype=torch.bool)
        stretch[slice(*_span(generator, frames))] = True
        made = made & stretch
    return ~made


class Scheme(NamedTuple):
    """What is known, and whether the other frames have a level each (diffusion forcing) or share one.

    taught: each frame is predicted beside the clean frames before it, all frames of a clip at once (causal models).
    by_patch: patches of a frame have levels of their own.
    """

    known: Callable[[torch.Generator, Grid], Tensor] = _nothing
    independent: bool = False
    taught: bool = False
    supports_patch_levels: bool = False


MASK_STRATEGIES: dict[str, Scheme] = {
    "shared": Scheme(),
    "per_frame": Scheme(independent=True),
    "prefix": Scheme(_prefix),
    "motion": Scheme(_motion),
    "suffix": Scheme(_suffix),
    "ends": Scheme(_ends),
    "random": Scheme(_random),
    "every_kth": Scheme(_every),
    "region": Scheme(_region, supports_patch_levels=True),
    "teacher_forcing": Scheme(independent=True, taught=True),
}
# Seven clips in eight plain: plain clips pay little, and of a batch of 16 two have something known (docs/operations.md).
DEFAULT_MASK_PROBS = {
    "shared": 0.875, "prefix": 0.04, "motion": 0.015, "suffix": 0.025, "ends": 0.02, "region": 0.015, "every_kth": 0.005,
    "per_frame": 0.0025, "random": 0.0025,
}  # fmt: skip


def choose(generator: torch.Generator, shares: Mapping[str, float]) -> str:
    """A name, with probability proportional to its share."""
    names = sorted(shares)
    weights = torch.tensor([shares[name] for name in names], dtype=torch.float64)
    return names[int(torch.multinomial(weights, 1, generator=generator))]


def choose_strategy(key: tuple[int, int, int], shares: Mapping[str, float]) -> str:
    """The scheme of one clip of training, by its key (seed, step, slot): in the long run each by its share.

    One clip with levels by patch makes its whole batch pay for a condition a patch, so that such clips come together: a
    quarter of the clips of few steps (of all steps, where their share is larger).
    """
    generator = keyed_generator("scheme", *key)
    dear = {name: share for name, share in shares.items() if MASK_STRATEGIES[name].supports_patch_levels}
    if dear:
        share = sum(dear.values()) / sum(shares.values())
        steps = min(1.0, 4 * share)
        crowded = _uniform(keyed_generator("crowd", *key[:2])) < steps
        rest = {name: shares[name] for name in shares if name not in dear}
        shares = dear if crowded and _uniform(generator) < share / steps else rest
    return choose(generator, shares)


def draw_levels(generator: torch.Generator, count: int, distribution: Distribution) -> Tensor:
    """(count,) independent levels in (0, 1)."""
    if distribution == "logit_normal":  # Esser et al., "Scaling Rectified Flow Transformers", section 3.1
        return torch.sigmoid(torch.randn(count, generator=generator))
    return torch.rand(count, generator=generator)


def shift_levels(levels: Tensor, shift: float) -> Tensor:
    """shift * t / (1 + (shift - 1) t): more noise for shift > 1; 0 and 1 stay (Esser et al., equation 23)."""
    return shift * levels / (1 + (shift - 1) * levels)


def size_shift(shift: float, tokens: int, base_tokens: int) -> float:
    """The shift for a clip of `tokens` latent positions when `shift` holds at `base_tokens` (0: everywhere)."""
    return shift * math.sqrt(tokens / base_tokens) if base_tokens else shift


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))


def _below(generator: torch.Generator, high: int) -> int:
    return int(torch.randint(max(high, 1), (), generator=generator))


def _span(generator: torch.Generator, size: int) -> tuple[int, int]:
    """First and end of a random stretch of 1 to `size`."""
    length = 1 + _below(generator, size)
    start = _below(generator, size - length + 1)
    return start, start + length

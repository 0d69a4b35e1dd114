"""Motion of whole pictures: how far everything shifts, for worlds whose state is not read from the picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from stdit.evaluation.worlds import HORIZONS, DreamedEpisode

LEAST = 0.5  # pixels by which the truth shifts in a group that counts
_BLURS = (6.0, 3.0, 3.0)  # standard deviations in pixels, coarse to fine: a VAE keeps no finer structure
_BORDER = 4  # pixels at the edges that do not count, since what enters there was not seen before


def state(env: Any) -> None:
    """Nothing is read from the environment."""


def shift(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """How far a picture (H, W, 3) uint8 has shifted, (x, y) in pixels, by least squares over smoothed pictures.

    Lucas and Kanade, "An Iterative Image Registration Technique", on the whole picture, coarse to fine.
    """
    a, b = (frame.astype(float).mean(-1) for frame in (before, after))
    total = np.zeros(2)
    for blur in _BLURS:
        whole = np.round(total).astype(int)
        back = np.roll(b, (-whole[1], -whole[0]), (0, 1))
        total = whole + _step(_smooth(a, blur), _smooth(back, blur))
    return total


def _step(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The shift (x, y) that explains the difference of two pictures to first order; zero where nothing has a gradient."""
    middle, inner = (a + b) / 2, slice(_BORDER, -_BORDER)
    gradients = [np.gradient(middle, axis=axis)[inner, inner].ravel() for axis in (1, 0)]
    change = (b - a)[inner, inner].ravel()
    matrix = np.array([[g @ h for h in gradients] for g in gradients]) + 1e-6 * np.eye(2)
    return -np.linalg.solve(matrix, np.array([g @ change for g in gradients]))


def _smooth(picture: np.ndarray, blur: float) -> np.ndarray:
    """A picture (H, W) after a Gaussian filter of a standard deviation in pixels; its edges go on."""
    reach = int(3 * blur)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / blur) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        padding = [(reach, reach) if axis == one else (0, 0) for one in (0, 1)]
        windows = np.lib.stride_tricks.sliding_window_view(
            np.pad(picture, padding, mode="edge"), len(kernel), axis=axis
        )
        picture = windows @ kernel
    return picture


def measure_rollouts(dreams: Sequence[DreamedEpisode], group: int) -> dict[str, Any]:
    """Whether groups shift the picture in the direction in which they shift the truth, along the axis of its motion.

    By the number of actions that a rollout has taken, since later groups may start from another place than the truth's.
    """
    agree: list[tuple[int, bool]] = []
    for one in dreams:
        for i in range(len(one.truth.actions)):
            real = shift(one.truth.lasts[i], one.truth.lasts[i + 1])
            axis = int(np.abs(real).argmax())
            if abs(real[axis]) >= LEAST:
                agree.append((i, bool(np.sign(shift(one.lasts[i], one.lasts[i + 1])[axis]) == np.sign(real[axis]))))
    within = {n: [right for i, right in agree if i < n] for n in HORIZONS}
    return {
        "moves in the direction of the truth within so many actions": {
            n: float(np.mean(found))
            for n, found in within.items()
            if found and n <= max(len(one.lasts) - 1 for one in dreams)
        },
        "groups that move": len(agree),
    }

"""Motion of whole pictures: how far everything shifts, for worlds whose state is not read from the picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from stdit.evaluation.worlds import DreamedEpisode

LEAST = 1.0  # pixels by which the truth shifts in a group that counts


def state(env: Any) -> None:
    """Nothing is read from the environment."""


def shift(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """How far a picture (H, W, 3) uint8 has shifted, (x, y) in pixels, by phase correlation; zero if both are the same."""
    a, b = (frame.astype(float).mean(-1) for frame in (before, after))
    window = np.outer(np.hanning(len(a)), np.hanning(a.shape[1]))
    spectra = [np.fft.fft2((picture - picture.mean()) * window) for picture in (a, b)]
    cross = np.conj(spectra[0]) * spectra[1]
    surface = np.fft.ifft2(cross / np.maximum(np.abs(cross), 1e-9)).real
    y, x = np.unravel_index(surface.argmax(), surface.shape)
    height, width = surface.shape
    return np.array([x - width * (x > width // 2), y - height * (y > height // 2)], dtype=float)


def measure_rollouts(dreams: Sequence[DreamedEpisode], group: int) -> dict[str, Any]:
    """Whether each group shifts the picture in the direction in which it shifts the truth, along the axis of its motion."""
    agree = []
    for one in dreams:
        for i in range(len(one.truth.actions)):
            real = shift(one.truth.lasts[i], one.truth.lasts[i + 1])
            axis = int(np.abs(real).argmax())
            if abs(real[axis]) >= LEAST:
                agree.append(bool(np.sign(shift(one.lasts[i], one.lasts[i + 1])[axis]) == np.sign(real[axis])))
    return {
        "moves in the direction of the truth": float(np.mean(agree)) if agree else None,
        "groups that move": len(agree),
    }

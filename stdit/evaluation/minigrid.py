"""Measurements of MiniGrid's worlds, in pixels: the cell and the heading of the agent, a red triangle."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from stdit.data.transforms import resize
from stdit.evaluation.worlds import HORIZONS, DreamedEpisode

_TILE = 32  # pixels of a tile as MiniGrid draws it


def state(env: Any) -> dict[str, Any]:
    """The agent's cell (column, row) and heading, the size of the grid, and how an agent looks with each heading."""
    tiles = [env.grid.render_tile(None, agent_dir=heading, highlight=True, tile_size=_TILE) for heading in range(4)]
    return {
        "cell": tuple(int(one) for one in env.agent_pos), "heading": int(env.agent_dir), "grid": (env.width, env.height),
        "agents": np.stack(tiles).astype(np.uint8),
    }  # fmt: skip


def measure_agent(frame: np.ndarray, about: dict[str, Any]) -> tuple[tuple[int, int], int]:
    """The cell (column, row) with most red in a frame (H, W, 3) uint8, and the heading whose picture is nearest to it."""
    columns, rows = about["grid"]
    side = len(frame) // rows
    red = frame[..., 0].astype(float) - frame[..., 1:].max(-1)
    by_cell = red[: rows * side, : columns * side].reshape(rows, side, columns, side).clip(min=0).sum((1, 3))
    row, column = np.unravel_index(by_cell.argmax(), by_cell.shape)
    tile = frame[row * side : (row + 1) * side, column * side : (column + 1) * side].astype(float)
    agents = resize(about["agents"], (side, side)).astype(float)
    heading = int(((agents - tile) ** 2).mean((1, 2, 3)).argmin())
    return (int(column), int(row)), heading


def measure_rollouts(dreams: Sequence[DreamedEpisode], group: int) -> dict[str, Any]:
    """After how many actions the agent's cell and heading are those of the environment, as shares of the rollouts."""
    right: dict[int, list[bool]] = {}
    for one in dreams:
        for horizon in HORIZONS:
            if horizon < len(one.lasts):
                truth = one.truth.states[horizon]
                found = measure_agent(one.lasts[horizon], truth)
                right.setdefault(horizon, []).append(found == (truth["cell"], truth["heading"]))
    return {"cell and heading right after so many actions": {n: float(np.mean(one)) for n, one in right.items()}}

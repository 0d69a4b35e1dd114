"""Measurements of MiniGrid's worlds, in pixels: the cell and the heading of the agent, a red triangle."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from stdit.data.transforms import resize
from stdit.evaluation.worlds import HORIZONS, DreamedEpisode

_TILE = 32  # pixels of a tile as MiniGrid draws it
_SIDE = 8  # pixels of a tile when it is compared


def state(env: Any) -> dict[str, Any]:
    """The agent's cell (column, row) and heading, the size of the grid, and how an agent looks with each heading."""
    tiles = [env.grid.render_tile(None, agent_dir=heading, highlight=True, tile_size=_TILE) for heading in range(4)]
    return {
        "cell": tuple(int(one) for one in env.agent_pos), "heading": int(env.agent_dir), "grid": (env.width, env.height),
        "agents": np.stack(tiles).astype(np.uint8),
    }  # fmt: skip


def measure_agent(frame: np.ndarray, about: dict[str, Any]) -> tuple[tuple[int, int], int]:
    """The cell (column, row) of a frame (H, W, 3) uint8 that is nearest to an agent of any heading, and that heading."""
    columns, rows = about["grid"]
    tiles = resize(frame[None], (rows * _SIDE, columns * _SIDE))[0].astype(float)
    tiles = tiles.reshape((rows, _SIDE, columns, _SIDE, 3)).swapaxes(1, 2)
    agents = resize(about["agents"], (_SIDE, _SIDE)).astype(float)
    errors = ((tiles[:, :, None] - agents) ** 2).mean((-3, -2, -1))
    row, column, heading = np.unravel_index(errors.argmin(), errors.shape)
    return (int(column), int(row)), int(heading)


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

"""Measurements of the room that ships, in pixels: where the player is, what it is, and whether it moved as told."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from stdit.evaluation.shapes import connected, shape_of_fill
from stdit.evaluation.worlds import Rollout
from stdit.worlds.room import HALF, SIDE, Room, player_offset

TOLERANCE = 3.0  # pixels of 64 between the move of a group and that which the environment would make
INTO_WALL = 2.5  # pixels by which an outline may reach into a wall: of blur
_MIN_AREA = 24.0  # pixels; less is no player


class Player(NamedTuple):
    """The player as it is measured in a frame: centre of its box (x, y), nan if there is none; its shape by its fill."""

    center: np.ndarray
    shape: str | None


def state(room: Room) -> dict[str, Any]:
    """What the judge needs to know of a room: what does not change, and where the player is."""
    return {**room.truth, "position": list(room.position)}


def measure_player(frame: np.ndarray, truth: dict[str, Any]) -> Player:
    """Find the player: the largest part of a frame (H, W, 3) uint8 whose pixels are nearest to the player's colour."""
    colors = np.array([truth[name] for name in ("color", "ground", "wall_color", "ball_color")])
    distance = np.linalg.norm(frame[:, :, None].astype(float) / 255 - colors, axis=-1)
    labels = connected((distance.argmin(-1) == 0)[None])[0]
    names, counts = np.unique(labels[labels > 0], return_counts=True)
    if not len(names) or counts.max() < _MIN_AREA * (len(frame) / SIDE) ** 2:
        return Player(np.full(2, np.nan), None)
    y, x = np.nonzero(labels == names[counts.argmax()])
    fill = counts.max() / ((np.ptp(y) + 1) * (np.ptp(x) + 1))
    center = np.array([x.mean(), y.mean()]) + 0.5
    offset = np.array([0.0, player_offset(truth["shape"])])
    return Player(center * SIDE / len(frame) - offset, shape_of_fill(fill))


def expected_move(truth: dict[str, Any], center: np.ndarray, action: int, frames: int) -> np.ndarray:
    """How far the environment would move a player that stands at `center`."""
    room = Room.like(truth)
    room.position = center.copy()
    for _ in range(frames):
        room.step(action)
    return room.position - center


class RoomReport(NamedTuple):
    """What rollouts of the room show.

    moved: per group, whether the player moved as its action says. blocked: per group in which a wall stops it, whether it held. errors:
    horizon -> distance in pixels from the truth of each rollout (infinite if the player is lost). right: per rollout, whether
    shape and colour are right at the end.
    """

    moved: list[bool]
    blocked: list[bool]
    errors: dict[int, list[float]]
    right: list[bool]


def measure_rollouts(rollouts: Sequence[Rollout], horizons: Sequence[int], group: int) -> RoomReport:
    """Measure every group of every rollout."""
    moved, blocked, right = [], [], []
    errors: dict[int, list[float]] = {horizon: [] for horizon in horizons}
    for rollout in rollouts:
        truth = rollout.truth.states[0]
        seen = [measure_player(frame, truth) for frame in rollout.frames]
        for before, after, action in zip(seen, seen[1:], rollout.truth.actions, strict=False):
            if np.isnan(before.center).any():
                moved.append(False)
                continue
            move = expected_move(truth, np.clip(before.center, HALF, SIDE - HALF), action, group)
            error = np.linalg.norm(after.center - before.center - move)
            moved.append(bool(error <= TOLERANCE))
            if action and np.abs(move).sum() < 2 * group - TOLERANCE:
                blocked.append(bool(not np.isnan(after.center).any() and _depth(truth, after.center) <= INTO_WALL))
        for horizon in horizons:
            if horizon < len(seen):
                error = np.linalg.norm(seen[horizon].center - rollout.truth.states[horizon]["position"])
                errors[horizon].append(float("inf") if np.isnan(error) else float(error))
        right.append(seen[-1].shape == truth["shape"])
    return RoomReport(moved, blocked, errors, right)


def _depth(truth: dict[str, Any], center: np.ndarray) -> float:
    """How far the player's box reaches into a wall or beyond the border, in pixels."""
    low, high = center - HALF, center + HALF
    depths = [float(max(-low.min(), high.max() - SIDE))]
    for left, top, right, bottom in np.array(truth["walls"]):
        overlap = np.minimum(high, [right, bottom]) - np.maximum(low, [left, top])
        depths.append(float(overlap.min()))
    return max(depths)

"""Measurements of the room that ships, in pixels: where the player is, what it is, and whether it moved as told."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from stdit.data.shapes import COLORS, SHAPES, signed_distance
from stdit.evaluation.shapes import connected
from stdit.evaluation.worlds import HORIZONS, DreamedEpisode
from stdit.worlds.room import HALF, SIDE, SPEED, Room, player_offset, player_size

TOLERANCE = 3.0  # pixels of 64 between the move of a group and that which the environment would make
INTO_WALL = 2.5  # pixels by which an outline may reach into a wall: of blur
_PALETTE = list(COLORS.values())
_MIN_AREA = 24.0  # pixels; less is no player
_NEAR = 2


class Player(NamedTuple):
    """The player as it is measured in a frame: centre of its box (x, y), nan if there is none; and the shape and the one of
    `COLORS` whose drawing is most like it."""

    center: np.ndarray
    shape: str | None
    color: str | None


def state(room: Room) -> dict[str, Any]:
    """What the judge needs to know of a room: what does not change, and where the player is."""
    return {**room.truth, "name": room.object_name, "position": list(room.position)}


def measure_player(frame: np.ndarray, truth: dict[str, Any]) -> Player:
    """Find the player: the largest part of a frame (H, W, 3) uint8 that is nearer to any of `COLORS` than to greys.

    Ground, walls and ball are grey.
    """
    pixels = frame.astype(float) / 255
    greys = np.array([truth[name] for name in ("ground", "wall_color", "ball_color")])
    to_colors, to_greys = (
        np.linalg.norm(pixels[:, :, None] - np.array(colors), axis=-1) for colors in (_PALETTE, greys)
    )
    labels = connected((to_colors.min(-1) < to_greys.min(-1))[None])[0]
    names, counts = np.unique(labels[labels > 0], return_counts=True)
    if not len(names) or counts.max() < _MIN_AREA * (len(frame) / SIDE) ** 2:
        return Player(np.full(2, np.nan), None, None)
    y, x = np.nonzero(labels == names[counts.argmax()])
    centroid = (np.array([x.mean(), y.mean()]) + 0.5) * SIDE / len(frame)
    shape, color = _most_like(pixels, centroid, ground=np.array(truth["ground"]))
    return Player(centroid - np.array([0.0, player_offset(truth["shape"])]), shape, color)


def _most_like(pixels: np.ndarray, centroid: np.ndarray, ground: np.ndarray) -> tuple[str, str]:
    """The shape and colour whose drawing on a plain ground, at most `_NEAR` pixels from a centroid, is nearest to the pixels."""
    pixel = SIDE / len(pixels)
    grid = (np.arange(len(pixels)) + 0.5) * pixel
    near = np.arange(-_NEAR, _NEAR + 1)
    places = [(shape, x, y) for shape in SHAPES for x in near + centroid[0] for y in near + centroid[1]]
    covers = np.stack([
        np.clip(0.5 - signed_distance(shape, player_size(shape), grid[None] - x, grid[:, None] - y) / pixel, 0, 1).ravel()
        for shape, x, y in places
    ])  # fmt: skip
    difference, colors = (pixels - ground).reshape(-1, 3), np.array(_PALETTE) - ground
    # Squared error of cover * color, less what is the same for all drawings.
    errors = (covers**2).sum(1)[:, None] * (colors**2).sum(1) - 2 * covers @ difference @ colors.T
    place, color = np.unravel_index(errors.argmin(), errors.shape)
    return places[place][0], list(COLORS)[color]


def expected_move(truth: dict[str, Any], center: np.ndarray, action: int, frames: int) -> np.ndarray:
    """How far the environment would move a player that stands at `center`, or at the nearest place where one can stand."""
    room = Room.like(truth)
    start = np.clip(SPEED * np.round(center / SPEED), HALF, SIDE - HALF)
    room.position = start
    for _ in range(frames):
        room.step(action)
    return room.position - start


def measure_rollouts(dreams: Sequence[DreamedEpisode], group: int) -> dict[str, Any]:
    """Measure every group of every rollout.

    Distances are in pixels of 64, medians over rollouts, infinite where the player is lost. A wall holds if the player's box
    reaches no more than `INTO_WALL` into it in a group in which the environment would have stopped it.
    """
    moved, held, right = [], [], []
    errors: dict[int, list[float]] = {}
    for one in dreams:
        truth = one.truth.states[0]
        players = [measure_player(frame, truth) for frame in one.lasts]
        for before, after, action in zip(players, players[1:], one.truth.actions, strict=False):
            if np.isnan(before.center).any():
                moved.append(False)
                continue
            move = expected_move(truth, before.center, action, group)
            moved.append(bool(np.linalg.norm(after.center - before.center - move) <= TOLERANCE))
            if action and np.abs(move).sum() < SPEED * group - TOLERANCE:
                held.append(bool(not np.isnan(after.center).any() and _depth(truth, after.center) <= INTO_WALL))
        for horizon in HORIZONS:
            if horizon < len(players):
                error = np.linalg.norm(players[horizon].center - one.truth.states[horizon]["position"])
                errors.setdefault(horizon, []).append(float("inf") if np.isnan(error) else float(error))
        right.append(f"{players[-1].color} {players[-1].shape}" == truth["name"])
    return {
        "moves as its action says": float(np.mean(moved)),
        "walls hold": float(np.mean(held)) if held else None,
        "attempts to pass a wall": len(held),
        "distance from the truth after so many actions, px": {n: float(np.median(e)) for n, e in errors.items()},
        "shape and colour right at the end": float(np.mean(right)),
    }


def _depth(truth: dict[str, Any], center: np.ndarray) -> float:
    """How far the player's box reaches into a wall or beyond the border, in pixels."""
    low, high = center - HALF, center + HALF
    depths = [float(max(-low.min(), high.max() - SIDE))]
    for left, top, right, bottom in np.array(truth["walls"]):
        overlap = np.minimum(high, [right, bottom]) - np.maximum(low, [left, top])
        depths.append(float(overlap.min()))
    return max(depths)

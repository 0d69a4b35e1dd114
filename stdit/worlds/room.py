"""The world that ships: a shape that four keys move between walls, and a ball that bounces by itself."""

from typing import Any, NamedTuple

import numpy as np

from stdit.data.shapes import COLORS, SHAPES, shape_extent, signed_distance

ACTIONS = {"stay": (0, 0), "up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}
SIDE = 64  # lengths below are in pixels of a picture of this side; others are scaled
HALF = 8  # half the side of the player's box
SPEED = 4  # per frame, of the player
BALL, BALL_SPEED = 4, 2  # radius, and speed per frame along both axes
GROUNDS = ((0.15, 0.95), (0.82, 0.05))  # greys of the ground and of the ball on it
WALL = 0.5
GRID = 16  # walls and player are drawn on this grid: an action that lasts four frames is one step on it


class Discrete(NamedTuple):
    """The space of `n` actions, as Gymnasium's class of that name."""

    n: int


class Walls(NamedTuple):
    """Rectangles (N, 4) that nothing passes: left, top, right, bottom."""

    boxes: np.ndarray

    def hit(self, center: np.ndarray, half: float) -> bool:
        """Whether a box around a centre would overlap a wall or leave the picture."""
        low, high = center - half, center + half
        if (low < 0).any() or (high > SIDE).any():
            return True
        return bool(((self.boxes[:, :2] < high) & (self.boxes[:, 2:] > low)).all(1).any())


class Room:
    """A coloured shape on a plain ground. Shape, colours, walls and the ball's path are drawn at `reset`.

    The interface is Gymnasium's: `reset(seed=)` -> picture, info; `step(action)` -> picture, reward (always 0), terminated
    and truncated (never), info; `render()` -> picture (H, W, 3) uint8. An action is the number of one of `ACTIONS` and
    lasts one frame. info: position and ball (x, y in pixels of the picture), and blocked: whether a wall has stopped the
    last action. `truth` has what does not change.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 16}
    action_names = tuple(ACTIONS)

    def __init__(self, render_mode: str = "rgb_array", size: int = SIDE):
        if render_mode != "rgb_array":
            raise ValueError(f"render_mode={render_mode!r} is unknown; this world is only drawn: use 'rgb_array'.")
        if size < 32 or size % 8:
            raise ValueError(f"size={size} is no multiple of 8 from 32; use 64.")
        self.render_mode, self.size = render_mode, size
        self._rng = np.random.default_rng()
        self.action_space = Discrete(len(ACTIONS))
        self.reset(seed=0)

    @property
    def unwrapped(self) -> "Room":
        """The environment itself, as in Gymnasium."""
        return self

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Draw a new room, a pure function of the seed."""
        rng = self._rng = np.random.default_rng(seed) if seed is not None else self._rng
        self.shape = SHAPES[rng.integers(len(SHAPES))]
        self.color = np.array(list(COLORS.values())[rng.integers(len(COLORS))])
        ground, ball = GROUNDS[rng.integers(len(GROUNDS))]
        self.ground, self.ball_color, self.wall_color = (np.full(3, grey) for grey in (ground, ball, WALL))
        self.walls = Walls(np.array([_draw_wall(rng) for _ in range(2)]))
        self.position, self.ball = (self._draw_free(rng, half) for half in (HALF, BALL))
        self.velocity = BALL_SPEED * rng.choice([-1.0, 1.0], size=2)
        self.blocked = False
        return self.render(), self._info()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take an action for one frame."""
        if not 0 <= int(action) < len(ACTIONS):
            raise ValueError(f"action {action} is out of range; use 0 to {len(ACTIONS) - 1} ({', '.join(ACTIONS)}).")
        move = SPEED * np.array(list(ACTIONS.values())[int(action)], dtype=float)
        self.blocked = self.walls.hit(self.position + move, HALF)
        if not self.blocked:
            self.position = self.position + move
        for axis in range(2):
            moved = self.ball.copy()
            moved[axis] += self.velocity[axis]
            if self.walls.hit(moved, BALL):
                self.velocity[axis] *= -1
            else:
                self.ball = moved
        return self.render(), 0.0, False, False, self._info()

    def render(self) -> np.ndarray:
        """The picture (H, W, 3) uint8, with anti-aliased edges."""
        pixel = SIDE / self.size
        grid = (np.arange(self.size) + 0.5) * pixel
        x, y = grid[None, :], grid[:, None]
        picture = np.broadcast_to(self.ground, (self.size, self.size, 3))
        left, top, right, bottom = (edge[:, None, None] for edge in self.walls.boxes.T)
        walls = np.maximum(np.maximum(left - x, x - right), np.maximum(top - y, y - bottom)).min(0)
        size, offset = player_size(self.shape), player_offset(self.shape)
        player = signed_distance(self.shape, size, x - self.position[0], y - self.position[1] - offset)
        ball = np.hypot(x - self.ball[0], y - self.ball[1]) - BALL
        for distance, color in ((walls, self.wall_color), (ball, self.ball_color), (player, self.color)):
            cover = np.clip(0.5 - distance / pixel, 0, 1)[..., None]
            picture = cover * color + (1 - cover) * picture
        return np.round(picture * 255).astype(np.uint8)

    @property
    def object_name(self) -> str:
        """Colour and shape of the player, such as "red circle"."""
        name = min(COLORS, key=lambda one: float(np.linalg.norm(np.subtract(COLORS[one], self.color))))
        return f"{name} {self.shape}"

    @classmethod
    def like(cls, truth: dict[str, Any], size: int = SIDE) -> "Room":
        """A room whose `truth` is this one."""
        room = cls(size=size)
        room.shape, room.walls = truth["shape"], Walls(np.array(truth["walls"]))
        for name in ("color", "ball_color", "ground", "wall_color"):
            setattr(room, name, np.array(truth[name]))
        return room

    @property
    def truth(self) -> dict[str, Any]:
        """What does not change until the next reset, as plain values: shape, colours in [0, 1], walls in pixels of 64."""
        colors = {
            "color": self.color,
            "ball_color": self.ball_color,
            "ground": self.ground,
            "wall_color": self.wall_color,
        }
        plain = {name: value.tolist() for name, value in colors.items()}
        return {"shape": self.shape, **plain, "walls": self.walls.boxes.tolist()}

    def close(self) -> None:
        """Nothing is open."""

    def _info(self) -> dict[str, Any]:
        scale = self.size / SIDE
        return {
            "position": (self.position * scale).tolist(), "ball": (self.ball * scale).tolist(), "blocked": self.blocked,
        }  # fmt: skip

    def _draw_free(self, rng: np.random.Generator, half: int) -> np.ndarray:
        """The centre of a box that overlaps no wall, on a grid of its own size."""
        while True:
            center = half + 2 * half * rng.integers(SIDE // (2 * half), size=2).astype(float)
            if not self.walls.hit(center, half):
                return center


def _draw_wall(rng: np.random.Generator) -> list[int]:
    """A bar of one or two places of the grid."""
    length = GRID * int(rng.integers(1, 3))
    extent = [length, GRID] if rng.random() < 0.5 else [GRID, length]
    begin = [GRID * int(rng.integers((SIDE - along) // GRID + 1)) for along in extent]
    return [*begin, *(int(first + along) for first, along in zip(begin, extent, strict=True))]


def player_size(shape: str) -> float:
    """The size at which a shape fills the player's box."""
    left, right, up, down = shape_extent(shape)
    return 2 * HALF / max(left + right, up + down)


def player_offset(shape: str) -> float:
    """How far the centroid of a shape lies below the middle of the player's box, in pixels of 64."""
    _, _, up, down = shape_extent(shape)
    return player_size(shape) * (up - down) / 2

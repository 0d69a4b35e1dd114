"""Clips of moving shapes, drawn from known parameters, for quick training runs and their evaluation."""

from dataclasses import asdict, dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
CLASS_NAMES = tuple(f"{shape} {direction}" for shape in SHAPES for direction in DIRECTIONS)

# Colours of objects by the names used in captions; the colour of each clip varies a little around these.
COLORS = {
    "red": (0.88, 0.14, 0.14),
    "orange": (0.94, 0.52, 0.10),
    "yellow": (0.94, 0.88, 0.16),
    "green": (0.14, 0.68, 0.24),
    "cyan": (0.14, 0.78, 0.84),
    "blue": (0.14, 0.28, 0.90),
    "purple": (0.54, 0.18, 0.78),
    "pink": (0.94, 0.50, 0.74),
}
# The classes of bouncing objects, whose direction changes: colour and shape.
OBJECT_NAMES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)

# Extent of each shape from its centroid in units of `size`: left, right, up, down. `size` is the radius of the circle
# of equal area, so that shapes cannot be distinguished by their area.
_TRIANGLE_SIDE = np.sqrt(4 * np.pi / np.sqrt(3))
_EXTENTS = {
    "circle": (1.0, 1.0, 1.0, 1.0),
    "square": (np.sqrt(np.pi) / 2,) * 4,
    "triangle": (_TRIANGLE_SIDE / 2, _TRIANGLE_SIDE / 2, _TRIANGLE_SIDE / np.sqrt(3), _TRIANGLE_SIDE / np.sqrt(12)),
}
_MARGIN = 1.5  # pixels between object and border


@dataclass
class ShapeClip:
    """The parameters of one clip: lengths in pixels, x to the right, y down; colours in [0, 1]; speed per frame."""

    shape: str
    direction: str
    speed: float
    start: list[float]
    size: float
    color: list[float]
    background: list[float]
    motion: str = "straight"
    frames: int = 17
    frame_size: int = 64

    @property
    def label(self) -> int:
        """The index of shape and (initial) direction in `CLASS_NAMES`."""
        return CLASS_NAMES.index(f"{self.shape} {self.direction}")

    @property
    def color_name(self) -> str:
        """The name of the nearest colour in `COLORS`."""
        return min(COLORS, key=lambda name: float(np.linalg.norm(np.subtract(COLORS[name], self.color))))

    @property
    def object_name(self) -> str:
        """Colour and shape, one of `OBJECT_NAMES`."""
        return f"{self.color_name} {self.shape}"

    @property
    def class_name(self) -> str:
        """The class of the clip: one of `CLASS_NAMES`, or of `OBJECT_NAMES` if the object bounces."""
        return self.object_name if self.motion == "bounce" else CLASS_NAMES[self.label]

    @property
    def caption(self) -> str:
        """A sentence such as "a red circle moves left"."""
        article = "an" if self.color_name[0] in "aeiou" else "a"
        verb = "bounces" if self.motion == "bounce" else f"moves {self.direction}"
        return f"{article} {self.object_name} {verb}"

    def truth(self) -> dict:
        """The parameters that a manifest records, as a dictionary."""
        keys = ("shape", "direction", "speed", "start", "size", "color", "background")
        return {key: value for key, value in asdict(self).items() if key in keys}

    def centers(self) -> np.ndarray:
        """The centroid of the object in each frame, (F, 2) as x and y in pixels."""
        steps = np.arange(self.frames)[:, None] * self.speed * np.array(DIRECTIONS[self.direction])
        path = np.array(self.start) + steps
        if self.motion == "bounce":
            low, high = _center_range(self.shape, self.size, self.frame_size)
            path = low + _reflect(path - low, high - low)
        return path


def _center_range(shape: str, size: float, frame_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and highest (x, y) of the centroid at which the shape is clear of the border."""
    left, right, up, down = (extent * size + _MARGIN for extent in _EXTENTS[shape])
    return np.array([left, up]), np.array([frame_size - right, frame_size - down])


def _reflect(distance: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Positions of a point that is reflected at 0 and at `length`, from its unreflected positions."""
    folded = np.mod(distance, 2 * length)
    return np.where(folded > length, 2 * length - folded, folded)


def random_clip(
    rng: np.random.Generator,
    label: int | None = None,
    frames: int = 17,
    frame_size: int = 64,
    motion: str = "straight",
) -> ShapeClip:
    """Draw the parameters of one clip at random; the object stays clear of the border in every frame.

    With `motion="straight"` start and speed are chosen accordingly; with `motion="bounce"` the object is reflected.
    """
    label = int(rng.integers(len(CLASS_NAMES))) if label is None else label
    shape, direction = CLASS_NAMES[label].split()
    size = rng.uniform(0.14, 0.20) * frame_size
    low, high = _center_range(shape, size, frame_size)
    axis = 0 if direction in ("left", "right") else 1
    room = (high - low)[axis]
    speed = rng.uniform(0.012, 0.03) * frame_size
    start = rng.uniform(low, high)
    if motion == "straight":
        speed = min(speed, rng.uniform(0.7, 1.0) * room / max(frames - 1, 1))
        sign = DIRECTIONS[direction][axis]
        travel = speed * (frames - 1)
        start[axis] = rng.uniform(low[axis] + (travel if sign < 0 else 0), high[axis] - (travel if sign > 0 else 0))
    elif motion != "bounce":
        raise ValueError(f"motion={motion!r} is unknown; choose one of: straight, bounce.")
    color, background = _two_colors(rng)
    return ShapeClip(
        shape=shape,
        direction=direction,
        speed=float(speed),
        start=[float(v) for v in start],
        size=float(size),
        color=[float(v) for v in color],
        background=[float(v) for v in background],
        motion=motion,
        frames=frames,
        frame_size=frame_size,
    )


def _two_colors(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An object colour near one of `COLORS` and a nearly grey background, dark or light, with enough contrast."""
    color = np.array(list(COLORS.values()))[rng.integers(len(COLORS))] + rng.uniform(-0.05, 0.05, 3)
    while True:
        grey = rng.uniform(0.05, 0.30) if rng.random() < 0.5 else rng.uniform(0.70, 0.95)
        background = np.clip(grey + rng.uniform(-0.1, 0.1, 3), 0, 1)
        # Rec. 601 luma: shapes stay visible in grey too. The thresholds keep colour and background clearly different.
        luma = abs(np.dot(color - background, [0.299, 0.587, 0.114]))
        if np.linalg.norm(color - background) > 0.5 and luma > 0.15:
            return color, background


def shape_extent(shape: str) -> tuple[float, float, float, float]:
    """How far a shape of size 1 reaches from its centroid: left, right, up, down."""
    return _EXTENTS[shape]


def signed_distance(shape: str, size: float, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """The signed distance in pixels to the outline of a shape, negative inside; exact except outside of corners.

    dx, dy: positions relative to the centroid.
    """
    if shape == "circle":
        return np.hypot(dx, dy) - size
    if shape == "square":
        return np.maximum(abs(dx), abs(dy)) - _EXTENTS["square"][0] * size
    inradius = _EXTENTS["triangle"][3] * size
    slanted = abs(dx) * np.sqrt(3) / 2 - dy / 2
    return np.maximum(dy, slanted) - inradius


def draw(clip: ShapeClip) -> np.ndarray:
    """Render a clip with anti-aliased edges -> (F, H, W, 3) uint8."""
    grid = np.arange(clip.frame_size) + 0.5
    centers = clip.centers()
    dx = grid[None, None, :] - centers[:, 0, None, None]
    dy = grid[None, :, None] - centers[:, 1, None, None]
    cover = np.clip(0.5 - signed_distance(clip.shape, clip.size, dx, dy), 0, 1)[..., None]
    picture = cover * np.array(clip.color) + (1 - cover) * np.array(clip.background)
    return np.round(picture * 255).astype(np.uint8)

"""The config of the training data."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class DataConfig:
    """The clips to train on, their size, and how they are read."""

    root: str = "data/clips"  # folder (or idx file) of the data
    manifest: str | None = None  # CSV or JSON lines: path, label, caption, further columns; null: scan root
    source: Literal["auto", "videos", "images", "idx", "latents", "shapes"] = "auto"  # kind of data; auto: inferred
    num_frames: int = 17  # pixel frames of a clip; 1 for images
    height: int = 64  # height in pixels
    width: int = 64  # width in pixels
    sizes: list[list[int]] = field(
        default_factory=list
    )  # bucket sizes, [frames, height, width] each; needs train.tokens
    packing: bool = False  # pack clips of all sizes into one sequence without padding, instead of batches of one size
    fps: float | None = None  # pick frames at this rate by their time stamps; null: consecutive frames, at any rate
    crop: Literal["center", "random"] = "center"  # position of the crop
    flip: bool = False  # mirror half of the clips, drawn at random, left to right
    backend: Literal["pyav", "decord", "torchcodec"] = "pyav"  # video decoder
    workers: int | None = None  # processes that load data; 0: the main process; null: by the number of cores
    timeout: float = 60.0  # seconds that reading one clip may take in such a process before it is replaced
    num_shapes: int = 3000  # number of clips with source=shapes
    motion: Literal["straight", "bounce"] = "straight"  # motion of the shapes with source=shapes
    max_bad_fraction: float = 0.1  # fraction of unreadable files above which training stops

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width", "num_shapes"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be >= 1, got {getattr(self, name)}.")
        for size in self.sizes:
            if len(size) != 3 or min(size) < 1:
                raise ValueError(f"data.sizes has {size}; write each size as [frames, height, width], each 1 or more.")
        if self.packing and not self.sizes:
            raise ValueError("data.packing=true needs data.sizes, the shapes that clips may have.")
        if self.fps is not None and self.fps <= 0:
            raise ValueError(f"data.fps must be > 0, got {self.fps}; use null to take consecutive frames at any rate.")
        if self.workers is not None and self.workers < 0:
            raise ValueError(
                f"data.workers must be >= 0 or null, got {self.workers}; use 0 to load in the main process."
            )
        if not 0 < self.timeout < float("inf"):
            raise ValueError(f"data.timeout must be a number of seconds > 0, got {self.timeout}.")

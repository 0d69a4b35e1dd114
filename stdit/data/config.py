"""What of the data a person chooses."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class DataConfig:
    """`fps` null takes neighbouring frames whatever their rate; otherwise frames are picked by time stamps."""

    root: str = "data/clips"  # folder (or idx file) of the data
    manifest: str | None = None  # CSV or JSON lines: path, label, caption, further columns; null: scan root
    source: Literal["auto", "videos", "images", "idx", "latents", "shapes"] = "auto"  # kind of data; values below
    num_frames: int = 17  # pixel frames of a clip; 1 for images
    height: int = 64  # height in pixels
    width: int = 64  # width in pixels
    sizes: list[list[int]] = field(default_factory=list)  # buckets: [frames, height, width] each; needs train.tokens
    packing: bool = False  # clips of all sizes in one sequence without padding, instead of a batch of one size
    fps: float | None = None  # pick frames at this rate by time stamps; null: neighbouring frames, at any rate
    crop: Literal["center", "random"] = "center"  # where a clip is cut to the size
    flip: bool = False  # mirror half of the clips
    backend: Literal["pyav", "decord", "torchcodec"] = "pyav"  # video decoder
    workers: int = 2  # loader processes; 0: none
    num_shapes: int = 3000  # for source=shapes: how many clips are drawn
    motion: Literal["straight", "bounce"] = "straight"  # for source=shapes: how shapes move
    max_bad_fraction: float = 0.1  # training stops when more of the files than this cannot be read

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} is not a size; use 1 or more.")
        for size in self.sizes:
            if len(size) != 3 or min(size) < 1:
                raise ValueError(f"data.sizes holds {size}; a size is [frames, height, width], each 1 or more.")
        if self.packing and not self.sizes:
            raise ValueError("data.packing=true needs data.sizes, the shapes that clips may have.")
        if self.fps is not None and self.fps <= 0:
            raise ValueError(
                f"data.fps={self.fps} is not a frame rate; use a positive number, or null for each file's own."
            )
        if self.workers < 0:
            raise ValueError(f"data.workers={self.workers} is negative; use 0 to load in the main process.")

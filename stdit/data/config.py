"""The config of the training data."""

from dataclasses import dataclass, field
from typing import Literal

from stdit.ranges import check_ranges

_RANGES = {
    "num_frames": "[1, inf)", "height": "[1, inf)", "width": "[1, inf)", "fps": "(0, inf)", "workers": "[0, inf)",
    "timeout": "(0, inf)", "order_window": "[1, inf)", "num_shapes": "[1, inf)", "max_bad_fraction": "[0, 1]",
}  # fmt: skip


@dataclass
class DatasetConfig:
    """One of several data sets: where it lies, how it is read, and how often its clips are drawn."""

    root: str = ""  # as data.root
    weight: float = 1.0  # share of the clips that come from it, relative to the weights of the others
    manifest: str | None = None  # as data.manifest
    columns: dict[str, str] = field(default_factory=dict)  # as data.columns
    source: Literal["auto", "videos", "images", "idx", "latents", "shapes", "lerobot", "tar", "datasets", "curate"] = (
        "auto"  # as data.source
    )
    camera: str | None = None  # as data.camera

    def __post_init__(self) -> None:
        check_ranges(
            "data.datasets", self, {"weight": "(0, inf)"}, weight="leave a data set out to draw nothing from it"
        )
        if not self.root and self.source != "shapes":
            raise ValueError("an entry of data.datasets has no root; write {root: FOLDER, weight: 1}.")


@dataclass
class DataConfig:
    """The clips to train on, their size, and how they are read."""

    root: str = "data/clips"  # folder (or idx file) of the data, or the URL of one, such as s3://bucket/clips
    manifest: str | None = None  # CSV or JSON lines: path, label, caption, further columns; null: scan root
    index: str | None = (
        None  # NAME.index: a training makes it of root or manifest, or brings it up to date, and reads it in their place
    )
    columns: dict[str, str] = field(
        default_factory=dict
    )  # names of the manifest's columns that are path, label and caption, if others: {path: video, caption: text}
    source: Literal["auto", "videos", "images", "idx", "latents", "shapes", "lerobot", "tar", "datasets", "curate"] = (
        "auto"  # auto: inferred
    )
    camera: str | None = None  # source=lerobot: the camera, if there are several
    num_frames: int = 17  # pixel frames of a clip; 1 for images
    height: int = 64  # height in pixels
    width: int = 64  # width in pixels
    sizes: list[list[int]] = field(
        default_factory=list
    )  # bucket sizes, [frames, height, width] each; needs train.tokens
    packing: bool = False  # pack clips of all sizes into one sequence without padding, instead of batches of one size
    fps: float | None = None  # pick frames at this rate by their time stamps; null: consecutive frames, at any rate
    order: Literal["uniform", "blocked"] = "uniform"  # blocked: few shards at a time, for tar shards and cached latents
    order_window: int = 16  # order=blocked: shards whose clips are shuffled among each other
    crop: Literal["center", "random"] = "center"  # position of the crop
    flip: bool = False  # mirror half of the clips, drawn at random, left to right
    cache_dtype: Literal["float16", "float32"] = "float16"  # of the latents that `stdit cache-latents` writes
    cache_posterior: Literal["mean", "sample", "moments"] = (
        "mean"  # what it keeps of a VAE's posterior: its mean, one draw, or mean and deviation, from which every step draws
    )
    backend: Literal["pyav", "decord", "torchcodec"] = "pyav"  # video decoder
    workers: int | None = None  # processes that load data; 0: the main process; null: by the number of cores
    timeout: float = 60.0  # seconds that reading one clip may take in such a process before it is replaced
    num_shapes: int = 3000  # number of clips with source=shapes
    motion: Literal["straight", "bounce"] = "straight"  # motion of the shapes with source=shapes
    datasets: list[DatasetConfig] = field(
        default_factory=list
    )  # several data sets in place of data.root: [{root: a, weight: 3}, {root: b}]
    max_bad_fraction: float = 0.1  # fraction of unreadable files above which training stops

    def __post_init__(self) -> None:
        check_ranges(
            "data", self, _RANGES,
            fps="null takes consecutive frames at any rate",
            workers="0 loads in the main process",
        )  # fmt: skip
        for size in self.sizes:
            if len(size) != 3 or min(size) < 1:
                raise ValueError(f"data.sizes has {size}; write each size as [frames, height, width], each 1 or more.")
        if self.packing and not self.sizes:
            raise ValueError("data.packing=true needs data.sizes, the shapes that clips may have.")

"""What is measured of a media file, and the rules by which training accepts, enlarges or refuses it."""

from collections.abc import Sequence
from typing import NamedTuple, Self

from stdit.data.config import DataConfig


class Facts(NamedTuple):
    """A media file as it is read: frames, the time of the last one in seconds, frames per second, and pixels.

    An image has one frame and fps 0. rotation: degrees by which the frames are stored turned. codec: its name, empty for
    pictures.
    """

    frames: int
    last: float
    fps: float
    height: int
    width: int
    rotation: int = 0
    codec: str = ""

    @classmethod
    def of_image(cls, height: int, width: int) -> Self:
        """The facts of a picture."""
        return cls(frames=1, last=0.0, fps=0.0, height=height, width=width)

    @property
    def is_image(self) -> bool:
        """Whether the file is a picture."""
        return self.fps == 0


class Inspection(NamedTuple):
    """What training does with a media file.

    facts: None if it cannot be read. refused: why it is left out, None if it is used. notes: what is worth knowing of its use.
    """

    facts: Facts | None
    refused: str | None
    notes: tuple[str, ...] = ()


def frames_at_rate(frames: int, last: float, fps: float | None) -> int:
    """The number of frames that a clip has when they are picked at `fps` (None: its own frames)."""
    return frames if fps is None else int(last * fps + 0.5) + 1


def too_short(frames: int, last: float, num_frames: int, *, fps: float | None) -> str | None:
    """The reason why a clip is too short for `num_frames`, with a remedy; None if it is long enough."""
    if frames_at_rate(frames, last, fps) >= num_frames:
        return None
    if fps is None:
        return f"has {frames} frames of the {num_frames} needed; lower data.num_frames or leave it out"
    needed = (num_frames - 1) / fps
    return f"lasts {last:.2f} s of the {needed:.2f} s needed; raise data.fps, lower data.num_frames or leave it out"


def no_clip(num_frames: int) -> str | None:
    """The reason why a picture is no clip of `num_frames`, with a remedy; None if it is one."""
    if num_frames <= 1:
        return None
    return f"is an image, but a clip of {num_frames} frames is needed; leave it out, or give images a size of 1 frame"


def assess(facts: Facts, config: DataConfig) -> Inspection:
    """Apply the rules of length, rate and size of a config to a file."""
    sizes: Sequence[Sequence[int]] = config.sizes or [[config.num_frames, config.height, config.width]]
    shortest = min(size[0] for size in sizes)
    if facts.is_image:
        reason = no_clip(shortest)
    else:
        reason = too_short(facts.frames, facts.last, shortest, fps=config.fps)
    if reason is not None:
        return Inspection(facts, reason)
    notes = []
    if shortest > 1 and config.fps is not None and config.fps > 1.01 * facts.fps:
        notes.append(f"has {facts.fps:.4g} frames a second, fewer than data.fps={config.fps:g}: frames are repeated")
    enlarged = min(max(height / facts.height, width / facts.width) for _, height, width in sizes)
    if enlarged > 1:
        notes.append(f"is smaller than the size of the config: enlarged {enlarged:.3g} times")
    return Inspection(facts, None, tuple(notes))

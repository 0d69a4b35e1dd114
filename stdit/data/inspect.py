"""Whether training can use a media file, and what it should say of it, before a run."""

from pathlib import Path

from stdit.data.backends import open_video
from stdit.data.clips import facts_of
from stdit.data.config import DataConfig
from stdit.data.facts import Facts, Inspection, assess
from stdit.data.media import VideoError, is_picture
from stdit.data.pictures import picture_size, read_picture


def inspect(path: Path, config: DataConfig | None = None, *, decode: bool = False) -> Inspection:
    """Open a file as training does, and apply the rules of length, rate and size of a config (None: one frame is enough).

    decode: decode every frame, since damage inside a file is found in no other way. MemoryError where memory runs out, which
    says nothing of the file.
    """
    path = Path(path)
    try:
        facts = measure(path, config.backend if config else "pyav", decode=decode)
    except VideoError as error:
        if isinstance(error.__cause__, MemoryError):
            raise error.__cause__ from None
        return Inspection(None, str(error).removeprefix(repr(str(path))).strip().removesuffix("."))
    return assess(facts, config) if config else Inspection(facts, None)


def measure(path: Path, backend: str = "pyav", *, decode: bool = False) -> Facts:
    """Measure a file; VideoError if it cannot be read. decode: decode every frame of it."""
    if is_picture(path):
        height, width = read_picture(path).shape[:2] if decode else picture_size(path)
        return Facts.of_image(height, width)
    with open_video(path, backend) as reader:
        size = reader.size
        for number in range(len(reader)) if decode else ():  # one at a time: a long clip takes no more memory
            frame = reader[number]
            if frame.shape[:2] != size:
                raise VideoError(
                    f"{str(path)!r} changes its frame size from {size[1]}x{size[0]} to {frame.shape[1]}x{frame.shape[0]} "
                    f"at frame {number}; split it there or leave it out."
                )
        return facts_of(reader)

"""The clips and pictures of the studio: uploads within bounds, pieces cut from them, and their frames as pictures.

Frames travel as sheets of WebP pictures, so that a page shows them exactly and needs no codec of video.
"""

import hashlib
import io
import math
import os
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from stdit.data.inputs import read_input
from stdit.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, VideoError, is_picture
from stdit.data.pictures import picture_size
from stdit.data.video_io import VideoReader
from stdit.data.video_write import to_uint8, write_video
from stdit.files import inside
from stdit.web.studio_problems import Fix, Refused, said_of

LARGEST_UPLOAD = 64 << 20  # bytes of a file
MOST_BYTES = 2 << 30  # of all files that were uploaded and cut
MOST_SECONDS = 60.0
MOST_PIXELS = 4096 * 2304  # of a frame
LARGEST_PICTURE = (4608, 8192)  # height and width; others of as many pixels too, as cameras take them
VIEW_PIXELS = 2**24  # of all frames of a clip that a page shows or a request generates
_ROW = 8  # frames in a row of a sheet, and rows, at most
_LARGEST_SIDE = 16_000  # pixels of a WebP picture
_CACHED = 24 << 20  # bytes of sheets that are held
_LOSSLESS = 2**21  # pixels up to which sheets are exact
INPUTS = "inputs"


class TooLong(Refused):
    """A clip has more frames at a look than a page can hold. fitting: the most of them."""

    def __init__(self, name: str, count: int, size: tuple[int, int], *fixes: Fix):
        self.fitting = VIEW_PIXELS // (size[0] * size[1])
        frames = f"{count} frames of {size[0]} x {size[1]}"
        super().__init__(f"{name} has {frames}, more than a page can hold; use at most {self.fitting} of them.", *fixes)


class Look(NamedTuple):
    """How a clip is looked at: resized and cropped to a size at a rate, as a model gets it; None: as it is."""

    height: int | None = None
    width: int | None = None
    fps: float | None = None


class View(NamedTuple):
    """Frames of a file as a page shows them. sheets: WebP pictures of `grid` (rows, columns) frames. source: (H, W) of the file."""

    frames: int
    size: tuple[int, int]
    fps: float
    note: str
    source: tuple[int, int]
    picture: bool
    sheets: list[bytes]
    grid: tuple[int, int]

    def facts(self) -> dict[str, Any]:
        """What a page is told besides the pictures."""
        (height, width), source = self.size, list(self.source)
        return {
            "frames": self.frames, "height": height, "width": width, "fps": self.fps, "note": self.note, "source": source,
            "picture": self.picture, "sheets": len(self.sheets), "rows": self.grid[0], "columns": self.grid[1],
        }  # fmt: skip


class Media:
    """The files under the studio's output folder, by their names relative to it."""

    def __init__(self, folder: Path):
        self.folder, self.inputs = folder, folder / INPUTS
        self._views: OrderedDict[tuple, View] = OrderedDict()

    def path(self, name: str) -> Path:
        """The path of a file by its name; Refused for one that is not there."""
        try:
            found = inside(self.folder, name, "the studio")
        except ValueError as error:
            raise Refused(str(error)) from error
        if not found.is_file() or found.suffix.lower() not in VIDEO_SUFFIXES | IMAGE_SUFFIXES or ".." in name:
            raise Refused(f"{Path(name).name} is gone from {self.folder}; choose another clip.")
        return self.folder / name

    def has(self, name: str) -> bool:
        """Whether there is a clip or picture of this name."""
        try:
            self.path(name)
        except Refused:
            return False
        return True

    async def receive(self, name: str, parts: AsyncIterator[bytes]) -> tuple[Path, bool]:
        """Write an upload -> its path, and whether it is new. Refused, and nothing is left, if it is too large or of another kind."""
        name = re.split(r"[/\\]", name)[-1]
        suffix = Path(name).suffix.lower()
        if suffix not in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
            raise Refused(
                f"{name[:60]!r} is no clip or picture by its name; give an mp4, webm, mov, gif, png, jpeg or webp file."
            )
        self._check_room()
        tmp = self.inputs / f".{os.getpid()}-{id(parts)}.part"
        digest, size = hashlib.sha256(), 0
        try:
            with open(tmp, "wb") as file:
                async for part in parts:
                    size += len(part)
                    if size > LARGEST_UPLOAD:
                        raise Refused(
                            f"{name[:60]!r} has more than the {LARGEST_UPLOAD >> 20} MB that are taken; compress or cut it."
                        )
                    digest.update(part)
                    file.write(part)
            stem = re.sub(r"[^A-Za-z0-9_]+", "-", Path(name).stem).strip("-")[:40] or "clip"
            path = self.inputs / f"{stem}-{digest.hexdigest()[:8]}{suffix}"
            new = not path.exists()
            if new:
                os.replace(tmp, path)
            return path, new
        except OSError as error:  # of the temporary name, which nobody knows
            raise OSError(error.errno, error.strerror or str(error), str(self.inputs)) from error
        finally:
            tmp.unlink(missing_ok=True)

    def _check_room(self) -> None:
        self.inputs.mkdir(parents=True, exist_ok=True)
        used = sum(path.stat().st_size for path in self.inputs.iterdir() if path.is_file())
        if used > MOST_BYTES:
            raise Refused(
                f"{self.inputs} holds {used / 2**30:.1f} GB, and {MOST_BYTES >> 30} are the most; remove some of its files."
            )

    def admit(self, path: Path, look: Look, *, new: bool = True, first: float | None = None) -> str:
        """Check an upload -> its name; Refused, and a new file is removed, if it cannot be used.

        first: of a clip that is too long, the seconds that are kept, as many of them as a page can hold.
        """
        try:
            if is_picture(path):
                height, width = picture_size(path)
                if height * width > math.prod(LARGEST_PICTURE):
                    most = "{1} x {0}".format(*LARGEST_PICTURE)
                    raise Refused(f"{path.name} has {width} x {height} pixels, and {most} are the most; scale it down.")
                self.view(path, look)
                return self.name(path)
            with VideoReader(path, max_pixels=MOST_PIXELS) as reader:
                seconds = float(reader.timestamps[-1]) + 1 / reader.fps
                count, size, rate = _extent(reader, look)
            fitting = VIEW_PIXELS // (size[0] * size[1])
            if first is None and (seconds > MOST_SECONDS or count > fitting):
                fits = min(MOST_SECONDS, fitting / rate)
                use = Fix(f"Use its first {fits:.3g} seconds", {"upload": {"first": fits}})
                if seconds > MOST_SECONDS:
                    raise Refused(f"{path.name} lasts {seconds:.0f} s, and {MOST_SECONDS:g} are the most.", use)
                raise TooLong(path.name, count, size, use)
            if first is not None and (seconds > first or count > fitting):
                begun = self.cut(path, look, 0, min(fitting, max(1, round(first * rate))))
                if new:  # a file that was there before stays
                    path.unlink()
                return begun
            self.view(path, look)
            return self.name(path)
        except BaseException:
            if new:
                path.unlink(missing_ok=True)
            raise

    def name(self, path: Path) -> str:
        """The name of a file under the folder."""
        return path.relative_to(self.folder).as_posix()

    def cut(self, path: Path, look: Look, begin: int, end: int) -> str:
        """Write frames [begin, end) at the size and rate of a look -> the name of the clip, or of the picture if it is one frame."""
        frames, _, _, fps, _ = _read(path, look, end)
        frames = frames[begin:end]
        if not len(frames):
            raise Refused(f"{path.name} has no frames {begin} to {end}; choose others.")
        self._check_room()
        digest = hashlib.sha256(frames.tobytes()).hexdigest()[:8]
        stem = re.sub(r"-[0-9a-f]{8}$", "", path.stem)
        cut = self.inputs / f"{stem[:40]}-{begin}-{end}-{digest}.{'png' if len(frames) == 1 else 'mp4'}"
        if not cut.is_file():
            write_video(cut, frames, fps, encoding="lossless")
        return self.name(cut)

    def view(self, path: Path, look: Look) -> View:
        """The frames of a file; Refused if they are too many, VideoError if it cannot be read."""
        state = path.stat()
        key = (str(path), state.st_mtime_ns, state.st_size, look)
        if key in self._views:
            self._views.move_to_end(key)
            return self._views[key]
        frames, note, source, fps, picture = _read(path, look)
        size = (frames.shape[1], frames.shape[2])
        grid = (min(_ROW, max(1, _LARGEST_SIDE // size[0])), min(_ROW, max(1, _LARGEST_SIDE // size[1])))
        sheets = list(_sheets(frames, *grid))
        found = View(len(frames), size, fps, note, source=source, picture=picture, sheets=sheets, grid=grid)
        self._views[key] = found
        while (
            sum(len(sheet) for view in self._views.values() for sheet in view.sheets) > _CACHED and len(self._views) > 1
        ):
            self._views.popitem(last=False)
        return found

    def converted(self, path: Path, suffix: str) -> Path:
        """The clip in another format, written beside it when it is first asked for."""
        other = path.with_suffix(suffix)
        if not other.is_file():
            frames, _, _, fps, _ = _read(path, Look())
            write_video(other, frames, fps)
        return other


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """A context manager in which a file that cannot be read is a Refused error, in one line."""
    try:
        yield
    except Refused:
        raise
    except (VideoError, ValueError, OSError, EOFError, MemoryError) as error:
        said = said_of(error).replace(str(path), path.name)
        raise Refused(said or f"{path.name} cannot be read; re-encode it.") from error


def _read(path: Path, look: Look, most: int | None = None) -> tuple[np.ndarray, str, tuple[int, int], float, bool]:
    """Frames (F, H, W, 3) uint8, a note of what was changed, (H, W) of the file, rate, and whether it is a picture."""
    if is_picture(path):
        size = (look.height, look.width) if look.height and look.width else _as_it_is
        found = read_input(path, size, 1.0)  # type: ignore[arg-type]
        return to_uint8(found.pixels[0]), found.note, found.source, look.fps or 1.0, True
    with VideoReader(path, max_pixels=MOST_PIXELS) as reader:
        count, size, rate = _extent(reader, look)
    asked = count if most is None else min(count, most)
    if asked > VIEW_PIXELS // (size[0] * size[1]):
        raise TooLong(path.name, count, size)
    found = read_input(path, size, rate, None if asked == count else asked)
    return to_uint8(found.pixels[0]), found.note, found.source, rate, False


def _extent(reader: VideoReader, look: Look) -> tuple[int, tuple[int, int], float]:
    """Frames, (H, W) and rate of a clip at a look."""
    rate, (height, width) = look.fps or reader.fps, reader.size
    count = max(1, int(float(reader.timestamps[-1]) * rate + 1e-3) + 1)
    return count, (look.height or height, look.width or width), rate


def _as_it_is(source: tuple[int, int]) -> tuple[int, int]:
    return source


def _sheets(frames: np.ndarray, rows: int, columns: int) -> Iterator[bytes]:
    """WebP pictures of `rows` x `columns` frames each, the last with as many rows as it needs."""
    count, height, width = frames.shape[:3]
    lossless = count * height * width <= _LOSSLESS
    for first in range(0, count, rows * columns):
        part = frames[first : first + rows * columns]
        sheet = np.zeros((-(-len(part) // columns), columns, height, width, 3), np.uint8)
        sheet.reshape(-1, height, width, 3)[: len(part)] = part
        image = Image.fromarray(sheet.swapaxes(1, 2).reshape(-1, columns * width, 3))
        stream = io.BytesIO()
        image.save(stream, "webp", lossless=lossless, quality=50 if lossless else 90, method=1)
        yield stream.getvalue()

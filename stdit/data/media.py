"""Which files hold pictures and clips, and the opening of a file that may be anything."""

import hashlib
import io
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from stdit.data.blocks import READ_AHEAD, RemoteFile
from stdit.data.cells import read_cell, state_of_folder
from stdit.data.errors import VideoError
from stdit.data.stores import entry_of, is_remote, remember

VIDEO_SUFFIXES = {
    ".mp4", ".mov", ".mkv", ".webm", ".avi", ".flv", ".f4v", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".m2v", ".vob",
    ".m4v", ".3gp", ".3g2", ".mj2", ".ogv", ".ogg", ".wmv", ".asf", ".mxf", ".y4m", ".gif", ".apng", ".webp", ".avif",
}  # fmt: skip
IMAGE_SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm",
}  # fmt: skip
# Pictures that nobody here decodes: a message of the reader of pictures says so, which one of the decoder of video cannot.
_OTHER_PICTURES = {".heic", ".heif", ".jxl", ".svg", ".psd", ".eps", ".exr", ".ico", ".tga"}


class Member(NamedTuple):
    """A file inside an archive or a table that is not packed: the archive's path, and where the file lies in it."""

    archive: str
    offset: int
    size: int


class Cell(NamedTuple):
    """A file in a row of a table: the table's path, its column, and the number of the row."""

    table: str
    column: str
    row: int


_MEMBER = re.compile(r"(?P<archive>.+\.(?i:tar|arrow))@(?P<offset>\d{1,18})\+(?P<size>\d{1,18})/[^/]+", re.DOTALL)
_CELL = re.compile(r"(?P<table>.+\.(?i:parquet|lance))@(?P<column>[^/@]+)\[(?P<row>\d{1,18})\]/[^/]+", re.DOTALL)


def place_of(path: str | os.PathLike) -> Member | Cell | None:
    """Where a path lies that is not that of a file: ARCHIVE@OFFSET+SIZE/NAME or TABLE@COLUMN[ROW]/NAME; None for a file's."""
    name = os.fspath(path).replace(os.sep, "/")
    if "@" not in name:
        return None
    if (found := _MEMBER.fullmatch(name)) is not None:
        return Member(found["archive"], int(found["offset"]), int(found["size"]))
    if (found := _CELL.fullmatch(name)) is not None:
        return Cell(found["table"], found["column"], int(found["row"]))
    return None


def member_of(path: str | os.PathLike) -> Member | None:
    """The archive and place of a path ARCHIVE@OFFSET+SIZE/NAME; None for other paths."""
    place = place_of(path)
    return place if isinstance(place, Member) else None


def container_of(path: str | os.PathLike) -> str | None:
    """The archive or table that a file lies in; None for a file of its own."""
    place = place_of(path)
    return None if place is None else place[0]


class _Section(io.RawIOBase):
    """A part of a file, read like a file of its own."""

    def __init__(self, file: BinaryIO, offset: int, size: int):
        self._file, self._offset, self._size, self._position = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._position))
        self._file.seek(self._offset + self._position)
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file for reading that must be a regular one: a pipe would block, a device never end; or raise VideoError.

    A path inside an archive or table (`place_of`) is opened there, one of a store (`stores.is_remote`) through the blocks on
    the local disk.
    """
    name = os.fspath(path)
    place = place_of(name)
    if place is not None and not os.path.exists(name):
        if isinstance(place, Cell):
            return io.BytesIO(read_cell(place.table, place.column, place.row))
        return io.BufferedReader(_Section(_open_plain(place.archive), place.offset, place.size))  # type: ignore[return-value]
    return _open_plain(name)


def _open_plain(name: str) -> BinaryIO:
    if is_remote(name):
        return io.BufferedReader(RemoteFile(name), READ_AHEAD)  # type: ignore[return-value]
    try:
        # Opening a FIFO must not block.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(name, flags)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise VideoError(f"{name!r} is not a regular file; give a file of a video or picture.")
        return os.fdopen(descriptor, "rb")
    except (OSError, ValueError) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoError(
            f"{name!r} cannot be opened ({reason_of(error)}); check the path and its permissions."
        ) from error


def state_of(path: Path) -> tuple[int, int]:
    """The size of a file in bytes, and the time of its last change in nanoseconds; -1, -1 if there is none.

    Of a file in an archive or table the time is that of the archive or table, of one in a table the size is as well. Of one
    in a store, a number of its version takes the place of the time.
    """
    place = place_of(path)
    whole = path if place is None else place[0]
    if is_remote(whole):
        entry = entry_of(whole)
        if entry is None:
            return -1, -1
        size, changed = entry.size, int.from_bytes(hashlib.sha256(entry.version.encode()).digest()[:7])
    else:
        try:
            found = os.stat(whole)
            size, changed = found.st_size, found.st_mtime_ns
            if stat.S_ISDIR(found.st_mode) and str(whole).lower().endswith(".lance"):
                size, changed = state_of_folder(str(whole))
        except OSError:
            return -1, -1
    return place.size if isinstance(place, Member) else size, changed


def ask_for(paths: Iterable[Path]) -> None:
    """Ask stores at once for what `state_of` says of many files; nothing for files of this machine."""
    remember([Path(whole) for whole in dict.fromkeys(container_of(path) or path for path in paths) if is_remote(whole)])


def reason_of(error: BaseException) -> str:
    """The text of an error in one line, without the number and path in those of FFmpeg and the system."""
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())


def is_picture(path: str | os.PathLike) -> bool:
    """Whether a file is read as a still picture, not as a clip: by its suffix, and by its header if that leaves both."""
    suffix = Path(path).suffix.lower()
    if suffix in _OTHER_PICTURES:
        return True
    return suffix in IMAGE_SUFFIXES and not (suffix in VIDEO_SUFFIXES | {".png"} and _moves(path))


def is_one_of(path: Path, suffixes: set[str]) -> bool:
    """Whether a file is of a kind: VIDEO_SUFFIXES, IMAGE_SUFFIXES or both; a header tells still and animated ones apart."""
    suffix = path.suffix.lower()
    if suffix not in suffixes or suffix not in VIDEO_SUFFIXES & IMAGE_SUFFIXES:
        return suffix in suffixes
    stills, clips = suffixes >= IMAGE_SUFFIXES, suffixes >= VIDEO_SUFFIXES
    return stills == clips or is_picture(path) == stills


def animated_by_pillow(path: str | os.PathLike) -> bool:
    """Whether a file is an animated WebP or a sequence of AVIF, which Pillow decodes and FFmpeg does not."""
    with open_regular(path) as file:
        head = file.read(32)
    webp = head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and len(head) > 20 and bool(head[20] & 0b10)
    return webp or head[4:12] == b"ftypavis"


def _moves(path: str | os.PathLike) -> bool:
    """Whether a file of a format for pictures and clips is a clip; False for one that cannot be read."""
    try:
        if animated_by_pillow(path):
            return True
        with open_regular(path) as file, Image.open(file, formats=("GIF", "PNG")) as image:
            return bool(getattr(image, "is_animated", False))
    except Exception:  # damaged files make Pillow raise many types; reading the file will say what is wrong
        return False

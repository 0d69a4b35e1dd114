"""A file of a store as a file: it is read in blocks, which are kept on the local disk up to a limit of bytes."""

import hashlib
import io
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stdit.data.errors import StoreError
from stdit.data.stores import Entry, entry_of, read_part, url_of
from stdit.data.user_cache import cache_folder
from stdit.files import atomic_write

BLOCK = 1 << 18  # bytes: a row of cached latents has about as many
READ_AHEAD = 1 << 20  # bytes that a reader from the beginning to the end asks for at once
_LEFT = 0.9  # of the limit, when blocks have been removed


class RemoteFile(io.RawIOBase):
    """A file of a store, read by byte range. StoreError if there is none, or if the store refuses or is silent."""

    def __init__(self, path: str | os.PathLike):
        self.name = url_of(path)
        entry = entry_of(path)
        if entry is None:
            raise StoreError(f"{self.name} is not there; check the name.")
        self._entry: Entry = entry
        key = hashlib.sha256(
            f"{self.name}\n{entry.version}\n{entry.size}".encode("utf-8", "surrogateescape")
        ).hexdigest()
        self._folder = _folder() / key[:2] / key[2:34]
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._entry.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        begin = self._position
        end = min(begin + len(buffer), self._entry.size)
        if begin >= end:
            return 0
        first, last = begin // BLOCK, (end - 1) // BLOCK
        data = b"".join(self._blocks(first, last))
        buffer[: end - begin] = data[begin - first * BLOCK : end - first * BLOCK]
        self._position = end
        return end - begin

    def _blocks(self, first: int, last: int) -> list[bytes]:
        """The blocks from `first` to `last`; neighbours that are not on the disk are fetched together."""
        found = [self._kept(number) for number in range(first, last + 1)]
        number = 0
        while number < len(found):
            if found[number] is not None:
                number += 1
                continue
            end = number
            while end < len(found) and found[end] is None:
                end += 1
            begin, stop = (first + number) * BLOCK, min((first + end) * BLOCK, self._entry.size)
            data = read_part(self.name, begin, stop)
            for i in range(number, end):
                found[i] = data[(i - number) * BLOCK : (i - number + 1) * BLOCK]
                self._keep(first + i, found[i] or b"")
            number = end
        return [block or b"" for block in found]

    def _kept(self, number: int) -> bytes | None:
        file = self._folder / str(number)
        try:
            data = file.read_bytes()
            os.utime(file)  # blocks that were not read for longest are removed first
        except OSError:
            return None
        return data if len(data) == min(BLOCK, self._entry.size - number * BLOCK) else None

    def _keep(self, number: int, data: bytes) -> None:
        with suppress(OSError):  # a full disk costs time, not the run
            self._folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self._folder / str(number)) as tmp:
                tmp.write_bytes(data)
        _Limit.count(len(data))


def limit() -> int:
    """The bytes that blocks may take on the local disk: $STDIT_STORE_CACHE_GB, or 20 GB."""
    given = os.environ.get("STDIT_STORE_CACHE_GB", "20")
    try:
        if (size := float(given)) >= 0:
            return int(size * 1e9)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"STDIT_STORE_CACHE_GB={given!r} is no number of gigabytes; set one, or unset it.")


def _folder() -> Path:
    return cache_folder() / "stores"


class _Limit:
    """How much this process has written since the blocks were last counted: counting them takes a second for a hundred thousand."""

    written: int | None = None

    @classmethod
    def count(cls, size: int) -> None:
        """Count a block, and remove the oldest ones if all of them exceed the limit."""
        most = limit()
        cls.written = most + 1 if cls.written is None else cls.written + size
        if cls.written > most // 64:
            cls.written = 0
            with suppress(OSError, Timeout), FileLock(_folder() / "lock", timeout=0):  # another process removes them
                _remove_oldest(most)


def _remove_oldest(most: int) -> None:
    found = []
    for folder, _, names in os.walk(_folder()):
        for name in names:
            with suppress(OSError):
                file = os.path.join(folder, name)
                state = os.stat(file)
                found.append((state.st_mtime_ns, state.st_size, file))
    total = sum(size for _, size, _ in found)
    if total <= most:
        return
    for _, size, file in sorted(found):
        if total <= _LEFT * most:
            break
        with suppress(OSError):
            if not file.endswith("lock"):
                os.remove(file)
                total -= size
                os.rmdir(os.path.dirname(file))  # of the last block of a file; others refuse

"""The bytes in one row of a table: of a parquet file, or of a table of Lance."""

import os
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from stdit.data.blocks import RemoteFile
from stdit.data.errors import VideoError
from stdit.data.packages import package, pyarrow_of
from stdit.data.stores import is_remote

_reading = threading.Lock()
_TABLES = 8  # that stay open in a process
_ELSEWHERE = 3  # the kind of a blob of Lance that is an address, which may lead anywhere
T = TypeVar("T")


def read_cell(table: str, column: str, row: int) -> bytes:
    """The bytes in a row of a column; VideoError with the place and a remedy."""
    read = _lance_cell if table.lower().endswith(".lance") else _parquet_cell
    place = f"{table}, column {column!r}, row {row}"
    found = guarded(place, lambda: read(table, column, row))
    if not isinstance(found, bytes):
        raise VideoError(f"{place} has no bytes; leave that row out.")
    return found


def guarded(place: str, call: Callable[[], T]) -> T:
    """What `call` of a library of tables returns; whatever it raises is a VideoError in one line, for a damaged table."""
    try:
        return call()
    except VideoError:
        raise
    except BaseException as error:
        # A panic of Lance is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        first = " ".join(str(error).split("\n")[0].split())[:160]
        raise VideoError(f"{place} cannot be read ({first}); write the table again.") from error


def open_parquet(path: str) -> Any:
    """A parquet file, opened: here or in a store."""
    source = RemoteFile(path) if is_remote(path) else path
    # A buffer, or each column of a group is read as a whole.
    return pyarrow_of("parquet").parquet.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False)


def open_lance(path: str) -> Any:
    """A table of Lance, opened."""
    if is_remote(path):
        raise ValueError(f"{path}: tables of Lance are read from this machine only; copy it here.")
    lance = package("lance", "lance", "Tables of Lance")
    return guarded(path, lambda: lance.dataset(path))


def state_of_folder(path: str) -> tuple[int, int]:
    """The size of all data of a table that is a folder, and the time in nanoseconds of its last version."""
    return _size_of_folder(path, changed := os.stat(os.path.join(path, "_versions")).st_mtime_ns), changed


@lru_cache(maxsize=_TABLES)
def _size_of_folder(path: str, _: int) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(os.path.join(path, "data")) if entry.is_file())


@lru_cache(maxsize=_TABLES)
def _parquet(path: str, _: tuple[int, int]) -> tuple[Any, list[int]]:
    """A parquet file, and the number of the first row after each of its groups."""
    file = open_parquet(path)
    ends, end = [], 0
    for group in range(file.num_row_groups):
        end += file.metadata.row_group(group).num_rows
        ends.append(end)
    return file, ends


def _parquet_cell(table: str, column: str, row: int) -> Any:
    found = (0, 0) if is_remote(table) else (os.stat(table).st_size, os.stat(table).st_mtime_ns)
    file, ends = _parquet(table, found)
    group = next(i for i, end in enumerate(ends) if row < end)
    skip = row - (ends[group - 1] if group else 0)
    with _reading:  # pyarrow's reader is not for several threads
        # Row by row: a group may hold more than the memory.
        for i, batch in enumerate(file.iter_batches(1, row_groups=[group], columns=[column])):
            if i == skip:
                return _inner(batch.column(0)[0].as_py())
    return None


@lru_cache(maxsize=_TABLES)
def _lance(path: str, _: tuple[int, int]) -> Any:
    return open_lance(path)


def _lance_cell(table: str, column: str, row: int) -> Any:
    data = _lance(table, state_of_folder(table))
    value = _inner(data.take([row], columns=[column]).column(0)[0].as_py())
    if not isinstance(value, dict):
        return value
    # A column of blobs has the places of bytes.
    if value.get("kind") == _ELSEWHERE:
        raise VideoError(
            f"{table}, column {column!r}, row {row} lies outside the table ({str(value.get('blob_uri'))[:160]!r}); write its bytes into it."
        )
    blob = data.take_blobs(column, indices=[row])[0]
    return None if blob is None else blob.readall()


def _inner(value: Any) -> Any:
    """The bytes of a value that may lie in a structure, as the library of datasets keeps them with a path."""
    return value["bytes"] if isinstance(value, dict) and "bytes" in value else value

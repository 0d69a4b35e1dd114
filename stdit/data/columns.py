"""A table in one file, column by column, which processes map into memory instead of reading it.

The file is a safetensors file: numbers are arrays of the length of the table, texts are one heap of UTF-8 with the place
where each begins. Its metadata have a CRC-32 of each of them.
"""

import json
import mmap
import os
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from itertools import pairwise
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from safetensors.numpy import save_file

from stdit.data.media import open_regular, state_of
from stdit.data.stores import is_remote
from stdit.data.tensor_rows import read_header
from stdit.files import atomic_write

_DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I16": np.int16, "I32": np.int32, "I64": np.int64, "F32": np.float32,
    "F64": np.float64,
}  # fmt: skip
_HEAP, _STARTS = ".heap", ".starts"
_INFO, _CHECKSUMS = "info", "checksums"
_BLOCK = 65536  # rows whose texts are read at once
_COMPARED = 1 << 24  # bytes that are compared with a checksum before their pages are unmapped
_LET_GO = 256  # texts that are read one by one, after which their pages are unmapped


class Columns:
    """The columns of a file. Nothing is read until it is asked for, and a copy in another process maps the same file.

    A file of a store is read as a whole. info: what was written beside the columns. ValueError for a file that is missing or
    damaged, without a remedy, which whoever knows what wrote the file adds.
    """

    def __init__(self, path: Path):
        self.path, self._in_memory = Path(path), False
        try:
            stream = open_regular(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path} {'cannot be opened' if state_of(path)[0] >= 0 else 'is missing'}") from error
        self._load(stream)

    def _load(self, stream: BinaryIO) -> None:
        with stream:
            self._data, self._opened = _bytes_of(stream, mapped=not is_remote(self.path)), None
            if isinstance(self._data, mmap.mmap):
                # It stays open, for the processes that map the same file, also if another takes its name meanwhile.
                self._opened = os.dup(stream.fileno())
                weakref.finalize(self, os.close, self._opened)
        # Not from the open file, since processes that share it share its place.
        header, begin = _read_header(self._data, self.path)
        try:
            self.info: dict[str, Any] = json.loads(header.pop("__metadata__", {}).get(_INFO, "{}"))
            self._checksums: dict[str, int] = dict(self.info.pop(_CHECKSUMS, {}))
            data = np.frombuffer(self._data, np.uint8)
            arrays = {name: _part(data, entry, begin) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{self.path} is damaged ({error})") from error
        self._take(arrays)

    @classmethod
    def of(cls, columns: Mapping[str, np.ndarray | Iterable[str]], path: Path) -> Self:
        """Columns in memory. path: where they come from, for messages."""
        found = cls.__new__(cls)
        found.path, found.info, found._in_memory, found._data = path, {}, True, b""
        found._checksums, found._opened = {}, None
        found._take(_arrays_of(columns))
        return found

    def _take(self, arrays: dict[str, np.ndarray]) -> None:
        self._arrays, self._read = arrays, 0
        lengths = {len(array) for name, array in self._arrays.items() if not name.endswith((_HEAP, _STARTS))}
        lengths |= {len(array) - 1 for name, array in self._arrays.items() if name.endswith(_STARTS)}
        if len(lengths) != 1:
            raise ValueError(f"{self.path} is damaged (columns of {sorted(lengths)} rows)")
        self._length = lengths.pop()

    def check(self) -> None:
        """Raise ValueError if a column, or what was written beside them, does not match its checksum; older files have none."""
        found = {name: self._checksum(array) for name, array in self._arrays.items()} if self._checksums else {}
        if found:
            found[_INFO] = zlib.crc32(json.dumps(self.info).encode())
        for name in sorted(found.keys() | self._checksums.keys()):
            if found.get(name) != self._checksums.get(name):
                column = name.removesuffix(_HEAP).removesuffix(_STARTS)
                raise ValueError(f"{self.path} is damaged ({column!r} does not match its checksum)")

    def _checksum(self, array: np.ndarray) -> int:
        data, value = array.view(np.uint8), 0
        for first in range(0, len(data), _COMPARED):
            value = zlib.crc32(data[first : first + _COMPARED].data, value)
            self._let_go()
        return value

    def __len__(self) -> int:
        return self._length

    def __contains__(self, name: str) -> bool:
        return name in self._arrays or name + _STARTS in self._arrays

    def __getitem__(self, name: str) -> np.ndarray:
        """The numbers of a column, mapped from the file."""
        return self._arrays[name]

    def text(self, name: str, row: int) -> str:
        """The text of a row."""
        starts = self._arrays[name + _STARTS]
        text = self._arrays[name + _HEAP][starts[row] : starts[row + 1]].tobytes()
        self._read += 1
        if self._read % _LET_GO == 0:
            self._let_go()
        return text.decode("utf-8", "surrogateescape")  # names of files need not be UTF-8

    def _let_go(self) -> None:
        """Unmap the pages that were read, which the system keeps for all processes but counts as memory of each.

        Around every row it maps 64 kB, so that a process would seem to hold the whole file after some thousand rows.
        """
        if isinstance(self._data, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            self._data.madvise(mmap.MADV_DONTNEED)

    def texts(self, name: str) -> Iterator[str]:
        """The texts of all rows in their order, read in blocks, which is ten times as fast as one by one."""
        heap, starts = self._arrays[name + _HEAP], self._arrays[name + _STARTS]
        for first in range(0, self._length, _BLOCK):
            places = starts[first : first + _BLOCK + 1]
            block = heap[places[0] : places[-1]].tobytes()
            for begin, end in pairwise((places - places[0]).tolist()):
                yield block[begin:end].decode("utf-8", "surrogateescape")
            self._let_go()

    def has_texts(self, name: str) -> bool:
        """Whether any row of a column has a text."""
        return bool(self._arrays[name + _STARTS][-1])

    def __getstate__(self) -> dict[str, Any]:
        if self._in_memory:
            return dict(self.__dict__)
        state: dict[str, Any] = {"path": self.path}
        if self._opened is not None and get_spawning_popen() is not None and hasattr(reduction, "DupFd"):
            # Not on Windows, where a mapped file cannot be replaced.
            state["file"] = reduction.DupFd(self._opened)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_arrays" in state:
            self.__dict__.update(state)
        elif "file" in state:
            self.path, self._in_memory = state["path"], False
            self._load(os.fdopen(state["file"].detach(), "rb"))
        else:
            try:
                self.__init__(state["path"])  # type: ignore[misc]
            except ValueError as error:
                raise ValueError(f"{error}, while a run reads it; start the run again.") from error


def annotation_values(columns: Columns, name: str, class_names: Sequence[str] | None) -> Iterator[Any]:
    """The value of an annotation in every row: label (by its name), caption or a further one; None where it is missing.

    columns: with `label`, `caption` and, as JSON, `columns`.
    """
    known: Iterator[Any] = iter(())
    if name == "label":
        labels = np.asarray(columns["label"]).tolist()
        known = (None if label < 0 else class_names[label] if class_names else label for label in labels)
    elif name == "caption":
        known = (text or None for text in columns.texts("caption"))
    for text in columns.texts("columns"):
        value = next(known, None)
        further = json.loads(text).get(name) if text else None
        yield value if further is None else further


def write_columns(path: Path, columns: Mapping[str, np.ndarray | Iterable[str]], info: Mapping[str, Any]) -> None:
    """Write columns of one length, arrays of numbers or texts; the file is complete or not there."""
    arrays = _arrays_of(columns)
    checksums = {name: zlib.crc32(array.data) for name, array in arrays.items()}
    checksums[_INFO] = zlib.crc32(json.dumps(dict(info)).encode())
    with atomic_write(path) as tmp:
        # Of several keys safetensors writes the order by chance.
        save_file(arrays, tmp, metadata={_INFO: json.dumps({**info, _CHECKSUMS: checksums})})


def _arrays_of(columns: Mapping[str, np.ndarray | Iterable[str]]) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for name, column in columns.items():
        if isinstance(column, np.ndarray):
            arrays[name] = np.ascontiguousarray(column)
        else:
            arrays[name + _HEAP], arrays[name + _STARTS] = _heap_of(column)
    return arrays


def _heap_of(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    heap, starts = bytearray(), [0]
    for text in texts:
        heap += text.encode("utf-8", "surrogateescape")
        starts.append(len(heap))
    return np.frombuffer(bytes(heap), np.uint8), np.array(starts, np.int64)


def looks_like_table(path: Path) -> bool:
    """Whether a file begins as a table does, however damaged it is beyond that; an empty one may be a table cut short."""
    try:
        with open(path, "rb") as stream:
            begin = stream.read(9)
    except OSError:
        return False
    return len(begin) < 9 or begin[8:] == b"{"


def _read_header(data: bytes | mmap.mmap, path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begins."""
    try:
        return read_header(data if isinstance(data, mmap.mmap) else BytesIO(data))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged or another kind of file ({len(data)} bytes without a readable header)"
        ) from error


def _bytes_of(stream: BinaryIO, *, mapped: bool) -> bytes | mmap.mmap:
    """The bytes of a file, mapped or read."""
    if not mapped:
        return stream.read()
    empty = not os.fstat(stream.fileno()).st_size  # which cannot be mapped
    return b"" if empty else mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def _part(data: np.ndarray, entry: dict[str, Any], begin: int) -> np.ndarray:
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    first, last = entry["data_offsets"]
    (count,) = entry["shape"]
    if not 0 <= first <= last <= len(data) - begin or last - first != count * dtype.itemsize:
        raise ValueError(f"it ends at byte {len(data)}, before its columns do")
    return data[begin + first : begin + last].view(dtype)

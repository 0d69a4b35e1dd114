"""Rows of the tensors in a safetensors file, each read by its bytes, from this machine or from a store."""

import json
import math
import mmap
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from stdit.data.blocks import RemoteFile
from stdit.data.errors import VideoError
from stdit.data.media import open_regular
from stdit.data.stores import is_remote

_DTYPES = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_MAX_HEADER = 1 << 24


def read_header(stream: BinaryIO | mmap.mmap) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begins; ValueError if it has none."""
    length = int.from_bytes(stream.read(8), "little")
    if length > _MAX_HEADER:
        raise ValueError(f"a header of {length} bytes")
    header = json.loads(stream.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return header, 8 + length


def checksum_of(tensors: Mapping[str, Tensor]) -> int:
    """A CRC-32 of the bytes of tensors in the order of their names."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data, value)
    return value


def draw_latents(moments: Mapping[str, Tensor], noise: Tensor) -> dict[str, Tensor]:
    """Latents, and reencoded ones, drawn by one noise (C, T, h, w) from their means and deviations (`..._std`); float32.

    The first frame of a clip, which is the same in both, so gets the same draw.
    """
    means = [name for name in moments if not name.endswith("_std")]
    return {name: moments[name].float() + noise * moments[name + "_std"].float() for name in means}


class TensorRows:
    """The tensors of a file, of which rows are read; the file stays open. ValueError if it is no complete safetensors file."""

    def __init__(self, path: Path):
        self.path, self._lock = path, threading.Lock()
        # Of a store no more is asked for than the row.
        stream: Any = RemoteFile(path) if is_remote(path) else open_regular(path)
        self._file = stream
        try:
            header, begin = read_header(stream)
            header.pop("__metadata__", None)
            size = self._file.seek(0, 2)
            self._tensors = {name: _Tensor.of(entry, begin, size) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self._file.close()
            if isinstance(error, VideoError):
                raise
            raise ValueError(f"{path} is not a file of tensors ({error})") from error

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def names(self) -> list[str]:
        """The names of the tensors."""
        return list(self._tensors)

    def row(self, name: str, number: int) -> Tensor:
        """A row of a tensor, the part of it at an index of its first dimension."""
        tensor = self._tensors[name]
        if not 0 <= number < tensor.rows:
            raise IndexError(f"row {number} of {tensor.rows} of {name} in {self.path}")
        with self._lock:  # threads share the position in the file
            self._file.seek(tensor.begin + number * tensor.row_bytes)
            data = self._file.read(tensor.row_bytes)
        if len(data) != tensor.row_bytes:
            raise VideoError(f"{self.path} ends in row {number} of {name}; copy it again.")
        return torch.frombuffer(bytearray(data), dtype=tensor.dtype).reshape(tensor.shape)


class _Tensor:
    """Where a tensor lies in a file."""

    def __init__(self, dtype: torch.dtype, shape: list[int], *, begin: int, rows: int):
        self.dtype, self.shape, self.begin, self.rows = dtype, shape, begin, rows
        self.row_bytes = math.prod(shape) * dtype.itemsize

    @classmethod
    def of(cls, entry: dict[str, Any], begin: int, size: int) -> Self:
        """From its entry in the header."""
        rows, *shape = (int(length) for length in entry["shape"])
        first, last = entry["data_offsets"]
        found = cls(_DTYPES[entry["dtype"]], shape, begin=begin + first, rows=rows)
        if min(rows, first, *shape, 1) < 0 or last - first != rows * found.row_bytes or begin + last > size:
            raise ValueError(f"it ends at byte {size}, before its tensors do")
        return found

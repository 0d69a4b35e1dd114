"""The idx format of MNIST and its relatives: a big-endian header, then bytes; plain or gzipped."""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

UNSIGNED_BYTE = 8  # the data type code of the header
LARGEST_RATIO = 50  # values per byte of a gzipped file; MNIST has 5
SMALL = 1 << 20  # values of a gzipped file that may be packed more tightly, as sorted labels are


def read_idx(path: str | Path) -> np.ndarray:
    """Read an idx file of unsigned bytes as an array of the shape in its header; ValueError for any other file.

    Memory is taken for what the header announces, and only if the file can hold it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file; give an idx or idx.gz file.")
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as stream:
            shape = _read_shape(stream, path)
            values = np.empty(math.prod(shape), np.uint8)
            found = _fill(stream, values)
    except (struct.error, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as an idx file ({error}); give an idx or idx.gz file.") from error
    if found != values.size:
        raise _damaged(path, f"{found}" if found < values.size else f"more than {values.size}", values.size)
    return values.reshape(shape)


def _read_shape(stream: Any, path: Path) -> tuple[int, ...]:
    """The shape in the header; ValueError for another type, and for a shape that the file cannot hold."""
    zeros, data_type, rank = struct.unpack(">HBB", stream.read(4))
    if zeros or data_type != UNSIGNED_BYTE or not 1 <= rank <= 4:
        raise ValueError(
            f"{path} is not an idx file of unsigned bytes: its header is {zeros}, {data_type}, {rank}; "
            "give a file in the format of MNIST."
        )
    shape = struct.unpack(f">{rank}I", stream.read(4 * rank))
    announced, size = math.prod(shape), path.stat().st_size
    if path.suffix != ".gz" and size != 4 + 4 * rank + announced:
        raise _damaged(path, f"{size - 4 - 4 * rank}", announced)
    if path.suffix == ".gz" and announced > max(SMALL, LARGEST_RATIO * size):
        raise ValueError(
            f"{path} has {size} bytes, its header announces {announced} values, more than {LARGEST_RATIO} a byte; "
            "if it is what you expect, unpack it with gunzip."
        )
    return shape


def _fill(stream: Any, values: np.ndarray) -> int:
    """Read into an array -> the number of values that the stream has, up to one more than the array."""
    found = 0
    while found < values.size and (more := stream.readinto(values[found:].data)):
        found += more
    return found + len(stream.read(1))


def _damaged(path: Path, found: str, announced: int) -> ValueError:
    return ValueError(
        f"{path} is cut short or damaged: it has {found} values, its header announces {announced}; download it again."
    )

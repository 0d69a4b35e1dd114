"""The idx format of MNIST and its relatives: a big-endian header, then bytes; plain or gzipped."""

import gzip
import struct
from pathlib import Path

import numpy as np

UNSIGNED_BYTE = 8  # the data type code of the header


def read_idx(path: str | Path) -> np.ndarray:
    """Read an idx file of unsigned bytes as an array of the shape in its header; ValueError for any other file."""
    path = Path(path)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as stream:
            zeros, data_type, rank = struct.unpack(">HBB", stream.read(4))
            if zeros or data_type != UNSIGNED_BYTE or not 1 <= rank <= 4:
                raise ValueError(
                    f"{path} is not an idx file of unsigned bytes: its header is {zeros}, {data_type}, {rank}; "
                    "give a file in the format of MNIST."
                )
            shape = struct.unpack(f">{rank}I", stream.read(4 * rank))
            values = np.frombuffer(stream.read(), np.uint8)
    except (struct.error, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an idx file ({error}); give an idx or idx.gz file.") from error
    if values.size != np.prod(shape):
        raise ValueError(
            f"{path} is cut short or damaged: it has {values.size} values, its header announces {np.prod(shape)}; "
            "download it again."
        )
    return values.reshape(shape)

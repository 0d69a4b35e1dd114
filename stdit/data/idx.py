"""The idx format of MNIST and its kin: big-endian header, then bytes; plain or gzipped."""

import gzip
import struct
from pathlib import Path

import numpy as np


def read_idx(path: str | Path) -> np.ndarray:
    """Read an idx file of unsigned bytes -> array of the recorded shape; ValueError for anything else."""
    path = Path(path)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as stream:
            zeros, kind, rank = struct.unpack(">HBB", stream.read(4))
            if zeros or kind != 8 or not 1 <= rank <= 4:
                raise ValueError(f"{path} is not an idx file of bytes: its header is {zeros}, {kind}, {rank}.")
            shape = struct.unpack(f">{rank}I", stream.read(4 * rank))
            values = np.frombuffer(stream.read(), np.uint8)
    except (struct.error, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an idx file ({error}); give an idx or idx.gz file.") from error
    if values.size != np.prod(shape):
        raise ValueError(
            f"{path} holds {values.size} values where its header announces {np.prod(shape)}: it is cut short."
        )
    return values.reshape(shape)

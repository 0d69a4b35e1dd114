"""Small videos for the tests, in which every frame shows its number as a bar code."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
BITS = 8


def barcode(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A frame with `number` in binary, as white and black bars."""
    bars = [(number >> bit) & 1 for bit in range(BITS)]
    row = np.repeat(np.array(bars, np.uint8) * 255, width // BITS)
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def read_barcode(frame: np.ndarray) -> int:
    """The number in a frame of `barcode`."""
    middle = frame[frame.shape[0] // 2, :, 1].reshape(BITS, -1).mean(axis=1)
    return int(sum((value > 127) << bit for bit, value in enumerate(middle)))


def write_barcodes(
    path: Path,
    count: int = 30,
    codec: str = "libx264",
    fps: int = 24,
    options: dict | None = None,
    pix_fmt: str = "yuv420p",
    times: list[int] | None = None,
) -> Path:
    """Write `count` numbered frames; times: their time stamps in units of 1/fps."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        stream.options = options or {}
        if times is not None:
            stream.codec_context.time_base = Fraction(1, fps)
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(barcode(i), format="rgb24").reformat(format=pix_fmt)
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path

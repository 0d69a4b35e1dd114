"""Reading pictures."""

from pathlib import Path

import numpy as np
from PIL import Image

from stdit.data.video_io import VideoError


def read_picture(path: Path) -> np.ndarray:
    """Read an image file as (H, W, 3) uint8; VideoError if it cannot be read."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(f"{str(path)!r} is not an image that can be read ({error}); leave it out.") from error

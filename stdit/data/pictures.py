"""Reading of still pictures as a person sees them: upright, on a ground, in 8 bits; bounded before it is decoded."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
from PIL import Image, UnidentifiedImageError

from stdit.data.media import VideoError, open_regular, reason_of
from stdit.data.transforms import cover_size

# Formats that decode by themselves. PostScript is left out: Pillow starts a program on it, whatever the file is called.
FORMATS = (
    "PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "SGI", "PCX", "DDS", "ICO",
    "ICNS",
)  # fmt: skip
MAX_PIXELS = 2**26
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
_STRIP = 2**20  # pixels converted at a time
_ORIENTATION = 0x0112  # the EXIF tag, and what turns a picture upright for each of its values
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_LYING = (5, 6, 7, 8)


def read_picture(
    path: str | os.PathLike, cover: tuple[int, int] | None = None, ground: tuple[int, int, int] = WHITE
) -> np.ndarray:
    """Read a picture file as (H, W, 3) uint8 RGB, turned as its EXIF orientation says; VideoError if it cannot be read.

    cover: scale it (bicubic) to cover this (H, W). ground: the colour on which transparent parts are seen. Greys of 16
    bits are scaled to 8; floating-point greys are taken as 0 to 1, or 0 to 255 or 65535 if they go beyond. Pictures of
    more than MAX_PIXELS (half of that, if they are not plain RGB or grey) are refused before they are decoded; of an
    animation it is the first frame.
    """
    with _opened(path) as image:
        image.load()
        _check_size(image, path)
        return upright(image, cover, ground)


def upright(
    image: Image.Image, cover: tuple[int, int] | None = None, ground: tuple[int, int, int] = WHITE
) -> np.ndarray:
    """A picture that is open as (H, W, 3) uint8 RGB, turned as its EXIF orientation says; arguments of `read_picture`."""
    image.load()
    turn = _orientation(image)
    shown = _to_rgb(image, ground)
    if cover is not None:
        cover = cover[::-1] if turn in _LYING else cover
        shown = shown.resize(cover_size((shown.height, shown.width), cover)[::-1], Image.Resampling.BICUBIC)
    shown = shown.transpose(_TURNS[turn]) if turn in _TURNS else shown
    return np.array(shown)  # a copy, since PIL's view is read-only


def picture_size(path: str | os.PathLike) -> tuple[int, int]:
    """The (H, W) that `read_picture` gives without `cover`, from the header; VideoError if it cannot be read."""
    with _opened(path) as image:
        turned = image.format != "TIFF" and _orientation(image) in _LYING  # Pillow turns TIFF by itself
        return (image.width, image.height) if turned else (image.height, image.width)


def read_animation(path: str | os.PathLike) -> Iterator[tuple[np.ndarray, int]]:
    """Each frame (H, W, 3) uint8 RGB of an animated picture in order, and how long it is shown, in milliseconds."""
    with _opened(path) as image:
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            image.load()
            yield np.array(_to_rgb(image, WHITE)), max(1, round(image.info.get("duration", 0)))


def over_ground(rgba: np.ndarray, ground: tuple[int, int, int] = WHITE) -> np.ndarray:
    """Composite (..., 4) uint8 over a colour -> (..., 3) uint8; where it is opaque, its colours are unchanged."""
    colours, alpha = rgba[..., :3].astype(np.uint16), rgba[..., 3:].astype(np.uint16)
    return ((colours * alpha + np.array(ground, np.uint16) * (255 - alpha) + 127) // 255).astype(np.uint8)


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    """A picture whose header is read and whose size is allowed; what goes wrong in the block is a VideoError."""
    name = os.fspath(path)
    try:
        with open_regular(name) as file:
            if file.seek(0, os.SEEK_END) > 4 * MAX_PIXELS:  # some decoders read the whole file before its header
                raise VideoError(f"{name!r} is a file of more than {4 * MAX_PIXELS >> 20} MiB; compress or scale it.")
            file.seek(0)
            with Image.open(file, formats=FORMATS) as image:
                _check_size(image, name)
                yield image
    except VideoError:
        raise
    except UnidentifiedImageError as error:
        raise VideoError(
            f"{name!r} is in no format of pictures that is read (png, jpeg, webp, gif, bmp, tiff, avif, jpeg 2000, ppm); "
            "convert it to png or jpeg, or leave it out."
        ) from error
    except Exception as error:  # damaged files make Pillow raise many types
        raise VideoError(
            f"{name!r} is not an image that can be read ({reason_of(error)}); repair it or leave it out."
        ) from error


def _check_size(image: Image.Image, path: str | os.PathLike) -> None:
    # Other modes are held twice while they are converted.
    most = MAX_PIXELS if image.mode in ("RGB", "L") else MAX_PIXELS // 2
    if image.width * image.height > most:
        raise VideoError(
            f"{os.fspath(path)!r} has {image.width}x{image.height} pixels, more than the {most} that are read of a picture "
            f"of its kind ({image.mode}); scale it down or leave it out."
        )


def _to_rgb(image: Image.Image, ground: tuple[int, int, int]) -> Image.Image:
    """The picture in RGB; what needs more than a change of mode is converted in strips, which bounds the memory."""
    convert: Callable[[Image.Image], np.ndarray]
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        convert = partial(_grey, white=_white_level(image), clear=image.info.get("transparency"), ground=ground)
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        convert = partial(_flat, ground=ground)
    else:
        return image if image.mode == "RGB" else image.convert("RGB")
    shown = Image.new("RGB", image.size)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        shown.paste(Image.fromarray(convert(strip)), (0, top))
    return shown


def _flat(strip: Image.Image, ground: tuple[int, int, int]) -> np.ndarray:
    """Colours of any mode with transparency on a ground, (H, W, 3) uint8."""
    return over_ground(np.asarray((strip.convert("LA") if strip.mode == "La" else strip).convert("RGBA")), ground)


def _white_level(image: Image.Image) -> float:
    """The value that is white: the largest of the format, or for floats of the range that they are in."""
    if image.mode.startswith("I;16") or image.format == "PPM":
        return 65535
    highest = float(np.max(image.getextrema()))
    ranges = (1, 255, 65535) if image.mode == "F" else (255, 65535)
    return next((white for white in ranges if highest <= white * 1.01), highest)


def _grey(strip: Image.Image, white: float, clear: int | None, ground: tuple[int, int, int]) -> np.ndarray:
    """Grey values of any type as (H, W, 3) uint8; not-a-number is black. clear: the value of transparent pixels."""
    stored = np.asarray(strip)
    values = np.nan_to_num(stored.astype(np.float32), nan=0.0, posinf=white, neginf=0.0)
    scaled = np.round(values.clip(0, white) * (255 / white)).astype(np.uint8)
    rgb = np.repeat(scaled[..., None], 3, axis=-1)
    if isinstance(clear, int):
        rgb[stored == clear] = ground
    return rgb


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if there is none, or it cannot be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata of a whole picture
        return 1

"""Pictures are read as a person sees them, from named formats, within bounds."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from stdit.data import VideoError, VideoReader
from stdit.data.inputs import read_input, read_mask
from stdit.data.manifest import scan_folder
from stdit.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_picture
from stdit.data.pictures import picture_size, read_picture
from stdit.data.transforms import cover_size

RAMP = np.tile(np.linspace(0, 1, 64), (48, 1))  # grey, from black at the left to white at the right
BYTES = np.round(RAMP * 255).astype(np.uint8)


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def sprite(seed: int = 0) -> np.ndarray:
    """An opaque square on a transparent ground of random colours that nobody sees."""
    rgba = np.random.default_rng(seed).integers(0, 256, (64, 64, 4), np.uint8)
    rgba[..., 3] = 0
    rgba[16:48, 16:48] = (200, 40, 40, 255)
    return rgba


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_upright_whatever_way_the_camera_was_held(tmp_path, orientation, suffix):
    shown = np.zeros((48, 32, 3), np.uint8)
    shown[:24, :, 0] = shown[:, :16, 2] = 250
    # What a camera stores: the inverse of the turn that its tag asks for.
    turns = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    stored, path = np.ascontiguousarray(turns[orientation](shown)), tmp_path / f"a.{suffix}"
    Image.fromarray(stored).save(path, exif=exif(orientation), **({"lossless": True} if suffix == "webp" else {}))
    picture = read_picture(path)
    assert picture.shape == shown.shape and picture_size(path) == shown.shape[:2]
    assert np.abs(picture[4:20, 4:12].astype(int) - shown[4:20, 4:12]).mean() < 10
    assert np.abs(picture.astype(int) - shown).mean() < 12
    assert read_picture(path, cover=(24, 16)).shape == (24, 16, 3)


def test_greys_of_any_depth_look_the_same(tmp_path):
    sixteen = np.round(RAMP * 65535).astype(np.uint16)
    for name, stored in {
        "a.png": sixteen, "a.tif": sixteen, "unit.tif": RAMP.astype(np.float32), "eight.png": BYTES,
        "bytes.tif": (255 * RAMP).astype(np.float32), "long.tif": (65535 * RAMP).astype(np.int32),
    }.items():  # fmt: skip
        Image.fromarray(stored).save(tmp_path / name)
    (tmp_path / "a.pgm").write_bytes(b"P5 64 48 65535\n" + sixteen.astype(">u2").tobytes())
    for path in tmp_path.iterdir():
        assert np.abs(read_picture(path).astype(int) - BYTES[..., None]).max() <= 1, path.name


def test_palettes_inks_and_two_levels_become_colours(tmp_path):
    grey = Image.fromarray(BYTES)
    inks = Image.merge("CMYK", [Image.fromarray(255 - BYTES)] * 3 + [Image.new("L", grey.size, 0)])
    grey.convert("RGB").quantize(64).save(tmp_path / "palette.png")
    inks.save(tmp_path / "inks.tif")
    inks.save(tmp_path / "inks.jpg", quality=98)
    for path in tmp_path.iterdir():
        assert np.abs(read_picture(path).astype(int) - BYTES[..., None]).max() <= 8, path.name
    grey.convert("1").save(tmp_path / "levels.png")
    assert set(np.unique(read_picture(tmp_path / "levels.png"))) == {0, 255}


def test_what_is_transparent_is_white_and_what_is_opaque_unchanged(tmp_path):
    rgba = Image.fromarray(sprite())
    rgba.save(tmp_path / "a.png")
    rgba.save(tmp_path / "a.webp", lossless=True, exact=True)
    rgba.save(tmp_path / "a.tif")
    rgba.quantize(16, Image.Quantize.FASTOCTREE).save(tmp_path / "palette.png")
    Image.fromarray(sprite()[..., 2:]).save(tmp_path / "grey.png")
    for path in tmp_path.iterdir():
        picture = read_picture(path)
        assert (picture[:16] == 255).all(), path.name
        assert np.ptp(picture[20:40, 20:40].reshape(-1, 3), axis=0).max() <= 1, path.name
    assert (read_picture(tmp_path / "a.png")[20, 20] == (200, 40, 40)).all()
    key = np.round(RAMP * 65535).astype(np.uint16)
    Image.fromarray(key).save(tmp_path / "key.png", transparency=0)
    assert (read_picture(tmp_path / "key.png")[:, 0] == 255).all()


def test_white_strokes_on_a_transparent_layer_are_a_mask(tmp_path):
    layer = np.zeros((32, 32, 4), np.uint8)
    layer[8:16, 8:16] = 255
    Image.fromarray(layer).save(tmp_path / "mask.png")
    mask = read_mask(tmp_path / "mask.png", (32, 32), (5, 32, 32), 8.0)
    assert mask.sum() == 64 and mask[8:16, 8:16].all()


ANIMATED = {
    "a.webp": {"lossless": True, "exact": True},
    "a.png": {},
    "a.gif": {"disposal": 2},
    "a.avif": {"quality": 95},
}


@pytest.mark.parametrize("name", ANIMATED)
def test_an_animated_picture_is_a_clip_and_a_still_one_a_picture(tmp_path, name):
    if name.endswith("avif") and not Image.registered_extensions().get(".avif"):
        pytest.skip("this Pillow has no AVIF")
    path, still = tmp_path / name, tmp_path / f"still{name[1:]}"
    pictures = [Image.fromarray(np.roll(sprite(), i, axis=1)) for i in range(5)]
    times = [100, 50, 100, 100, 200]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=times, **ANIMATED[name])
    pictures[0].save(still)
    assert not is_picture(path) and is_picture(still)
    with VideoReader(path) as reader:
        assert reader.timestamps == pytest.approx([0, 0.1, 0.15, 0.25, 0.35])
        frames = reader.get_frames(range(5))
        assert np.array_equal(reader[3], frames[3]) and np.array_equal(reader[1], frames[1])
    assert (frames[:, :16] >= 254).all()
    assert np.abs(frames[4, 30, 30].astype(int) - (200, 40, 40)).max() < 8
    assert read_input(path, (64, 64), 12.5).pixels.shape[2] == 5
    assert read_input(still, (64, 64), 12.5).pixels.shape[2] == 1
    if name != "a.png":
        assert [row.path for row in scan_folder(tmp_path, VIDEO_SUFFIXES, "videos").rows] == [path]
        assert [row.path for row in scan_folder(tmp_path, IMAGE_SUFFIXES, "images").rows] == [still]


def png_header(path, side: int) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_picture_is_refused_in_one_line_before_it_is_decoded(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    (tmp_path / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    (tmp_path / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
    png_header(tmp_path / "large.png", 9000)
    png_header(tmp_path / "huge.png", 65500)
    with open(tmp_path / "long.webp", "wb") as sparse:
        sparse.write(b"RIFF\xff\xff\xff\x7fWEBPVP8L")
        sparse.truncate(2**31)
    Image.fromarray(BYTES).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    (tmp_path / "whole.png").unlink()
    for path in tmp_path.iterdir():
        for read in (read_picture, lambda p: read_input(p, (32, 32), 8.0)):
            with pytest.raises(VideoError) as caught:
                read(path)
            assert "\n" not in str(caught.value) and path.name in str(caught.value)
    with pytest.raises(VideoError, match="png, jpeg, webp"):
        read_input(tmp_path / "phone.HEIC", (32, 32), 8.0)


def test_a_strip_that_would_be_scaled_beyond_reason_is_refused(tmp_path):
    Image.new("L", (6000, 1)).save(tmp_path / "strip.png")
    with pytest.raises(VideoError, match="too narrow"):
        read_picture(tmp_path / "strip.png", cover=(256, 256))
    assert cover_size((10, 100), (20, 20)) == (20, 200)

"""The shipped weights."""

import numpy as np
import pytest
import torch
from media import SHARED

from stdit.data import VideoReader
from stdit.data.shapes import draw, random_clip
from stdit.data.transforms import crop, resize_short_side
from stdit.data.video_write import to_uint8
from stdit.evaluation.shapes import report
from stdit.pixels import to_float
from stdit.rng import keyed_rng
from stdit.training.vae import psnr
from stdit.vae import load_vae
from stdit.vae.adapters import WEIGHTS

HELD_OUT = {"dog", "nasa", "flower", "selfie", "friday", "classroom", "road", "bolt", "logdog"}


@pytest.fixture(scope="module")
def vae():
    return load_vae("tiny")


def to_pixels(frames: np.ndarray) -> torch.Tensor:
    return to_float(frames)[None]


def test_the_weights_are_small_enough_to_ship():
    assert sum(file.stat().st_size for file in WEIGHTS.glob("*.safetensors")) <= 4_000_000


@torch.no_grad()
def test_an_image_is_exactly_its_clips_first_latent_frame(vae):
    clip = to_pixels(draw(random_clip(keyed_rng("sample", 0))))
    assert torch.equal(vae.encode(clip[:, :, :1]), vae.encode(clip)[:, :, :1])


@torch.no_grad()
def test_decoding_is_causal_and_streams_in_constant_memory(vae):
    latents = vae.encode(to_pixels(draw(random_clip(keyed_rng("sample", 0), frames=33, motion="bounce"))))
    whole = vae.decode(latents)
    torch.testing.assert_close(vae.decode(latents[:, :, :3]), whole[:, :, :9], atol=1e-5, rtol=1e-5)
    stream = vae.decode_stream(latents)
    sizes = [part.shape[2] for part in stream]
    assert sizes == [1] + [4] * 8
    torch.testing.assert_close(torch.cat(list(vae.decode_stream(latents)), 2), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_shapes_survive_the_round_trip(vae):
    clips = [draw(random_clip(keyed_rng("sample", 9, i), i % 12)) for i in range(24)]
    decoded = [to_uint8(vae.decode(vae.encode(to_pixels(clip)))[0]) for clip in clips]
    result = report(decoded, [i % 12 for i in range(24)])
    assert result.shape == result.direction == 1.0
    assert result.bend < 0.2
    assert psnr([(to_pixels(a), to_pixels(b)) for a, b in zip(decoded, clips, strict=True)]) > 30


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared clips are not next to this checkout")
@pytest.mark.parametrize(("size", "least"), [(128, 28.7), (64, 26.8)])
@torch.no_grad()
def test_held_out_real_clips_are_reconstructed_well(vae, size, least):
    import csv

    clips = []
    with open(SHARED / "clips.csv", newline="") as stream:
        for row in csv.DictReader(stream):
            if row["group"] in HELD_OUT:
                with VideoReader(SHARED / row["path"]) as reader:
                    frames = reader.get_frames(range(min(17, len(reader))))
                if len(frames) == 17:
                    clips.append(to_pixels(crop(resize_short_side(frames, size), (size, size))))
    assert len(clips) >= 15
    assert psnr([(vae.decode(vae.encode(clip)), clip) for clip in clips]) >= least

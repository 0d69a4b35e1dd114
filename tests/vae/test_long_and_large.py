"""Long clips and large frames are encoded and decoded in parts, with the latents and pixels of the whole."""

import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch

from stdit.data.transforms import resize_short_side
from stdit.data.video_io import VideoReader
from stdit.data.video_write import write_video
from stdit.recipes.train_vae import read_clips
from stdit.training.vae import VAEConfig, VAEDataConfig
from stdit.vae import adapters, as_video_vae, load_vae, tiny


@pytest.fixture(scope="module")
def vae():
    return load_vae("tiny")


@pytest.mark.parametrize(("most", "tile"), [(1, 96), (5000, 96), (1 << 20, 5), (1, 3)])
def test_latents_of_parts_are_those_of_the_whole(vae, monkeypatch, most, tile):
    torch.manual_seed(0)
    pixels = torch.rand(2, 3, 13, 96, 72) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(pixels)
        monkeypatch.setattr(tiny, "MOST_PIXELS", most)
        monkeypatch.setattr(tiny, "TILE", tile)
        found = vae.encode(pixels)
        image = vae.encode(pixels[:, :, :1])
    assert (found - expected).abs().max() < 1e-4
    assert (image - found[:, :, :1]).abs().max() < 1e-4


@pytest.mark.parametrize("most", [1, 5 * 2 * 96 * 72])
def test_pixels_of_parts_are_those_of_the_whole(vae, monkeypatch, most):
    torch.manual_seed(0)
    latents, calls = torch.randn(2, vae.channels, 7, 12, 9), []
    with torch.no_grad(), vae.decoder.register_forward_pre_hook(lambda *args: calls.append(args)):
        expected = vae.decode(latents)
        monkeypatch.setattr(tiny, "MOST_DECODED", most)
        found = vae.decode(latents)
    assert len(calls) == 1 + (7 if most == 1 else 2)
    assert found.shape == expected.shape and (found - expected).abs().max() < 1e-4


def test_a_margin_that_is_too_small_would_be_seen(vae, monkeypatch):
    torch.manual_seed(0)
    pixels = torch.rand(1, 3, 5, 96, 72) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(pixels)
        monkeypatch.setattr(tiny, "TILE", 5)
        monkeypatch.setattr(tiny.TinyVAE, "margin", 1)
        assert (vae.encode(pixels) - expected).abs().max() > 1e-2


def test_a_clip_eight_times_as_long_takes_little_more_memory_than_its_pixels():
    script = (
        "import resource, sys, torch; from stdit.vae import load_vae; torch.set_num_threads(1); vae = load_vae('tiny');"
        "pixels = torch.ones(1, 3, int(sys.argv[1]), 256, 256);"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "torch.set_grad_enabled(False); vae.encode(pixels); print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"
    )
    grown = [
        float(subprocess.run([sys.executable, "-c", script, str(n)], capture_output=True, text=True, check=True).stdout)
        for n in (33, 257)
    ]
    assert grown[1] < grown[0] + 120


SMALL = (8, 8, 8, 8)
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
DIFFUSERS = {
    "kl": lambda: diffusers.AutoencoderKL(block_out_channels=SMALL, norm_num_groups=4, layers_per_block=1, **BLOCKS),
    "wan": lambda: diffusers.AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 2, 2], num_res_blocks=1),
    "cogvideox": lambda: diffusers.AutoencoderKLCogVideoX(
        block_out_channels=SMALL, norm_num_groups=4, layers_per_block=1, latent_channels=4
    ),
    "hunyuan": lambda: diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=SMALL, norm_num_groups=4, layers_per_block=1, latent_channels=4
    ),
    "ltx": lambda: diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=SMALL, decoder_block_out_channels=SMALL, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DIFFUSERS)
@torch.no_grad()
def test_diffusers_autoencoders_code_large_frames_in_tiles_and_others_as_ever(kind, monkeypatch):
    torch.manual_seed(0)
    vae = as_video_vae(DIFFUSERS[kind]()).eval()
    # Twice the size of diffusers' tiles, which are made small to be tested.
    side = 2 * vae.stride[1]
    monkeypatch.setattr(adapters, "_SMALLEST_TILE", side)
    for name in ("height", "width"):
        monkeypatch.setattr(vae.vae, f"tile_sample_min_{name}", side, raising=False)
        monkeypatch.setattr(vae.vae, f"tile_sample_stride_{name}", side, raising=False)
        monkeypatch.setattr(vae.vae, f"tile_latent_min_{name}", 2, raising=False)
        monkeypatch.setattr(vae.vae, f"tile_overlap_factor_{name}", 0.5, raising=False)
    monkeypatch.setattr(vae.vae, "tile_overlap_factor", 0.5, raising=False)
    if kind == "kl":
        monkeypatch.setattr(vae.vae, "tile_sample_min_size", 8)  # too small a tile, which is made larger
    pixels = torch.rand(1, 3, 1, 2 * side, 2 * side) * 2 - 1
    sizes = []
    encoder = vae.vae.encoder
    encoder.register_forward_pre_hook(lambda module, given: sizes.append(max(given[0].shape[-2:])))
    whole, decoded = vae.encode(pixels), vae.decode(vae.encode(pixels))
    assert set(sizes) == {2 * side // (vae.vae.config.get("patch_size") or 1) if kind == "wan" else 2 * side}
    again = vae.vae.encode(pixels[:, :, 0] if kind == "kl" else pixels).latent_dist.mode()
    assert torch.equal(
        (again.view_as(whole) - vae.latent_mean[None, :, None, None, None]) / vae.latent_std[None, :, None, None, None],
        whole,
    )
    sizes.clear()
    monkeypatch.setattr(adapters, "TILED_PIXELS", 4 * side * side - 1)
    tiled = vae.encode(pixels)
    assert tiled.shape == whole.shape and max(sizes) <= side and not vae.vae.use_tiling
    assert vae.decode(whole).shape == decoded.shape
    # A frame is coded the same way alone and in its clip.
    if vae.image_is_first_frame:
        clip = torch.cat(
            [pixels, torch.rand(1, 3, vae.stride[0] if vae.stride[0] > 1 else 3, 2 * side, 2 * side)], dim=2
        )
        assert (vae.encode(clip)[:, :, :1] - tiled).abs().max() < 1e-5


@torch.no_grad()
def test_an_image_vae_codes_a_long_clip_a_few_frames_at_a_time(monkeypatch):
    torch.manual_seed(0)
    vae = as_video_vae(DIFFUSERS["kl"]()).eval()
    pixels, counts = torch.rand(2, 3, 5, 16, 16) * 2 - 1, []
    vae.vae.encoder.register_forward_pre_hook(lambda module, given: counts.append(len(given[0])))
    expected = vae.encode(pixels)
    decoded = vae.decode(expected)
    monkeypatch.setattr(adapters, "MOST_PIXELS", 4 * 16 * 16)
    torch.testing.assert_close(vae.encode(pixels), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae.decode(expected), decoded, atol=1e-5, rtol=1e-5)
    assert counts == [10, 4, 4, 2]


@torch.no_grad()
def test_ltx_codes_long_clips_in_tiles_of_time_and_others_as_ever(monkeypatch):
    torch.manual_seed(0)
    vae = as_video_vae(DIFFUSERS["ltx"]()).eval()
    step = vae.stride[0]
    pixels, counts = torch.rand(1, 3, 6 * step + 1, 2 * vae.stride[1], 2 * vae.stride[1]) * 2 - 1, []
    vae.vae.encoder.register_forward_pre_hook(lambda module, given: counts.append(given[0].shape[2]))
    whole = vae.encode(pixels)
    decoded = vae.decode(whole)
    assert counts == [6 * step + 1]
    counts.clear()
    before = dict(vars(vae.vae))
    monkeypatch.setattr(adapters, "LONG_PIXELS", 0.9 * pixels[0, 0].numel())
    sizes = {"tile_sample_min_num_frames": 2 * step, "tile_sample_stride_num_frames": step}
    monkeypatch.setattr(adapters, "_FRAMES", sizes)
    for latents in range(1, 8):
        clip = pixels[:, :, : vae.pixel_frames(latents)]
        found = vae.encode(clip)
        assert found.shape[2] == latents and vae.decode(found).shape == clip.shape
        if latents < 6:  # not long enough
            torch.testing.assert_close(found, vae.encode(clip.clone()), rtol=0, atol=0)
            assert max(counts) == clip.shape[2]
    assert counts[-7:] == [2 * step + 1] * 5 + [step + 1, 1]
    # The beginning is that of the whole, since the encoder and its first tile see the same frames before.
    torch.testing.assert_close(found[:, :, :2], whole[:, :, :2], atol=1e-4, rtol=1e-4)
    assert vae.decode(whole).shape == decoded.shape
    assert {key: value for key, value in vars(vae.vae).items() if not key.startswith("_")} == {
        key: value for key, value in before.items() if not key.startswith("_")
    }


def test_clips_that_a_vae_is_trained_on_are_reduced_while_they_are_read(tmp_path, monkeypatch):
    rows, column, line = [], np.linspace(0, 255, 192)[:, None], np.linspace(0, 255, 256)
    frame = np.stack([column + 0 * line, 0 * column + line, 128 + 0 * column + 0 * line], -1).astype(np.uint8)
    for name, count in (("train", 21), ("test", 33)):
        write_video(tmp_path / f"{name}.mp4", np.repeat(frame[None], count, 0), fps=8)
        rows.append({"path": f"{name}.mp4", "group": name})
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read, get_frames = [], VideoReader.get_frames

    def watched(self, indices, size=None):
        found = get_frames(self, indices, size)
        read.append(found.shape[:3])
        return found

    monkeypatch.setattr(VideoReader, "get_frames", watched)
    data = {"root": str(tmp_path), "manifest": "manifest.jsonl", "hold_out": ["test"], "short_sides": [64, 96, 512]}
    training, held_out = read_clips(VAEConfig(data=VAEDataConfig(**data)))
    assert read == [(21, 96, 128), (17, 128, 171)]
    assert {side: clip.shape for side, clip in training[0].items()} == {64: (21, 64, 85, 3), 96: (21, 96, 128, 3)}
    for side, clip in training[0].items():
        expected = resize_short_side(frame[None], side)
        assert np.abs(clip.astype(int) - expected).mean() < 4
    assert held_out[0].shape == (17, 128, 171, 3)

"""Long clips and large frames are encoded in parts, with the latents of the whole."""

import subprocess
import sys

import pytest
import torch

from stdit.vae import load_vae, tiny


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

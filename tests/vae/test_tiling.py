from itertools import pairwise

import pytest
import torch
from conftest import fill

from stdit.vae import TinyVAE
from stdit.vae.tiling import decode_tiled, ramp, spans


@pytest.mark.parametrize(("size", "tile", "overlap"), [(8, 8, 2), (20, 8, 2), (33, 10, 4), (9, 8, 3), (100, 32, 8)])
def test_tiles_cover_everything_and_overlap_enough(size, tile, overlap):
    found = spans(size, tile, overlap)
    assert found[0][0] == 0
    assert found[-1][1] == size
    assert all(end - begin == min(tile, size) for begin, end in found)
    assert all(a[1] - b[0] >= overlap for a, b in pairwise(found))
    total = torch.zeros(size)
    for begin, end in found:
        total[begin:end] += ramp(begin, end, size, overlap)
    assert total.min() > 0


@torch.no_grad()
def test_tiles_decode_to_the_whole_frame():
    vae = fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8)))
    latents = torch.randn(1, 16, 2, 30, 22)
    whole = vae.decode(latents)
    inner = 14  # latents: twice the receptive radius of this decoder
    torch.testing.assert_close(decode_tiled(vae, latents, 40, 4), whole)
    tiled = decode_tiled(vae, latents, 2 * inner + 1, inner)
    assert tiled.shape == whole.shape
    # The middle of a tile is exact; where tiles meet the error is small.
    assert (tiled - whole).abs().max() < 0.02 * whole.abs().max()


def test_tiles_not_larger_than_two_overlaps_are_refused():
    with pytest.raises(ValueError, match="use tile=16"):
        decode_tiled(TinyVAE(), torch.zeros(1, 16, 1, 8, 8), 8, 4)

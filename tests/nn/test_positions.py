import numpy as np
import torch

from stdit.nn.positions import spatial_pos_embed, temporal_pos_embed


def dit_table(dim: int, size: int) -> np.ndarray:
    """The table of DiT's code, from its definition: first half x, second half y."""
    omega = 1 / 10000 ** (np.arange(dim // 4) / (dim / 4))
    angles = np.arange(size)[:, None] * omega
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return np.concatenate([np.tile(line, (size, 1)), np.repeat(line, size, axis=0)], axis=1)


def test_spatial_positions_equal_dits_table_on_a_square():
    np.testing.assert_allclose(spatial_pos_embed(4, 4, 16).numpy(), dit_table(16, 4), atol=1e-7)


def test_any_grid_has_positions_and_a_larger_one_contains_the_smaller():
    large, small = spatial_pos_embed(5, 7, 16).unflatten(0, (5, 7)), spatial_pos_embed(3, 4, 16).unflatten(0, (3, 4))
    assert torch.equal(large[:3, :4], small)


def test_time_is_zero_at_frame_zero_and_distinct_after_it():
    table = temporal_pos_embed(40, 32)
    assert torch.equal(table[0], torch.zeros(32))
    assert torch.cdist(table, table).fill_diagonal_(1).min() > 1e-2

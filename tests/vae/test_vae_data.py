"""The batches on which the tiny VAE is trained."""

import numpy as np
import pytest

from stdit.pixels import to_float
from stdit.training.vae import BATCH_SHAPES, ClipPool, VAEDataConfig


def pool(side, frames=17, **settings):
    return ClipPool([{side: np.zeros((frames, side, side, 3), np.uint8)}], None, VAEDataConfig(**settings))


def test_only_batches_are_drawn_that_the_clips_are_large_and_long_enough_for():
    own = {"share_shapes": 0.0, "share_images": 0.0}
    drawn = {pool(64, **own).batch(0, step).shape[2:] for step in range(40)}
    assert drawn == {(9, 64, 64), (17, 64, 64)}
    assert {pool(64, frames=9, **own).batch(0, step).shape[2:] for step in range(10)} == {(9, 64, 64)}


def test_clips_that_no_batch_can_be_cut_from_are_refused():
    with pytest.raises(ValueError, match="has 9 frames with a short side of 64 pixels"):
        pool(32)
    assert len(pool(32, share_shapes=1.0).shapes) == len(BATCH_SHAPES)


def test_without_augmentation_clips_are_only_cut():
    frames = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)
    whole = to_float(frames[None])
    for augment in (True, False):
        settings = VAEDataConfig(share_shapes=0.0, share_images=0.0, augment=augment)
        drawn = [ClipPool([{64: frames}], None, settings).batch(0, step) for step in range(3)]
        assert all((batch == whole).all() for batch in drawn) != augment

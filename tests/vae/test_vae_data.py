"""The batches on which the tiny VAE is trained."""

import json

import numpy as np
import pytest
from media import write_barcodes

from stdit.pixels import to_float
from stdit.recipes import index
from stdit.recipes.train_vae import data_fingerprint, read_clips
from stdit.training.vae import BATCH_SHAPES, ClipPool, VAEConfig, VAEDataConfig


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


def test_an_index_gives_the_clips_and_the_fingerprint_of_its_manifest_without_files_that_cannot_be_read(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    for number in range(4):
        write_barcodes(tmp_path / f"clips/{number}.mp4", 18 + number)
    rows = [{"path": f"{number}.mp4", "group": "held" if number == 1 else "own"} for number in range(4)]
    (tmp_path / "clips/list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert index.main(["clips/list.jsonl", "--output", "list.index", "--workers", "0"]) == 0

    def config(manifest):
        return VAEConfig(data=VAEDataConfig(root="clips", manifest=manifest, hold_out=["held"], short_sides=[32]))

    plain, indexed = config("list.jsonl"), config("list.index")
    assert data_fingerprint(plain) == data_fingerprint(indexed)
    (clips, held_out), (clips_of_index, held_out_of_index) = read_clips(plain), read_clips(indexed)
    assert len(clips) == len(clips_of_index) == 3 and len(held_out) == len(held_out_of_index) == 1
    for one, other in zip(clips, clips_of_index, strict=True):
        assert one.keys() == other.keys() and all((one[side] == other[side]).all() for side in one)
    assert (held_out[0] == held_out_of_index[0]).all()

    (tmp_path / "clips/3.mp4").write_bytes(b"no video")
    index.main(["clips/list.jsonl", "--output", "list.index", "--workers", "0"])
    assert len(read_clips(indexed)[0]) == 2

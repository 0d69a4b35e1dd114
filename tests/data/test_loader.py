import multiprocessing
from itertools import islice

import numpy as np
import pytest
import torch
from media import write_barcodes

from stdit.data.datasets import DataConfig, build_dataset
from stdit.data.loader import batches
from stdit.data.samplers import sample_index


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        write_barcodes(tmp_path / f"{i}.mp4", 24)
    return tmp_path


def config(folder, **changes) -> DataConfig:
    return DataConfig(
        **{
            "root": str(folder),
            "num_frames": 5,
            "height": 32,
            "width": 32,
            "crop": "random",
            "flip": True,
            "workers": 0,
            **changes,
        }
    )


def take(dataset, count: int, **options):
    return list(islice(batches(dataset, 7, 4, **options), count))


def same(a, b) -> bool:
    return torch.equal(a.pixels, b.pixels) and a.keys == b.keys


def test_an_epoch_has_every_sample_once():
    for epoch in range(3):
        assert sorted(sample_index(5, epoch * 10 + i, 10) for i in range(10)) == list(range(10))
    assert [sample_index(5, i, 10) for i in range(10)] != [sample_index(5, 10 + i, 10) for i in range(10)]


def test_batches_depend_on_seed_and_step_alone(folder):
    dataset = build_dataset(config(folder))
    whole = take(dataset, 6)
    assert all(same(a, b) for a, b in zip(take(dataset, 3, start_step=3), whole[3:], strict=True))
    assert not torch.equal(whole[0].pixels, whole[1].pixels)
    other = next(batches(dataset, 8, 4))
    assert not torch.equal(other.pixels, whole[0].pixels)


def test_workers_change_nothing_and_end_with_the_batches(folder):
    dataset = build_dataset(config(folder))
    stream = batches(dataset, 7, 4, workers=2)
    assert all(same(a, b) for a, b in zip(islice(stream, 3), take(dataset, 3), strict=True))
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert not multiprocessing.active_children()


def test_two_processes_share_the_same_batch(folder):
    dataset = build_dataset(config(folder))
    whole = take(dataset, 2)
    parts = [take(dataset, 2, process=p, processes=2) for p in range(2)]
    for step in range(2):
        for p in range(2):
            assert torch.equal(parts[p][step].pixels, whole[step].pixels[p::2])


def test_micro_batches_concatenate_to_the_batch(folder):
    dataset = build_dataset(config(folder))
    pieces = take(dataset, 4, micro_batch=2)
    whole = take(dataset, 2)
    for step in range(2):
        assert torch.equal(torch.cat([pieces[2 * step].pixels, pieces[2 * step + 1].pixels]), whole[step].pixels)


def test_an_unreadable_file_is_replaced_and_reported_and_the_rest_is_unchanged(folder):
    good = take(build_dataset(config(folder)), 3)
    (folder / "2.mp4").write_bytes(b"broken")
    bad = take(build_dataset(config(folder)), 3)
    names = {name for batch in bad for name in batch.bad}
    assert names == {str(folder / "2.mp4")}
    unchanged = [not batch.bad for batch in bad]
    assert all(same(a, b) for a, b, u in zip(good, bad, unchanged, strict=True) if u)
    repeated = take(build_dataset(config(folder)), 3, workers=2)
    assert all(same(a, b) for a, b in zip(bad, repeated, strict=True))


def test_a_folder_without_readable_files_is_refused_in_one_line(folder):
    for path in folder.iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="files in a row could not be read"):
        take(build_dataset(config(folder)), 1)


def test_errors_for_short_clips_give_a_remedy(folder):
    with pytest.raises(ValueError, match=r"lower data.num_frames"):
        take(build_dataset(config(folder, num_frames=25)), 1)
    with pytest.raises(ValueError, match=r"raise data.fps"):
        take(build_dataset(config(folder, num_frames=17, fps=8)), 1)


def test_frames_are_picked_at_the_requested_rate(folder):
    from media import read_barcode

    dataset = build_dataset(config(folder, fps=6, crop="center", flip=False, height=48, width=64))
    frames = dataset.load(0, np.random.default_rng(0))["pixels"].numpy()
    numbers = [read_barcode(frame) for frame in frames]
    assert np.diff(numbers).tolist() == [4, 4, 4, 4]


def test_images_and_digits_are_one_frame_clips(tmp_path):
    import gzip
    import struct

    from PIL import Image

    for label in ("x", "y"):
        (tmp_path / "images" / label).mkdir(parents=True)
        Image.fromarray(np.full((40, 50, 3), 100, np.uint8)).save(tmp_path / "images" / label / "a.png")
    images = build_dataset(config(tmp_path / "images", num_frames=1, flip=False))
    assert images.class_names == ["x", "y"]
    assert images.load(0, np.random.default_rng(0))["pixels"].shape == (1, 32, 32, 3)
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as stream:
        stream.write(struct.pack(">HBBIII", 0, 8, 3, 2, 28, 28) + bytes(2 * 28 * 28))
    with gzip.open(tmp_path / "train-labels-idx1-ubyte.gz", "wb") as stream:
        stream.write(struct.pack(">HBBI", 0, 8, 1, 2) + bytes([3, 9]))
    digits = build_dataset(config(tmp_path, num_frames=1, flip=False))
    assert (len(digits), digits.num_classes, digits.record(1)["label"]) == (2, 10, 9)
    assert digits.load(0, np.random.default_rng(0))["pixels"].shape == (1, 32, 32, 3)
    with pytest.raises(ValueError, match=r"use data.num_frames=1"):
        build_dataset(config(tmp_path, num_frames=5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 0}, "data.num_frames must be >= 1, got 0"),
        ({"height": -8}, "data.height must be >= 1, got -8"),
        ({"fps": -1.0}, "data.fps must be > 0 or null, got -1.0"),
        ({"workers": -1}, "data.workers must be >= 0 or null, got -1"),
        ({"backend": "pyavv"}, "Unknown video backend 'pyavv'. Did you mean 'pyav'"),
    ],
)
def test_impossible_data_settings_are_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        take(build_dataset(config(folder, **changes)), 1)

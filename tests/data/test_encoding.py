"""Clips to latents for a cache: which threads encode, and that latents do not depend on it."""

import threading

import pytest
import torch
from media import write_barcodes

from stdit.data.config import DataConfig
from stdit.data.datasets import build_dataset
from stdit.recipes import encoding
from stdit.recipes.encoding import Draw, Form, encode_shard
from stdit.vae import load_vae

COUNT = 6


@pytest.fixture
def dataset(tmp_path):
    for i in range(COUNT):
        write_barcodes(tmp_path / f"{i}.mp4", 9)
    return build_dataset(DataConfig(root=str(tmp_path), num_frames=5, height=32, width=32))


def watched(monkeypatch):
    """The tiny VAE, and a set that gets the threads that encode with it and their numbers of threads of torch."""
    vae, seen, real = load_vae("tiny"), set(), encoding._encode

    def encode(*args):
        seen.add((threading.get_ident(), torch.get_num_threads()))
        return real(*args)

    monkeypatch.setattr(encoding, "_encode", encode)
    return vae, seen


def shard_of(dataset, vae, threads, clips=range(COUNT)):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        draws = [Draw(i, 0) for i in clips]
        shard = encode_shard(dataset, vae, clips, draws=draws, seed=0, form=Form(torch.float32, "fp32"))
        assert torch.get_num_threads() == threads  # as before
        return shard
    finally:
        torch.set_num_threads(before)


def test_latents_do_not_depend_on_how_many_clips_are_encoded_at_a_time(dataset, monkeypatch):
    vae, seen = watched(monkeypatch)
    one = shard_of(dataset, vae, 1)
    assert seen == {(threading.get_ident(), 1)}
    seen.clear()
    three = shard_of(dataset, vae, 3)
    assert {number for _, number in seen} == {1} and threading.get_ident() not in {thread for thread, _ in seen}
    assert three.indices == one.indices == list(range(COUNT))
    for name, tensor in one.tensors.items():
        assert len(tensor) == COUNT and not torch.equal(tensor[0], tensor[1])
        assert torch.equal(three.tensors[name], tensor)


def test_a_clip_encoded_alone_has_the_bits_that_it_has_among_others(tmp_path, monkeypatch):
    for i in range(COUNT):
        write_barcodes(tmp_path / f"{i}.mp4", 9)
    dataset = build_dataset(DataConfig(root=str(tmp_path), num_frames=9, height=64, width=64))
    vae, seen = watched(monkeypatch)
    for threads in (2, 4):
        among = shard_of(dataset, vae, threads)
        assert {number for _, number in seen} == {1}
        alone = shard_of(dataset, vae, threads, [3])
        assert {number for _, number in seen} == {1}
        for name, tensor in among.tensors.items():
            assert torch.equal(alone.tensors[name][0], tensor[3])
        seen.clear()


def test_large_clips_and_vaes_that_keep_a_state_are_encoded_one_after_the_other(dataset, monkeypatch):
    vae, seen = watched(monkeypatch)
    clip = 5 * 32 * 32
    monkeypatch.setattr(encoding, "_MOST_PIXELS", 2 * clip - 1)
    shard_of(dataset, vae, 2)
    monkeypatch.setattr(encoding, "_MOST_PIXELS", 6 * clip)
    vae.reentrant = False  # as the VAEs of diffusers, some of which keep frames of the clip before
    shard_of(dataset, vae, 2)
    assert seen == {(threading.get_ident(), 2)}

"""Random streams by key: every draw is a function of (purpose, seed, step, sample), never of earlier draws."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The purposes of draws; two purposes under the same (seed, step, sample) are independent. The index in this tuple is
# part of the key: append, never reorder, or resumed runs differ.
PURPOSES = (
    "order",
    "sample",
    "noise",
    "levels",
    "dropout",
    "preview",
    "strategy",
    "history",
    "mask",
    "grouped",
    "lora",
    "guidance",
    "posterior",
)

_BLOCK = 65536  # keys at once, which bounds the memory of their numbers of 128 bits
_WORD = 0xFFFFFFFF
_PCG64 = 0x2360ED051FC65DA44385DF649FCCF645  # the multiplier of its step


def keyed_rng(purpose: str, *key: int) -> np.random.Generator:
    """Make a numpy generator for `purpose` and whole numbers such as (seed, step, sample)."""
    return np.random.default_rng(np.random.SeedSequence((PURPOSES.index(purpose), *key)))


def keyed_choices(purpose: str, key: Sequence[int | np.ndarray], count: int) -> np.ndarray:
    """What `keyed_rng(purpose, *key).integers(count)` draws, for many keys at once (N,), thirty times as fast.

    key: its parts, numbers or arrays (N,) of numbers below 2^32. count: at most 2^32.
    """
    length = max(np.size(part) for part in key)
    found = np.zeros(length, np.int64)
    for first in range(0, length, _BLOCK):
        rows = slice(first, min(first + _BLOCK, length))
        parts = [part[rows] if isinstance(part, np.ndarray) else part for part in key]
        scaled = _first_word(_pool([PURPOSES.index(purpose), *parts], rows.stop - first)) * np.uint64(count)
        found[rows] = scaled >> np.uint64(32)
        # Numpy may have drawn again, so that all numbers are equally likely.
        for i in np.flatnonzero((scaled & np.uint64(_WORD)) < count):
            one = [int(part[i]) if isinstance(part, np.ndarray) else part for part in parts]
            found[first + i] = keyed_rng(purpose, *one).integers(count)
    return found


def _pool(key: Sequence[int | np.ndarray], count: int) -> list[np.ndarray]:
    """The pool of numpy's `SeedSequence` for each of `count` keys: four arrays (count,) of 32 bits."""
    words: list[np.ndarray] = []
    for part in key:
        if isinstance(part, np.ndarray):
            words.append(part.astype(np.uint32))
        else:  # a number is as many words as it needs
            words += [
                np.full(count, part >> shift & _WORD, np.uint32) for shift in range(0, part.bit_length() or 1, 32)
            ]
    words += [np.zeros(count, np.uint32)] * (4 - len(words))
    constant = 0x43B0D7E5

    def hashed(value: np.ndarray) -> np.ndarray:
        nonlocal constant
        value = value ^ np.uint32(constant)
        constant = constant * 0x931E8875 & _WORD
        value = value * np.uint32(constant)
        return value ^ value >> np.uint32(16)

    def mixed(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        value: np.ndarray = one * np.uint32(0xCA01F9DD) - other * np.uint32(0x4973F715)
        return value ^ value >> np.uint32(16)

    pool = [hashed(word) for word in words[:4]]
    for source in range(4):
        for target in range(4):
            if source != target:
                pool[target] = mixed(pool[target], hashed(pool[source]))
    for word in words[4:]:
        pool = [mixed(each, hashed(word)) for each in pool]
    return pool


def _first_word(pool: Sequence[np.ndarray]) -> np.ndarray:
    """The first 32 bits (N,) uint64 that numpy's `PCG64` draws from each pool."""
    constant = 0x8B51F9DD
    state: list[Any] = []
    for number in range(8):
        value = pool[number % 4] ^ np.uint32(constant)
        constant = constant * 0x58F38DED & _WORD
        value = value * np.uint32(constant)
        value = value ^ value >> np.uint32(16)
        state.append(value.astype(object))  # Python's numbers, since numpy has none of 128 bits
    begin, stream = (state[i + 1] << 96 | state[i] << 64 | state[i + 3] << 32 | state[i + 2] for i in (0, 4))
    stream = stream << 1 | 1
    begin = ((begin + stream) * _PCG64 + stream) * _PCG64 + stream  # a step after seeding, and that of the draw
    begin = begin & (1 << 128) - 1
    halves = ((begin >> 64 ^ begin) & (1 << 64) - 1).astype(np.uint64)
    turn = (begin >> 122).astype(np.uint64)
    return (halves >> turn | halves << (np.uint64(64) - turn) % np.uint64(64)) & np.uint64(_WORD)


def keyed_generator(purpose: str, *key: int) -> torch.Generator:
    """Make a torch generator on the CPU for `purpose` and whole numbers such as (seed, step, sample)."""
    words = np.random.SeedSequence((PURPOSES.index(purpose), *key)).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


def keyed_normal(purpose: str, keys: list[tuple[int, ...]], shape: tuple[int, ...]) -> Tensor:
    """Draw standard normal numbers (len(keys), *shape); row i is a function of keys[i] alone."""
    return torch.stack([torch.randn(shape, generator=keyed_generator(purpose, *key)) for key in keys])

"""Random streams by key: every draw is a function of (purpose, seed, step, sample), never of earlier draws."""

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


def keyed_rng(purpose: str, *key: int) -> np.random.Generator:
    """Make a numpy generator for `purpose` and whole numbers such as (seed, step, sample)."""
    return np.random.default_rng(np.random.SeedSequence((PURPOSES.index(purpose), *key)))


def keyed_generator(purpose: str, *key: int) -> torch.Generator:
    """Make a torch generator on the CPU for `purpose` and whole numbers such as (seed, step, sample)."""
    words = np.random.SeedSequence((PURPOSES.index(purpose), *key)).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


def keyed_normal(purpose: str, keys: list[tuple[int, ...]], shape: tuple[int, ...]) -> Tensor:
    """Draw standard normal numbers (len(keys), *shape); row i is a function of keys[i] alone."""
    return torch.stack([torch.randn(shape, generator=keyed_generator(purpose, *key)) for key in keys])

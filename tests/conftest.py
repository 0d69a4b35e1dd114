import atexit
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # tests must not use the network
if "STDIT_CACHE" not in os.environ:  # nor write to the user's cache
    os.environ["STDIT_CACHE"] = tempfile.mkdtemp(prefix="stdit-cache-")
    atexit.register(shutil.rmtree, os.environ["STDIT_CACHE"], ignore_errors=True)

import pytest
import torch

from stdit.model.stdit import STDiT
from stdit.nn.config import BlockConfig
from stdit.nn.context import make_context
from stdit.nn.layout import DenseLayout
from stdit.nn.modulation import Condition
from stdit.sampling.schedule import Schedule, make_schedule


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def fill(model: torch.nn.Module, scale: float = 0.05) -> torch.nn.Module:
    """Add random numbers to all weights, also where the initialisation is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(scale * torch.randn(value.shape, generator=generator))
    return model


def context(x: torch.Tensor, embedding: torch.Tensor, *blocks: torch.nn.Module, config: BlockConfig | None = None):
    """The context of blocks, for tokens (B, T, S, D) with one row of patches per frame and a conditioning vector."""
    layout = DenseLayout((x.shape[1], 1, x.shape[2]))
    attentions = [(block.attn.axis, block.attn.position_encoding) for block in blocks]
    return make_context(config or BlockConfig(x.shape[-1], 4), attentions, Condition(embedding), layout)


def from_noise(noise: torch.Tensor, schedule: torch.Tensor) -> Schedule:
    """A schedule of levels (steps + 1,) for all frames at once, from noise (B, C, T, h, w)."""
    return Schedule(noise, make_schedule(schedule, torch.ones(noise.shape[2], dtype=torch.bool)))


@pytest.fixture
def tiny_model():
    """A function that makes a small STDiT with random weights."""

    def make(**kwargs) -> STDiT:
        arguments = {"depth": 2, "hidden_size": 32, "num_heads": 4, "in_channels": 4, "num_classes": 5, **kwargs}
        torch.manual_seed(0)  # the same arguments make the same model
        return fill(STDiT(**arguments)).eval()

    return make

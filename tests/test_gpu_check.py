"""Checks of `tools/gpu_check.py` run and pass with their tensors on the CPU."""

import pytest
import torch

from stdit.recipes import gpu_check


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    monkeypatch.setattr(gpu_check, "autocast", lambda precision, device: torch.autocast("cpu", enabled=False))
    small = gpu_check.small_model
    monkeypatch.setattr(gpu_check, "small_model", lambda **changes: small(depth=2, hidden_size=64, **changes))


@pytest.mark.parametrize("check", [gpu_check.resume_is_exact, gpu_check.forward_matches_cpu, gpu_check.vae_matches_cpu])
def test_a_check_for_cuda_runs_and_holds_on_the_cpu(here, check):
    assert check()

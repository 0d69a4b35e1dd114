"""Muon has the same updates as torch's."""

import pytest
import torch
from torch import nn

from stdit.training import muon
from stdit.training.muon import Muon, orthogonalize

SHAPES = [(48, 16), (48, 16), (16, 48), (16, 16), (64, 8)]


@pytest.mark.parametrize("native", [True, False])
def test_updates_are_those_of_torch_within_rounding(monkeypatch, native):
    monkeypatch.setattr(muon, "native_bf16", lambda device: native)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    theirs, ours = ([nn.Parameter(p.clone()) for p in start] for _ in range(2))
    options = {"lr": 0.01, "weight_decay": 0.1}
    optimizers = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options), Muon(ours, **options)
    for _ in range(4):
        for a, b in zip(theirs, ours, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, p in zip(theirs, ours, start, strict=True):
        difference = ((a - b).norm() / (a - p).norm()).item()
        assert difference < 0.02  # torch's iteration runs in bfloat16
        assert not native or difference < 1e-6


@pytest.mark.parametrize("shape", [(3, 12, 40), (3, 12, 12)])
def test_the_iteration_on_the_gram_matrix_equals_the_iteration_on_the_matrix(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x = x * torch.logspace(0, -4, shape[2])  # singular values over four orders of magnitude
    expected = x.double() / torch.linalg.vector_norm(x.double(), dim=(1, 2), keepdim=True)
    a, b, c = muon.COEFFICIENTS
    for _ in range(muon.STEPS):
        gram = expected @ expected.mT
        expected = a * expected + (b * gram + c * gram @ gram) @ expected
    assert torch.allclose(orthogonalize(x).double(), expected, atol=1e-3)


def test_singular_values_come_near_one():
    x = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonalize(x))
    assert values.min() > 0.6 and values.max() < 1.3


def test_matrices_are_updated_alike_whatever_is_iterated_together(monkeypatch):
    def run():
        generator = torch.Generator().manual_seed(3)
        params = [nn.Parameter(torch.randn(8, 24, generator=generator)) for _ in range(5)]
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        Muon(params, lr=0.1).step()
        return torch.stack([p.detach() for p in params])

    together = run()
    monkeypatch.setattr(muon, "CHUNK", 1)
    assert torch.allclose(run(), together, atol=1e-6)


def test_kernels_of_convolutions_are_matrices_of_their_output_channels():
    kernel = nn.Parameter(torch.randn(4, 3, 2, 2))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad = torch.randn(4, 3, 2, 2)
    matrix.grad = kernel.grad.flatten(1).clone()
    for p in (kernel, matrix):
        Muon([p], lr=0.1).step()
    assert torch.equal(kernel.flatten(1), matrix)


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"got a parameter of shape \(3,\); give it to AdamW"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)

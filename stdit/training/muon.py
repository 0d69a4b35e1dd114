"""Muon: momentum whose matrices are orthogonalised before they are applied."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stdit.precision import native_bf16
from stdit.training.parallel import computing_device, like, local, rows_of, whole

# The quintic iteration of Jordan et al., "Muon" (2024): five steps bring singular values to between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
# The largest number of values in matrices that are iterated together, which bounds the memory of their copies.
CHUNK = 1 << 22


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values of each matrix near one by a Newton-Schulz iteration.

    matrices: (N, m, n) with m <= n, in the number format to compute in. Source: Jordan et al., "Muon" (2024).
    """
    a, b, c = COEFFICIENTS
    m, n = matrices.shape[1:]
    norm = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if matrices.dtype == torch.bfloat16 or 2 * n < 3 * m:
        x = matrices / norm
        for _ in range(STEPS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    # Every step multiplies by a polynomial of the Gram matrix, so a wide matrix itself is needed only first and last:
    # (4 STEPS - 3) m^3 + 2 m^2 n products in place of STEPS (m^3 + 2 m^2 n). It needs float32: errors in the Gram
    # matrix are not corrected by later steps.
    gram = (matrices @ matrices.mT) / norm.square()
    product = a * torch.eye(m, dtype=gram.dtype, device=gram.device) + torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor = product
    for _ in range(STEPS - 1):
        half = factor @ gram
        gram = half @ factor  # the Gram matrix after the step: the factors are symmetric and commute with it
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor @ product
    return (product / norm) @ matrices


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) at the root mean square of AdamW's updates (Liu et al., "Muon is Scalable", 2025).

    It equals `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` within rounding, and differs in speed: matrices of one
    shape are orthogonalised together, in bfloat16 where the device computes in it natively and in float32 elsewhere.
    Kernels of convolutions are matrices of one row for each output channel.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2:
                    raise ValueError(
                        f"Muon takes matrices, got a parameter of shape {tuple(p.shape)}; give it to AdamW."
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group["lr"], group["weight_decay"], group["momentum"])
        return loss

    def _update(self, params: list[nn.Parameter], lr: float, weight_decay: float, momentum: float) -> None:
        for p in params:
            if not self.state[p]:
                assert p.grad is not None
                self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad, memory_format=torch.contiguous_format)
        gradients = [local(p.grad).flatten(1) for p in params if p.grad is not None]
        buffers = [local(self.state[p]["momentum_buffer"]).flatten(1) for p in params]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        if weight_decay:
            torch._foreach_mul_([local(p) for p in params], 1 - lr * weight_decay)
        for chunk in _chunks(params):
            rows = params[chunk[0]].shape[0]
            columns = params[chunk[0]].numel() // rows
            # Matrices that wait in the host's memory are moved, since their device iterates much faster than the host.
            device = computing_device(params[chunk[0]])
            dtype = torch.bfloat16 if native_bf16(device) else torch.float32
            stacked = torch.empty(len(chunk), rows, columns, dtype=dtype, device=device)
            for i, direction in zip(chunk, stacked, strict=True):
                part = torch.lerp(gradients[i], buffers[i], momentum)  # Nesterov's look ahead
                # The iteration needs whole matrices, which every process gathers from the rows of all.
                part = part.reshape(local(params[i]).shape).to(device)
                direction.copy_(whole(like(part, params[i])).flatten(1))
            updates = orthogonalize(stacked if rows <= columns else stacked.mT).float()
            for i, update in zip(chunk, updates if rows <= columns else updates.mT, strict=True):
                part = local(params[i])
                first, end = rows_of(params[i]) or (0, rows)
                own = update[first:end].reshape(part.shape).to(part.device)
                part.add_(own, alpha=-lr * 0.2 * math.sqrt(max(rows, columns)))


def _chunks(matrices: Sequence[Tensor]) -> list[list[int]]:
    """Indices of matrices of one shape and device, in groups of at most CHUNK numbers (or one matrix)."""
    groups = defaultdict(list)
    for i, matrix in enumerate(matrices):
        groups[torch.Size((len(matrix), matrix.numel() // len(matrix))), matrix.device].append(i)
    chunks = []
    for (shape, _), members in groups.items():
        size = max(1, CHUNK // shape.numel())
        chunks += [members[first : first + size] for first in range(0, len(members), size)]
    return chunks

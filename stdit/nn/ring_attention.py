"""Ring attention: queries stay, keys and values travel around the processes of a group (Liu et al., 2023).

torch sends, merges and differentiates (`_templated_ring_attention`); its kernel is the fused one of the device, which returns
the logarithm of its sum. torch's own interfaces to it replace attention of a whole model, and have no kernel for CPUs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

_SEQUENCE = 2  # the dimension of (N, H, L, D) that is shared by the processes


class RingKernels(NamedTuple):
    """The kernels of a kind of device, and which further results of the first are arguments of the second."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    further: tuple[str, ...]


_aten = torch.ops.aten
RING_KERNELS = {
    "cpu": RingKernels(
        _aten._scaled_dot_product_flash_attention_for_cpu,
        _aten._scaled_dot_product_flash_attention_for_cpu_backward,
        (),
    ),
    "cuda": RingKernels(
        _aten._scaled_dot_product_flash_attention,
        _aten._scaled_dot_product_flash_attention_backward,
        ("cum_seq_q", "cum_seq_k", "max_q", "max_k", "philox_seed", "philox_offset"),
    ),
}


class TorchRing(NamedTuple):
    """What is used of torch's ring attention; `options` and the values of `rotate` are global to torch."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    options: Any
    rotate: Any


def torch_ring() -> TorchRing:
    """torch's ring attention; ValueError if this torch has none."""
    try:
        from torch.distributed.tensor.experimental._context_parallel._attention import (
            _cp_options,
            _RotateMethod,
            _templated_ring_attention,
            _templated_ring_attention_backward,
        )
    except ImportError as error:
        raise ValueError(
            f"torch {torch.__version__} lacks the ring attention that torch 2.11 and 2.13 have ({error}); use one of them, or ring=1."
        ) from error
    return TorchRing(_templated_ring_attention, _templated_ring_attention_backward, _cp_options, _RotateMethod)


def attend_in_ring(query: Tensor, key: Tensor, value: Tensor, group: Any) -> Tensor:
    """Attention of this process's queries to the keys and values of all processes of a group, which call it alike.

    query, key, value: (N, L, H, D), the tokens of this process -> (N, L, H, D). No masks; the kernel is torch's flash attention,
    whatever backend the model has. ValueError if the device has none for these tensors.
    """
    parts = (x.transpose(1, _SEQUENCE) for x in (query, key, value))
    return _Ring.apply(*parts, group).transpose(1, _SEQUENCE)


def has_ring_kernels(device: str, width: int, *, in_16_bits: bool) -> bool:
    """Whether a kind of device has kernels for heads of `width` numbers, in bfloat16 or float16 or in float32."""
    return device == "cpu" or (device == "cuda" and in_16_bits and width % 8 == 0 and width <= 256)


def check_ring_kernels(device: str, width: int, *, in_16_bits: bool) -> None:
    """Raise ValueError if a kind of device has no kernels for heads of `width` numbers, as `has_ring_kernels` says."""
    if not has_ring_kernels(device, width, in_16_bits=in_16_bits):
        raise ValueError(
            f"ring attention runs on CPUs, and on CUDA in bfloat16 or float16 with heads of a multiple of 8 numbers up to 256, not on "
            f"{device} in {'16' if in_16_bits else '32'} bits with heads of {width}; use train.precision=bf16 (a pipeline: "
            "dtype=torch.bfloat16), another num_heads, or ring=1."
        )


def _kernels(query: Tensor) -> RingKernels:
    """The kernels for tensors (N, H, L, D) such as the queries."""
    device = query.device.type
    check_ring_kernels(device, query.shape[-1], in_16_bits=query.dtype in (torch.bfloat16, torch.float16))
    return RING_KERNELS[device]


class _Ring(torch.autograd.Function):
    """torch's ring attention with its gradients, for query, key and value (N, H, L, D) and the group."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, group: Any) -> Tensor:
        kernels = _kernels(query)
        with _options() as ring:
            out, sums, *rest = ring.forward(group, _SEQUENCE, kernels.forward, query=query, key=key, value=value)
        saved = (query, key, value, out, sums)
        ctx.save_for_backward(*saved)
        ctx.group, ctx.rest = group, dict(zip(kernels.further, rest, strict=False))  # a debug mask follows them
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, sums = ctx.saved_tensors
        with _options() as ring:
            found = ring.backward(
                ctx.group, _SEQUENCE, _kernels(query).backward, grad_out=gradient.contiguous(), grad_out_name="grad_out",
                query=query, key=key, value=value, out=out, logsumexp=sums, is_causal=False, dropout_p=0.0, **ctx.rest,
            )  # fmt: skip
        return *found[:3], None


@contextmanager
def _options() -> Iterator[TorchRing]:
    """torch's ring attention with its options set, which are global, and put back.

    Balancing is for causal masks. By default torch would gather the keys and values of all processes in each at once.
    """
    ring = torch_ring()
    wanted = {"convert_to_f32": True, "enable_load_balance": False, "rotate_method": ring.rotate.ALL_TO_ALL}
    before = {name: getattr(ring.options, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(ring.options, name, value)
        yield ring
    finally:
        for name, value in before.items():
            setattr(ring.options, name, value)

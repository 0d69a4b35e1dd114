"""Selective gradient checkpointing: the results of dear operations are kept, those of cheap ones are computed again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

# Products with weights, and fused attention. Attention as plain products (bmm) is not among them: its matrices are what
# checkpointing is to avoid, and it runs where sequences are short.
_DEAR = (
    "aten::mm", "aten::addmm", "aten::convolution", "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention", "torch_attn::_varlen_attn",
)  # fmt: skip


def is_saved(operation: Any) -> bool:
    """Whether the results of an operation of torch (an `OpOverload`) are kept for the backward pass."""
    return operation.name().partition(".")[0] in _DEAR


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> bool:
    return is_saved(operation)


def checkpoint_selectively(block: nn.Module, *inputs: Any) -> Any:
    """Run a block so that its backward pass computes again what is cheap; the gradients are the same bits.

    It is an argument of `STDiT.enable_gradient_checkpointing`.
    """

    def contexts() -> tuple[Any, Any]:
        return create_selective_checkpoint_contexts(_policy)

    return checkpoint(_without_cached_casts(block), *inputs, use_reentrant=False, context_fn=contexts)


def _without_cached_casts(block: nn.Module) -> Callable[..., Any]:
    """Run a block without autocast's cache of weights, with which a second pass would run other operations than the first."""

    def run(*inputs: Any) -> Any:
        before = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            return block(*inputs)
        finally:
            torch.set_autocast_cache_enabled(before)

    return run


# By the values of `model.gradient_checkpointing`: what runs a block; None: diffusers' choice, which computes all again.
CHECKPOINTING: dict[bool | str, Callable[..., Any] | None] = {True: None, "selective": checkpoint_selectively}

"""The blocks of a model compiled by torch.compile, for training steps alone."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

_GRAPHS = 256  # of one kind of block, at most
LONG_RUN = 2000  # steps, in which compiled blocks gain more time than they cost


def compiler_error(device: torch.device) -> str | None:
    """Why torch.compile cannot make code for a device on this machine, in one line; None if it can."""
    try:
        made = torch.compile(_probe, fullgraph=True)
        made(torch.ones(8, device=device, requires_grad=True)).backward()
    except (
        Exception
    ) as error:  # a compiler, its headers, or a folder for its files is missing, or anything else of many
        error = getattr(error, "inner_exception", error)  # of the compiler, which torch wraps
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[0] if lines else type(error).__name__
    return None


def _probe(x: Tensor) -> Tensor:
    return (x * x).sum()


def compile_blocks(model: Any, backend: str = "inductor", *, sharded: bool = False, required: bool = True) -> None:
    """Compile the blocks of a model in place, each kind of them once, without breaks of the graph.

    sharded: `parallelize` follows. Its hooks, which gather weights, cannot be part of a graph: only what runs between them is.
    required: an error of the compiler ends the run; otherwise what it fails at runs as it is, with a warning of torch.
    """
    # torch takes lengths, sizes and batches as variables from their second value on. Levels of clips, frames or patches, one
    # or several frames or clips, axes, and passes without gradients still need a graph each; torch would end the run at the
    # ninth.
    config = torch._dynamo.config  # imported by torch.compile; importing it with this module would take a second
    config.recompile_limit = max(config.recompile_limit, _GRAPHS)
    if not required:
        config.suppress_errors = True
        # Code for gradients is made with that of the forward pass, whose errors alone are suppressed.
        torch._functorch.config.force_non_lazy_backward_lowering = True
    model.has_compiled_blocks = True
    if not sharded:
        model.compile_repeated_blocks(fullgraph=required, backend=backend)
        return
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=required, backend=backend)


def uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """A context manager in which blocks run as they are: graphs of previews and held-out clips would cost more than they gain."""
    return torch.compiler.set_stance("force_eager") if getattr(model, "has_compiled_blocks", False) else nullcontext()

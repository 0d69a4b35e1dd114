"""How blocks are wired. A trunk is a function over the model's blocks: (blocks, tokens, condition, run) -> tokens."""

from collections.abc import Callable

from torch import Tensor, nn

Run = Callable[[nn.Module, Tensor, Tensor], Tensor]


def stack(blocks: nn.ModuleList, hidden_states: Tensor, condition: Tensor, run: Run) -> Tensor:
    """One block after another, as in DiT."""
    for block in blocks:
        hidden_states = run(block, hidden_states, condition)
    return hidden_states

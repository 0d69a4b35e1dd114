"""How blocks are wired. A trunk is a function over the model's blocks: (blocks, tokens, condition, run) -> tokens."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

Run = Callable[[nn.Module, Tensor, Tensor], Tensor]


def stack(blocks: nn.ModuleList, hidden_states: Tensor, condition: Tensor, run: Run) -> Tensor:
    """One block after another, as in DiT."""
    for block in blocks:
        hidden_states = run(block, hidden_states, condition)
    return hidden_states


def time_entries(entry: str, axes: Sequence[str]) -> list[str]:
    """Where time enters each block of these axes: in every attention, or once, in the stream before the first of time."""
    if entry in ("attention", "rotary", "rotary_3d"):
        return [entry] * len(axes)
    if entry != "stream":
        raise ValueError(f"time_entry={entry!r} is unknown. Choose one of: attention, rotary, rotary_3d, stream.")
    first = next((i for i, axis in enumerate(axes) if axis != "spatial"), None)
    return ["stream" if i == first else "none" for i in range(len(axes))]

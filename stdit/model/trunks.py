"""How blocks are wired. A trunk is a function over the model's blocks: (blocks, tokens, condition, run) -> tokens."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from stdit.nn.attention import PLACES
from stdit.nn.modulation import Condition

Run = Callable[[nn.Module, Tensor, Condition], Tensor]


def stack(blocks: nn.ModuleList, hidden_states: Tensor, condition: Condition, run: Run) -> Tensor:
    """One block after another, as in DiT."""
    for block in blocks:
        hidden_states = run(block, hidden_states, condition)
    return hidden_states


def time_entries(entry: str, axes: Sequence[str]) -> list[str]:
    """Where time enters each block of these axes: in every attention, or once, in the stream before the first of time."""
    inside = [name for name in PLACES if name != "none"]
    if entry in inside:
        return [entry] * len(axes)
    if entry != "stream":
        raise ValueError(f"time_entry={entry!r} is unknown. Choose one of: {', '.join([*inside, 'stream'])}.")
    first = next((i for i, axis in enumerate(axes) if axis != "spatial"), None)
    return ["stream" if i == first else "none" for i in range(len(axes))]

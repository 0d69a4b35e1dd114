"""How blocks are wired: who follows whom, and who hands what to whom over the heads of others."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from stdit.nn.attention import PLACES
from stdit.nn.modulation import Condition

Run = Callable[..., Tensor]  # (block, tokens, condition, skip=None) -> tokens


def stack(blocks: nn.ModuleList, hidden_states: Tensor, condition: Condition, run: Run) -> Tensor:
    """One block after another, as in DiT."""
    for block in blocks:
        hidden_states = run(block, hidden_states, condition)
    return hidden_states


def long_skip(blocks: Sequence[nn.Module], hidden_states: Tensor, condition: Condition, run: Run) -> Tensor:
    """What the first half made is handed to the second half, last to first (U-ViT, figure 1); a middle block has none."""
    half, kept = len(blocks) // 2, []
    for block in blocks[:half]:
        hidden_states = run(block, hidden_states, condition)
        kept.append(hidden_states)
    for block in blocks[half : len(blocks) - half]:
        hidden_states = run(block, hidden_states, condition)
    for block in blocks[len(blocks) - half :]:
        hidden_states = run(block, hidden_states, condition, skip=kept.pop())
    return hidden_states


def joint(
    blocks: nn.ModuleList, hidden_states: Tensor, text: Tensor, run: Callable[..., tuple[Tensor, Tensor]]
) -> Tensor:
    """Video and text go through every block side by side; what has become of the text is left behind (SD3, FLUX)."""
    for block in blocks:
        hidden_states, text = run(block, hidden_states, text)
    return hidden_states


class Trunk(NamedTuple):
    """run: (blocks, tokens, condition, run) -> tokens; skips: of a depth, of it the decoder's, which blocks take what an
    earlier one made. masked: it is `model.masked.MaskedTrunk` that runs. text: it is `joint`, over blocks of `nn.joint`. u: it is
    `model.ushape.UShape`."""

    run: Callable[[nn.ModuleList, Tensor, Condition, Run], Tensor]
    skips: Callable[[int, int], list[bool]]
    masked: bool = False
    text: bool = False
    u: bool = False


TRUNKS = {
    "stack": Trunk(stack, lambda depth, _: [False] * depth),
    "long_skip": Trunk(long_skip, lambda depth, _: [i >= depth - depth // 2 for i in range(depth)]),
    "masked": Trunk(stack, lambda depth, decoder: [i >= (depth - decoder) // 2 for i in range(depth)], masked=True),
    "joint": Trunk(stack, lambda depth, _: [False] * depth, text=True),
    "u_shape": Trunk(stack, lambda depth, _: [False] * depth, u=True),
}


def time_entries(entry: str, axes: Sequence[str]) -> list[str]:
    """Where time enters each block of these axes: in every attention, or once, in the stream before the first of time."""
    inside = [name for name in PLACES if name != "none"]
    if entry in inside:
        return [entry] * len(axes)
    if entry != "stream":
        raise ValueError(f"time_entry={entry!r} is unknown. Choose one of: {', '.join([*inside, 'stream'])}.")
    first = next((i for i, axis in enumerate(axes) if axis != "spatial"), None)
    return ["stream" if i == first else "none" for i in range(len(axes))]

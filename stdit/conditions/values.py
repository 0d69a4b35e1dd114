"""Values of conditions as a model takes them, and operations on all conditions of a batch.

Every tensor is (B|1, T|1, ...). A frame axis of length 1 holds one value for the whole clip, one of length T a value
per latent frame; a batch axis of length 1 holds one value for all clips.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """Tokens (B, T|1, L, C) per clip or frame; mask: (B, T|1, L) bool, true for tokens, false for padding."""

    tokens: Tensor
    mask: Tensor | None = None


Value = Tensor | Tokens
Conditions = dict[str, Value]


def map_value(value: Value, change: Callable[[Tensor], Tensor]) -> Value:
    """Apply a function to every tensor of a value."""
    if isinstance(value, Tensor):
        return change(value)
    return Tokens(change(value.tokens), None if value.mask is None else change(value.mask))


def map_tensors(conditions: Mapping[str, Value], change: Callable[[Tensor], Tensor]) -> Conditions:
    """Apply a function to every tensor of all conditions."""
    return {name: map_value(value, change) for name, value in conditions.items()}


def rows(conditions: Mapping[str, Value], which: slice) -> Conditions:
    """Select the conditions of some clips of a batch."""
    return map_tensors(conditions, lambda x: x if len(x) == 1 else x[which])


def repeat_frames(conditions: Mapping[str, Value], times: int) -> Conditions:
    """Repeat conditions per latent frame along time; conditions of whole clips stay unchanged."""
    return map_tensors(conditions, lambda x: x if x.shape[1] == 1 else torch.cat([x] * times, dim=1))


def concatenate(first: Mapping[str, Value], second: Mapping[str, Value]) -> Conditions:
    """Concatenate two batches of conditions, which have the same names and tokens of one length."""
    found: Conditions = {}
    for name, a in first.items():
        b = second[name]
        if a is b and isinstance(a, Tensor) and len(a) == 1:  # it holds for all clips of both
            found[name] = a
        elif isinstance(a, Tensor):
            assert isinstance(b, Tensor)
            found[name] = torch.cat([a, b])
        else:
            assert isinstance(b, Tokens)
            mask = None if a.mask is None or b.mask is None else torch.cat([a.mask, b.mask])
            found[name] = Tokens(torch.cat([a.tokens, b.tokens]), mask)
    return found


def equal(first: Mapping[str, Value], second: Mapping[str, Value]) -> bool:
    """Whether two batches of conditions are equal; nan equals nan."""

    def same(a: Tensor | None, b: Tensor | None) -> bool:
        if a is None or b is None or a.shape != b.shape:
            return a is b
        return bool(((a == b) | ((a != a) & (b != b))).all())  # nan stands for "unknown"

    for name, a in first.items():
        b = second[name]
        pairs = ((a, b),) if isinstance(a, Tensor) else zip(a, b, strict=True)  # type: ignore[arg-type]
        if not all(same(x, y) for x, y in pairs):  # type: ignore[arg-type]
            return False
    return True


class Guided(NamedTuple):
    """Conditions of a batch of clips and the null conditions for guidance (None: no guidance)."""

    conditions: Conditions
    null: Conditions | None = None

    def change(self, function: Callable[[Conditions], Conditions]) -> "Guided":
        """Apply the same function to both."""
        return Guided(function(self.conditions), None if self.null is None else function(self.null))

    @property
    def unconditional(self) -> bool:
        """Whether guidance would have no effect."""
        return self.null is None or equal(self.conditions, self.null)

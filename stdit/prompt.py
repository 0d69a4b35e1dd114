"""What a batch of clips is told beside its noise levels: labels, captions, or both, and what stands for neither."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Prompt(NamedTuple):
    """labels (B,); captions (B, L, C) and mask (B, L), true where there is a word; each None where a model is not told it.

    null: the same, saying nothing; None if nothing could be said.
    """

    labels: Tensor | None = None
    captions: Tensor | None = None
    mask: Tensor | None = None
    null: "Prompt | None" = None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Prompt":
        """Every tensor changed, those of `null` too."""
        labels, captions, mask = (None if part is None else change(part) for part in self[:3])
        return Prompt(labels, captions, mask, None if self.null is None else self.null.each(change))

    def named(self) -> dict[str, Any]:
        """As arguments of the model; what it is not told is left out."""
        names = ("class_labels", "captions", "caption_mask")
        return {name: part for name, part in zip(names, self[:3], strict=True) if part is not None}

    def behind(self, other: "Prompt") -> "Prompt":
        """The batch of `other`, then this one."""
        pairs = zip(other[:3], self[:3], strict=True)
        return Prompt(*(None if a is None or b is None else torch.cat([a, b]) for a, b in pairs))

    @property
    def silent(self) -> bool:
        """Whether it says what its null says."""
        if self.null is None:
            return True
        pairs = zip(self[:3], self.null[:3], strict=True)
        return all(a is None or b is None or torch.equal(a, b) for a, b in pairs)

"""The ways a condition enters a block: DiT's four (section 3.2), PixArt's, W.A.L.T's, and DiffiT's time-dependent self-attention."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import nn

from stdit.nn.modulation import AdaLN, AdaLNLora, AdaLNSingle, NoModulation


class Conditioning(NamedTuple):
    """modulation: of a block, final: of the head; both are built from a width and add nothing when fresh.

    mask_probs: all blocks start from one modulation. steers: the vector enters queries, keys and values. attends: every block
    attends to the condition's tokens. joins: they join the patches of every frame. A caption is always tokens: where the
    rest is a vector, blocks attend to the caption alone.
    """

    modulation: Callable[[int], nn.Module]
    final: Callable[[int], nn.Module]
    attends: bool = False
    joins: bool = False
    steers: bool = False
    shares: bool = False

    @property
    def by_tokens(self) -> bool:
        return self.attends or self.joins

    @property
    def own_norms(self) -> bool:
        """Layer norms have weights of their own where nothing modulates them."""
        return self.modulation is NoModulation

    @property
    def eps(self) -> float:
        """Of layer norms: DiT's where they are modulated, ViT's where they have weights of their own."""
        return 1e-5 if self.own_norms else 1e-6


_plain_head = partial(AdaLN, branches=1, gated=False)
_unmodulated = partial(NoModulation, branches=1)

CONDITIONINGS = {
    "adaln_zero": Conditioning(AdaLN, _plain_head),
    "adaln": Conditioning(partial(AdaLN, gated=False), _plain_head),
    "adaln_single": Conditioning(AdaLNSingle, partial(AdaLNSingle, branches=1, gated=False), shares=True),
    "adaln_lora": Conditioning(AdaLNLora, _plain_head, shares=True),
    "cross_attention": Conditioning(NoModulation, _unmodulated, attends=True),
    "in_context": Conditioning(NoModulation, _unmodulated, joins=True),
    "time_attention": Conditioning(NoModulation, _unmodulated, steers=True),
}

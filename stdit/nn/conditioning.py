"""The ways in which a condition enters a block.

===================  ==================================================================================
adaln_zero, adaln    shift, scale (and gate) from the conditioning vector (DiT, section 3.2)
adaln_single         one modulation shared by all blocks, plus a table per block (PixArt-alpha, section 2.3)
adaln_lora           one shared modulation, plus a low-rank layer per block (W.A.L.T)
cross_attention      every block attends to the condition's tokens (DiT, section 3.2)
in_context           the condition's tokens join the patches of every frame (DiT, section 3.2)
time_attention       the conditioning vector biases queries, keys and values (DiffiT)
===================  ==================================================================================

A caption always consists of tokens. Where the other conditions form a vector, blocks cross-attend to the caption.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import nn

from stdit.nn.modulation import AdaLN, AdaLNLora, AdaLNSingle, NoModulation


class Conditioning(NamedTuple):
    """One way of conditioning: a row of `CONDITIONINGS`.

    modulation, final: make the modulation of a block and of the final layer from the hidden size. cross_attention,
    in_context, qkv_bias_from_cond (time_attention): see the table of the module. shared_adaln: all blocks start from
    one shared modulation.
    """

    modulation: Callable[[int], nn.Module]
    final: Callable[[int], nn.Module]
    cross_attention: bool = False
    in_context: bool = False
    qkv_bias_from_cond: bool = False
    shared_adaln: bool = False

    @property
    def by_tokens(self) -> bool:
        """Whether all conditions are tokens; otherwise all but captions are summed to one vector."""
        return self.cross_attention or self.in_context

    @property
    def affine_norms(self) -> bool:
        """Whether layer norms have learned weights, which they need where nothing modulates them."""
        return self.modulation is NoModulation

    @property
    def eps(self) -> float:
        """Epsilon of layer norms: DiT's where they are modulated, ViT's where they have learned weights."""
        return 1e-5 if self.affine_norms else 1e-6

    @property
    def supports(self) -> frozenset[str]:
        """Capabilities (`model.capabilities`) that a model with this conditioning may have."""
        joining = frozenset() if self.in_context else frozenset({"routing"})
        return joining if self.by_tokens else joining | {"packing", "patch_levels"}


_head = partial(AdaLN, branches=1, gated=False)
_no_modulation = partial(NoModulation, branches=1)

CONDITIONINGS = {
    "adaln_zero": Conditioning(AdaLN, _head),
    "adaln": Conditioning(partial(AdaLN, gated=False), _head),
    "adaln_single": Conditioning(AdaLNSingle, partial(AdaLNSingle, branches=1, gated=False), shared_adaln=True),
    "adaln_lora": Conditioning(AdaLNLora, _head, shared_adaln=True),
    "cross_attention": Conditioning(NoModulation, _no_modulation, cross_attention=True),
    "in_context": Conditioning(NoModulation, _no_modulation, in_context=True),
    "time_attention": Conditioning(NoModulation, _no_modulation, qkv_bias_from_cond=True),
}

"""The transformer block and the final layer."""

from typing import Any

import torch
from torch import Tensor, nn

from stdit.nn.attention import Attention, CrossAttention
from stdit.nn.conditioning import CONDITIONINGS
from stdit.nn.config import BlockConfig
from stdit.nn.context import BlockContext
from stdit.nn.layout import Layout
from stdit.nn.mlp import Mlp
from stdit.nn.modulation import Condition
from stdit.nn.positions import latte_pos_embed


class STDiTBlock(nn.Module):
    """Pre-norm transformer block with adaLN-Zero (DiT, section 3.2) or another way of conditioning.

    With adaLN-Zero a newly initialised block is the identity. axis: the axis along which tokens attend to each other.
    position_encoding: the encoding of this block; "latte" adds Latte's table to the hidden states here. captions: also
    cross-attend to the caption's tokens, unless these join the patches (in_context). skip: merge an earlier block's
    output through a linear layer (U-ViT).
    """

    def __init__(
        self,
        config: BlockConfig,
        axis: str = "joint",
        *,
        position_encoding: str = "sincos",
        captions: bool = False,
        skip: bool = False,
    ):
        super().__init__()
        conditioning = CONDITIONINGS[config.conditioning]
        dim, affine, eps = config.dim, conditioning.affine_norms, conditioning.eps
        self.adds_latte_table = position_encoding == "latte"
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=affine, eps=eps)
        self.attn = Attention(config, axis, position_encoding, conditioning.qkv_bias_from_cond)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=affine, eps=eps if affine else config.norm2_eps)
        self.mlp = Mlp(dim, config.mlp_dim, config.activation)
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        attends = conditioning.cross_attention or (captions and not conditioning.in_context)
        self.norm_cross = nn.LayerNorm(dim, eps=1e-6) if conditioning.cross_attention else None
        self.cross_attn = CrossAttention(dim, config.num_heads) if attends else None
        self.adaLN_modulation: Any = conditioning.modulation(dim)

    def reset(self) -> None:
        """Zero-initialise the modulation, as in DiT, and the output of cross-attention to captions."""
        self.adaLN_modulation.reset()
        if self.cross_attn is not None and self.norm_cross is None:
            nn.init.zeros_(self.cross_attn.proj.weight)

    def forward(self, hidden_states: Tensor, ctx: BlockContext, skip: Tensor | None = None) -> Tensor:
        """Run the block: (B, T, S, D) -> (B, T, S, D); `skip` is an earlier block's output of the same shape."""
        if self.skip_linear is not None:
            assert skip is not None
            hidden_states = self.skip_linear(torch.cat([hidden_states, skip], dim=-1))
        if self.adds_latte_table:
            table = latte_pos_embed(hidden_states.shape[1], hidden_states.shape[-1])
            hidden_states = hidden_states + table.to(hidden_states)[:, None]
        attn_mod, mlp_mod = self.adaLN_modulation(ctx.condition, ctx.layout)
        attn_out = self.attn(attn_mod(self.norm1(hidden_states)), ctx)
        hidden_states = hidden_states + attn_mod.gated(attn_out)
        if self.cross_attn is not None:
            query = hidden_states if self.norm_cross is None else self.norm_cross(hidden_states)
            hidden_states = hidden_states + self.cross_attn(query, ctx.condition.tokens, ctx.condition.token_mask)
        return hidden_states + mlp_mod.gated(self.mlp(mlp_mod(self.norm2(hidden_states))))


class FinalLayer(nn.Module):
    """DiT's final layer: modulated layer norm, then a linear layer from tokens to the latents of their patches.

    The output is zero at initialisation.
    """

    def __init__(self, dim: int, out_features: int, conditioning: str = "adaln_zero"):
        super().__init__()
        kind = CONDITIONINGS[conditioning]
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=kind.affine_norms, eps=kind.eps)
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation: Any = kind.final(dim)

    def reset(self) -> None:
        """Zero-initialise the modulation and the linear layer, as in DiT."""
        self.adaLN_modulation.reset()
        nn.init.zeros_(self.linear.weight)

    def forward(self, hidden_states: Tensor, condition: Condition, layout: Layout | None = None) -> Tensor:
        """Project (B, T, S, D) to (B, T, S, patch volume * out_channels), channel-last inside a patch."""
        (modulation,) = self.adaLN_modulation(condition, layout)
        return self.linear(modulation(self.norm_final(hidden_states)))

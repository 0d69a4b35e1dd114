"""Transformer blocks and the head."""

import torch
from torch import Tensor, nn

from stdit.nn.attention import Attention, CrossAttention
from stdit.nn.cache import FrameCache
from stdit.nn.conditioning import CONDITIONINGS
from stdit.nn.layout import Layout
from stdit.nn.mlp import Mlp
from stdit.nn.modulation import Condition
from stdit.nn.positions import latte_pos_embed


class STDiTBlock(nn.Module):
    """Pre-norm block with adaLN-Zero: the identity when fresh (DiT, section 3.2); or told in another way.

    hidden_states: (B, T, S, D). `time`: where tokens learn their place: inside attention
    (`attention.POSITION_ENCODINGS`), or "latte" (time added to what passes through, as Latte does once). conditioning: one of
    `CONDITIONINGS`; captions: attend to the condition's tokens in any case. skip: takes what an earlier block made,
    through a linear layer of both (U-ViT). layout, cache: see `nn.layout`, `nn.cache`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        axis: str = "joint",
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        time: str = "sincos",
        norm2_eps: float = 1e-6,
        causal: bool = False,
        window: int | None = None,
        conditioning: str = "adaln_zero",
        captions: bool = False,
        skip: bool = False,
        gelu: str = "tanh",
        bias_grid: tuple[int, int] | None = None,
        sink: int = 0,
        horizon: int = 1,
    ):
        super().__init__()
        self.time = time
        how = CONDITIONINGS[conditioning]
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=how.own_norms, eps=how.eps)
        inside = time if time != "latte" else "none"
        self.attn = Attention(
            dim, num_heads, axis, qk_norm, inside, causal, window, bias_grid, how.steers, sink, horizon
        )
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=how.own_norms, eps=how.eps if how.own_norms else norm2_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), gelu)
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        attends = how.attends or (captions and not how.joins)
        self.norm_cross = nn.LayerNorm(dim, eps=1e-6) if how.attends else None
        self.cross_attn = CrossAttention(dim, num_heads) if attends else None
        self.adaLN_modulation = how.modulation(dim)

    def reset(self) -> None:
        """DiT's start for what a linear layer's own does not fit: modulation and the look at captions add nothing."""
        self.adaLN_modulation.reset()
        if self.cross_attn is not None and self.norm_cross is None:
            nn.init.zeros_(self.cross_attn.proj.weight)

    def forward(
        self,
        hidden_states: Tensor,
        condition: Condition,
        layout: Layout | None = None,
        cache: FrameCache | None = None,
        skip: Tensor | None = None,
    ) -> Tensor:
        if self.skip_linear is not None:
            assert skip is not None
            hidden_states = self.skip_linear(torch.cat([hidden_states, skip], dim=-1))
        if self.time == "latte":
            frames = latte_pos_embed(hidden_states.shape[1], hidden_states.shape[-1]).to(hidden_states)
            hidden_states = hidden_states + frames[:, None]
        attn_mod, mlp_mod = self.adaLN_modulation(condition, layout)
        seen = self.attn(attn_mod(self.norm1(hidden_states)), layout, cache, condition.embedding)
        hidden_states = hidden_states + attn_mod.gated(seen)
        if self.cross_attn is not None:
            looking = hidden_states if self.norm_cross is None else self.norm_cross(hidden_states)
            hidden_states = hidden_states + self.cross_attn(looking, condition.tokens, condition.token_mask)
        hidden_states = hidden_states + mlp_mod.gated(self.mlp(mlp_mod(self.norm2(hidden_states))))
        return hidden_states


class FinalLayer(nn.Module):
    """(B, T, S, D) -> (B, T, S, patch volume * out_channels), channel-last inside a patch; zero when fresh."""

    def __init__(self, dim: int, out_features: int, conditioning: str = "adaln_zero"):
        super().__init__()
        how = CONDITIONINGS[conditioning]
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=how.own_norms, eps=how.eps)
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation = how.final(dim)

    def reset(self) -> None:
        self.adaLN_modulation.reset()
        nn.init.zeros_(self.linear.weight)

    def forward(self, hidden_states: Tensor, condition: Condition, layout: Layout | None = None) -> Tensor:
        (modulation,) = self.adaLN_modulation(condition, layout)
        return self.linear(modulation(self.norm_final(hidden_states)))

"""Transformer blocks and the head."""

from torch import Tensor, nn

from stdit.nn.attention import Attention
from stdit.nn.cache import FrameCache
from stdit.nn.layout import Layout
from stdit.nn.mlp import Mlp
from stdit.nn.modulation import AdaLNZero, Modulation
from stdit.nn.positions import frame_positions


class STDiTBlock(nn.Module):
    """Pre-norm block with adaLN-Zero: the identity when fresh (DiT, section 3.2).

    hidden_states: (B, T, S, D); condition: (B, T|1, S|1, D). `time`: where tokens learn their place: inside attention
    (`attention.PLACES`), or "stream" (time added to what passes through, as Latte does once). layout, cache: see
    `nn.layout`, `nn.cache`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        axis: str = "joint",
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        time: str = "attention",
        norm2_eps: float = 1e-6,
        causal: bool = False,
        window: int | None = None,
    ):
        super().__init__()
        self.time = time
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads, axis, qk_norm, time if time != "stream" else "none", causal, window)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=norm2_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = AdaLNZero(dim)

    def forward(
        self, hidden_states: Tensor, condition: Tensor, layout: Layout | None = None, cache: FrameCache | None = None
    ) -> Tensor:
        if self.time == "stream":
            frames = frame_positions(hidden_states.shape[1], hidden_states.shape[-1]).to(hidden_states)
            hidden_states = hidden_states + frames[:, None]
        attn_mod, mlp_mod = self.adaLN_modulation(condition, layout)
        hidden_states = hidden_states + attn_mod.gate * self.attn(attn_mod(self.norm1(hidden_states)), layout, cache)
        hidden_states = hidden_states + mlp_mod.gate * self.mlp(mlp_mod(self.norm2(hidden_states)))
        return hidden_states


class FinalLayer(nn.Module):
    """(B, T, S, D) -> (B, T, S, patch volume * out_channels), channel-last inside a patch; zero when fresh."""

    def __init__(self, dim: int, out_features: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, hidden_states: Tensor, condition: Tensor, layout: Layout | None = None) -> Tensor:
        modulation = self.adaLN_modulation(condition)
        shift, scale = (layout.spread(modulation) if layout is not None else modulation).chunk(2, dim=-1)
        return self.linear(Modulation(shift, scale, scale)(self.norm_final(hidden_states)))

"""Text and video side by side: SD3's dual-stream blocks and FLUX's single-stream blocks, for any number of frames."""

import torch
from diffusers.models.attention import AttentionModuleMixin
from einops import rearrange
from torch import Tensor, nn

from stdit.nn.attention import POSITION_ENCODINGS, AxialAttnProcessor, QKNorm
from stdit.nn.layout import DenseLayout, Layout
from stdit.nn.mlp import Mlp
from stdit.nn.modulation import AdaLN, Condition, Modulation
from stdit.nn.positions import rotate, temporal_pos_embed


class JointAttnProcessor(AxialAttnProcessor):
    """All tokens of a clip and all words of its caption look at each other; padding is looked at by none."""

    def __call__(  # type: ignore[override]
        self, attn: "JointAttention", video: Tensor, text: Tensor, layout: Layout, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        tokens, places, length = layout.fold(video, "joint"), layout.places("joint"), text.shape[1]
        frames = places[:, 0]
        if attn.adds_time and frames.max() > 0:
            table = temporal_pos_embed(int(frames.max()) + 1, tokens.shape[-1], layout.scale[0])
            tokens = tokens + table[frames].to(tokens)
        query, key, value = attn.heads_of(attn.qkv, tokens, attn.q_norm, attn.k_norm)
        if attn.turns:
            turned = (places * layout.scale)[:, : attn.turns]
            query, key = rotate(query, turned), rotate(key, turned)
        words = attn.heads_of(
            attn.text_qkv or attn.qkv, text, attn.text_q_norm or attn.q_norm, attn.text_k_norm or attn.k_norm
        )
        query, key, value = (torch.cat(pair, 1) for pair in zip((query, key, value), words, strict=True))
        mask = None
        if seen is not None:
            mask = torch.cat([seen.new_ones(len(seen), tokens.shape[1]), seen], 1)[:, None, None]
        out = self._kernel(query, key, value, mask).flatten(2)
        made, said = out[:, :-length], out[:, -length:]
        return layout.unfold(attn.proj(made), "joint"), attn.text_proj(said)


class JointAttention(nn.Module, AttentionModuleMixin):
    """Attention among video (B, T, S, D) and text (B, N, D). shared: both through the same layers, and none behind."""

    _default_processor_cls = JointAttnProcessor
    _available_processors = [JointAttnProcessor]
    _supports_qkv_fusion = False
    is_cross_attention = False
    axis = "joint"

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False, time: str = "sincos", shared: bool = False):
        super().__init__()
        self.heads, (self.adds_time, self.turns) = num_heads, POSITION_ENCODINGS[time]

        def norm() -> nn.Module:
            return QKNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()

        self.qkv, self.q_norm, self.k_norm = nn.Linear(dim, 3 * dim), norm(), norm()
        self.text_qkv = None if shared else nn.Linear(dim, 3 * dim)
        self.text_q_norm = None if shared else norm()
        self.text_k_norm = None if shared else norm()
        self.proj: nn.Module = nn.Identity() if shared else nn.Linear(dim, dim)
        self.text_proj: nn.Module = nn.Identity() if shared else nn.Linear(dim, dim)
        self.set_processor(JointAttnProcessor())

    def heads_of(
        self, layer: nn.Module, x: Tensor, q_norm: nn.Module, k_norm: nn.Module
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, L, heads, d)."""
        q, k, v = rearrange(layer(x), "b l (three h d) -> three b l h d", three=3, h=self.heads)
        return q_norm(q), k_norm(k), v

    def forward(self, video: Tensor, text: Tensor, layout: Layout, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.processor(self, video, text, layout, seen)


def _for_text(modulate: nn.Module, condition: Condition) -> list[Modulation]:
    """Modulations (B, 1, D) of text: it is told the mean over frames, since words belong to none of them."""
    said = modulate(condition._replace(embedding=condition.embedding.mean((1, 2), keepdim=True)))
    return [Modulation(*(None if part is None else part[:, 0] for part in one)) for one in said]


class DualStreamBlock(nn.Module):
    """SD3's: two streams, each with layers and adaLN-Zero of its own, that meet in attention (Esser et al., figure 2).

    video (B, T, S, D), text (B, N, D) -> both; the identity when fresh.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, qk_norm: bool = False, time: str = "sincos"):
        super().__init__()

        def norm() -> nn.Module:
            return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)

        self.norm1, self.norm2, self.text_norm1, self.text_norm2 = norm(), norm(), norm(), norm()
        self.attn = JointAttention(dim, num_heads, qk_norm, time)
        self.mlp, self.text_mlp = Mlp(dim, int(dim * mlp_ratio)), Mlp(dim, int(dim * mlp_ratio))
        self.adaLN_modulation, self.text_adaLN = AdaLN(dim), AdaLN(dim)

    def reset(self) -> None:
        self.adaLN_modulation.reset()
        self.text_adaLN.reset()

    def forward(
        self, video: Tensor, text: Tensor, condition: Condition, layout: Layout | None = None
    ) -> tuple[Tensor, Tensor]:
        layout = layout or DenseLayout((video.shape[1], 1, video.shape[2]))
        attn_mod, mlp_mod = self.adaLN_modulation(condition)
        text_attn, text_mlp = _for_text(self.text_adaLN, condition)
        seen = None if condition.token_mask is None else condition.token_mask[:, 0]
        made, said = self.attn(attn_mod(self.norm1(video)), text_attn(self.text_norm1(text)), layout, seen)
        video, text = video + attn_mod.gated(made), text + text_attn.gated(said)
        video = video + mlp_mod.gated(self.mlp(mlp_mod(self.norm2(video))))
        text = text + text_mlp.gated(self.text_mlp(text_mlp(self.text_norm2(text))))
        return video, text


class SingleStreamBlock(nn.Module):
    """FLUX's: both streams through the same layers, attention and MLP beside each other. The identity when fresh."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, qk_norm: bool = False, time: str = "sincos"):
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = JointAttention(dim, num_heads, qk_norm, time, shared=True)
        self.proj_mlp = nn.Linear(dim, int(dim * mlp_ratio))
        self.act = nn.GELU(approximate="tanh")
        self.proj_out = nn.Linear(dim + int(dim * mlp_ratio), dim)
        self.adaLN_modulation = AdaLN(dim, branches=1)

    def reset(self) -> None:
        self.adaLN_modulation.reset()

    def forward(
        self, video: Tensor, text: Tensor, condition: Condition, layout: Layout | None = None
    ) -> tuple[Tensor, Tensor]:
        layout = layout or DenseLayout((video.shape[1], 1, video.shape[2]))
        (mod,), (text_mod,) = self.adaLN_modulation(condition), _for_text(self.adaLN_modulation, condition)
        seen = None if condition.token_mask is None else condition.token_mask[:, 0]
        shown, read = mod(self.norm(video)), text_mod(self.norm(text))
        made, said = self.attn(shown, read, layout, seen)
        video = video + mod.gated(self._out(made, shown))
        return video, text + text_mod.gated(self._out(said, read))

    def _out(self, attended: Tensor, x: Tensor) -> Tensor:
        return self.proj_out(torch.cat([attended, self.act(self.proj_mlp(x))], dim=-1))

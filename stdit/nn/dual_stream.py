"""SD3's dual-stream and FLUX's single-stream blocks for text and video of any number of frames."""

from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from einops import rearrange
from torch import Tensor, nn

from stdit.nn.attention import AxialAttnProcessor, add_time, qk_norm
from stdit.nn.config import BlockConfig
from stdit.nn.context import BlockContext
from stdit.nn.mlp import Mlp
from stdit.nn.modulation import AdaLN, Condition, Modulation
from stdit.nn.positions import apply_rope


class JointAttnProcessor(AxialAttnProcessor):
    """Joint attention among all video tokens of a clip and all text tokens of its caption; padding is masked."""

    def __call__(  # type: ignore[override]
        self, attn: "JointAttention", video: Tensor, text: Tensor, ctx: BlockContext
    ) -> tuple[Tensor, Tensor]:
        layout, tables, length = ctx.layout, ctx.tables["joint", attn.position_encoding], text.shape[1]
        tokens = add_time(layout.fold(video, "joint"), tables)
        query, key, value = attn.project(attn.qkv, tokens, attn.q_norm, attn.k_norm)
        if tables.query_rope is not None and tables.key_rope is not None:
            query, key = apply_rope(query, tables.query_rope), apply_rope(key, tables.key_rope)
        words = attn.project(
            attn.text_qkv or attn.qkv, text, attn.text_q_norm or attn.q_norm, attn.text_k_norm or attn.k_norm
        )
        query, key, value = (torch.cat(pair, 1) for pair in zip((query, key, value), words, strict=True))
        mask, token_mask = None, ctx.condition.token_mask
        if token_mask is not None:
            token_mask = token_mask[:, 0]
            video_mask = token_mask.new_ones(len(token_mask), tokens.shape[1])
            mask = torch.cat([video_mask, token_mask], 1)[:, None, None]
        out = self._kernel(query, key, value, mask).flatten(2)
        return layout.unfold(attn.proj(out[:, :-length]), "joint"), attn.text_proj(out[:, -length:])


class JointAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention among video tokens (B, T, S, D) and text tokens (B, N, D).

    shared: both streams use one set of layers, without output projection (FLUX).
    """

    _default_processor_cls = JointAttnProcessor
    _available_processors = [JointAttnProcessor]
    _supports_qkv_fusion = False
    is_cross_attention = False
    axis = "joint"
    processor: Any
    set_processor: Any  # diffusers'

    def __init__(self, config: BlockConfig, position_encoding: str = "sincos", shared: bool = False):
        super().__init__()
        dim = config.dim
        self.heads, self.position_encoding = config.num_heads, position_encoding
        self.qkv, self.q_norm, self.k_norm = nn.Linear(dim, 3 * dim), qk_norm(config), qk_norm(config)
        self.text_qkv = None if shared else nn.Linear(dim, 3 * dim)
        self.text_q_norm = None if shared else qk_norm(config)
        self.text_k_norm = None if shared else qk_norm(config)
        self.proj: nn.Module = nn.Identity() if shared else nn.Linear(dim, dim)
        self.text_proj: nn.Module = nn.Identity() if shared else nn.Linear(dim, dim)
        self.set_processor(JointAttnProcessor())

    def project(
        self, layer: nn.Module, x: Tensor, q_norm: nn.Module, k_norm: nn.Module
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys after their norms, and values, (B, L, heads, d) each, of tokens (B, L, D)."""
        q, k, v = rearrange(layer(x), "b l (three h d) -> three b l h d", three=3, h=self.heads)
        return q_norm(q), k_norm(k), v

    def forward(self, video: Tensor, text: Tensor, ctx: BlockContext) -> tuple[Tensor, Tensor]:
        """Attend jointly; the results have the shapes of `video` and `text` and contain no residual."""
        return self.processor(self, video, text, ctx)


def _text_modulation(modulate: nn.Module, condition: Condition) -> list[Modulation]:
    """Modulations (B, 1, D) of text, from the mean over frames, because words belong to no single frame."""
    mean = condition.embedding.mean((1, 2), keepdim=True)
    modulations = modulate(condition._replace(embedding=mean))
    return [Modulation(*(None if part is None else part[:, 0] for part in one)) for one in modulations]


class DualStreamBlock(nn.Module):
    """SD3's block: video and text have their own layers and adaLN-Zero, and attend jointly (Esser et al., figure 2).

    It is the identity at initialisation.
    """

    def __init__(self, config: BlockConfig, position_encoding: str = "sincos"):
        super().__init__()
        self.norm1, self.norm2, self.text_norm1, self.text_norm2 = (_norm(config) for _ in range(4))
        self.attn = JointAttention(config, position_encoding)
        self.mlp, self.text_mlp = Mlp(config.dim, config.mlp_dim), Mlp(config.dim, config.mlp_dim)
        self.adaLN_modulation, self.text_adaLN = AdaLN(config.dim), AdaLN(config.dim)

    def reset(self) -> None:
        """Zero-initialise both modulations."""
        self.adaLN_modulation.reset()
        self.text_adaLN.reset()

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, ctx: BlockContext) -> tuple[Tensor, Tensor]:
        """Run the block on video (B, T, S, D) and text `encoder_hidden_states` (B, N, D), and return both."""
        video, text = hidden_states, encoder_hidden_states
        attn_mod, mlp_mod = self.adaLN_modulation(ctx.condition)
        text_attn, text_mlp = _text_modulation(self.text_adaLN, ctx.condition)
        video_out, text_out = self.attn(attn_mod(self.norm1(video)), text_attn(self.text_norm1(text)), ctx)
        video, text = video + attn_mod.gated(video_out), text + text_attn.gated(text_out)
        video = video + mlp_mod.gated(self.mlp(mlp_mod(self.norm2(video))))
        text = text + text_mlp.gated(self.text_mlp(text_mlp(self.text_norm2(text))))
        return video, text


class SingleStreamBlock(nn.Module):
    """FLUX's block: both streams use the same layers, with attention and MLP in parallel.

    It is the identity at initialisation.
    """

    def __init__(self, config: BlockConfig, position_encoding: str = "sincos"):
        super().__init__()
        dim, hidden = config.dim, config.mlp_dim
        self.norm = _norm(config)
        self.attn = JointAttention(config, position_encoding, shared=True)
        self.proj_mlp = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.proj_out = nn.Linear(dim + hidden, dim)
        self.adaLN_modulation = AdaLN(dim, branches=1)

    def reset(self) -> None:
        """Zero-initialise the modulation."""
        self.adaLN_modulation.reset()

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, ctx: BlockContext) -> tuple[Tensor, Tensor]:
        """Run the block on video (B, T, S, D) and text `encoder_hidden_states` (B, N, D), and return both."""
        video, text = hidden_states, encoder_hidden_states
        (mod,), (text_mod,) = (
            self.adaLN_modulation(ctx.condition),
            _text_modulation(self.adaLN_modulation, ctx.condition),
        )
        video_in, text_in = mod(self.norm(video)), text_mod(self.norm(text))
        video_out, text_out = self.attn(video_in, text_in, ctx)
        video = video + mod.gated(self._merge(video_out, video_in))
        return video, text + text_mod.gated(self._merge(text_out, text_in))

    def _merge(self, attended: Tensor, x: Tensor) -> Tensor:
        return self.proj_out(torch.cat([attended, self.act(self.proj_mlp(x))], dim=-1))


def _norm(config: BlockConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.dim, elementwise_affine=False, eps=1e-6)

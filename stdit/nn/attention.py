"""Self-attention among the tokens of an axis, and cross-attention to a condition's tokens.

diffusers chooses the attention kernel (`set_attention_backend`).
"""

from functools import partial
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from einops import rearrange
from torch import Tensor, nn

from stdit.nn.config import BlockConfig
from stdit.nn.context import AxisTables, BlockContext
from stdit.nn.frame_mask import attend_in_chunks
from stdit.nn.layout import AXES, Kernel
from stdit.nn.positions import apply_rope


def _short_in_16_bits(query: Tensor, key: Tensor) -> bool:
    """Whether plain products beat the CPU's fused kernel, which is slow in bfloat16 (`stdit bench attention`)."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and max(query.shape[1], key.shape[1]) <= 256


def explicit_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Attention as plain matrix products: softmax(q k^T / sqrt(D)) v, with the softmax in float32.

    query, key, value: (B, L, H, D) -> (B, L, H, D). attn_mask: bool, true where a query may attend, or floats that are
    added to the logits.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if attn_mask is not None:
        added = attn_mask.is_floating_point()
        weights = weights + attn_mask if added else weights.masked_fill(~attn_mask, float("-inf"))
    return (weights.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value).transpose(1, 2)


class AxialAttnProcessor:
    """Folds tokens along the layer's axis, projects them, attends and unfolds them again.

    diffusers sets the class attributes to choose the attention backend and context parallelism.
    """

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(self, attn: "Attention", hidden_states: Tensor, ctx: BlockContext) -> Tensor:
        axis, layout, tables = attn.axis, ctx.layout, ctx.tables[attn.axis, attn.position_encoding]
        tokens = add_time(layout.fold(hidden_states, axis), tables)
        projected = attn.qkv(tokens)
        if attn.qkv_time is not None:
            bias = layout.expand_to_tokens(attn.qkv_time(ctx.condition.embedding))
            projected = projected + layout.fold(bias.expand(*hidden_states.shape[:3], -1), axis)
        query, key, value = rearrange(projected, "n l (three h d) -> three n l h d", three=3, h=attn.heads).unbind(0)
        query, key = attn.q_norm(query), attn.k_norm(key)
        if ctx.cache is not None and axis != "spatial":
            key, value = ctx.cache.extend(attn, key, value, tables.retained)
        if tables.query_rope is not None and tables.key_rope is not None:
            query, key = apply_rope(query, tables.query_rope), apply_rope(key, tables.key_rope)
        mask = tables.mask
        if attn.relative_position_bias is not None and tables.bias_index is not None:
            added = attn.relative_position_bias(tables.bias_index).to(query.dtype)
            mask = added if mask is None else added.masked_fill(~mask, float("-inf"))
        # A causal model has neither padding nor a bias of distances (`model.checks`).
        kernel: Kernel = partial(self._kernel, attn_mask=mask)
        if isinstance(tables.frames, tuple):
            kernel = partial(attend_in_chunks, chunks=tables.frames, kernel=self._kernel)
        elif tables.frames is not None:
            kernel = partial(self._kernel, attn_mask=tables.frames)
        out = layout.attend(query, key, value, axis=axis, kernel=kernel)
        return layout.unfold(attn.proj(out.flatten(2)), axis)

    def _kernel(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any) -> Tensor:
        if self._attention_backend is None and _short_in_16_bits(query, key):
            return explicit_attention(query, key, value, attn_mask)
        return dispatch_attention_fn(
            query, key, value, attn_mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )


def add_time(tokens: Tensor, tables: AxisTables) -> Tensor:
    """Add the temporal table of their frames to tokens (N, L, D) if the position encoding has one."""
    return tokens if tables.time is None else tokens + tables.time.to(tokens.dtype)


class CrossAttnProcessor(AxialAttnProcessor):
    """Cross-attention of patches to the condition's tokens, which belong to their frame or to the whole clip."""

    def __call__(  # type: ignore[override]
        self, attn: "CrossAttention", hidden_states: Tensor, tokens: Tensor, token_mask: Tensor | None = None
    ) -> Tensor:
        axis = "joint" if tokens.shape[1] == 1 else "spatial"
        fold, unfold = AXES[axis]
        query = rearrange(attn.q(rearrange(hidden_states, fold)), "n l (h d) -> n l h d", h=attn.heads)
        key, value = rearrange(
            attn.kv(rearrange(tokens, fold)), "n l (two h d) -> two n l h d", two=2, h=attn.heads
        ).unbind(0)
        mask = None if token_mask is None else rearrange(token_mask, "b t l -> (b t) 1 1 l")
        out = self._kernel(query, key, value, mask)
        return rearrange(attn.proj(out.flatten(2)), unfold, t=hidden_states.shape[1], s=hidden_states.shape[2])


class QKNorm(nn.RMSNorm):
    """RMS norm of queries or keys in the precision of its weight, which keeps the logits bounded in 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last dimension; the result has the dtype of `x`."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def qk_norm(config: BlockConfig) -> nn.Module:
    """Norm of queries or keys: `QKNorm` if the config has qk_norm, else the identity."""
    return QKNorm(config.head_dim, eps=1e-6) if config.qk_norm else nn.Identity()


class RelativePositionBias(nn.Module):
    """A learned bias for every head and distance in rows and columns (BEiT's relative position bias, as in MDT).

    The table has BEiT's shape: BEiT's last three rows belong to the class token and are never read here.
    """

    def __init__(self, rows: int, columns: int, heads: int):
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn((2 * rows - 1) * (2 * columns - 1) + 3, heads))

    def forward(self, index: Tensor) -> Tensor:
        """Indices (N, queries, keys) of `relative_position_index` -> (N, heads, queries, keys)."""
        return self.table[index.to(self.table.device)].permute(0, 3, 1, 2)


class Attention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention along `axis` of (B, T, S, D).

    With the conditioning `time_attention`, a linear layer maps the conditioning vector to a bias of queries, keys and
    values (DiffiT's TMSA).
    """

    _default_processor_cls = AxialAttnProcessor
    _available_processors = [AxialAttnProcessor]
    _supports_qkv_fusion = False  # DiT's qkv projection is fused already
    is_cross_attention = False
    processor: Any
    set_processor: Any  # diffusers'

    def __init__(
        self,
        config: BlockConfig,
        axis: str = "joint",
        position_encoding: str = "sincos",
        qkv_bias_from_cond: bool = False,
    ):
        super().__init__()
        dim = config.dim
        self.heads, self.axis, self.position_encoding = config.num_heads, axis, position_encoding
        self.relative_position_bias = None
        if config.bias_grid is not None and axis != "temporal":
            self.relative_position_bias = RelativePositionBias(*config.bias_grid, config.num_heads)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.qkv_time = nn.Linear(dim, 3 * dim, bias=False) if qkv_bias_from_cond else None
        self.q_norm, self.k_norm = qk_norm(config), qk_norm(config)
        self.proj = nn.Linear(dim, dim)
        self.set_processor(AxialAttnProcessor())

    def forward(self, hidden_states: Tensor, ctx: BlockContext) -> Tensor:
        """Attend along the layer's axis: (B, T, S, D) -> (B, T, S, D), without the residual."""
        return self.processor(self, hidden_states, ctx)


class CrossAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention from patches (B, T, S, D) to the condition's tokens (B, T|1, N, D).

    token_mask: (B, T|1, N) bool, false for padding.
    """

    _default_processor_cls = CrossAttnProcessor
    _available_processors = [CrossAttnProcessor]
    _supports_qkv_fusion = False
    is_cross_attention = True
    processor: Any
    set_processor: Any  # diffusers'

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.set_processor(CrossAttnProcessor())

    def forward(self, hidden_states: Tensor, tokens: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Attend to the tokens: (B, T, S, D) -> (B, T, S, D), without the residual."""
        return self.processor(self, hidden_states, tokens, token_mask)

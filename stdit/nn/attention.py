"""Self-attention among the tokens of an axis. The kernel is diffusers' to choose (`set_attention_backend`)."""

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from einops import rearrange
from torch import Tensor, nn

from stdit.nn.positions import time_positions

# How (B, T, S, D) video tokens fold into sequences for one attention call, and back.
AXES = {
    "joint": ("b t s d -> b (t s) d", "b (t s) d -> b t s d"),
    "spatial": ("b t s d -> (b t) s d", "(b t) s d -> b t s d"),
    "temporal": ("b t s d -> (b s) t d", "(b s) t d -> b t s d"),
}


def _short_in_16_bits(query: Tensor) -> bool:
    """Where plain products beat CPUs' fused kernel, whose backward pass is slow in bfloat16 (`tools/bench.py attention`)."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[1] <= 256


def explicit_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v on (B, L, H, D) -> (B, L, H, D), the softmax in float32."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return (weights.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value).transpose(1, 2)


class AxialAttnProcessor:
    """Fold, project, attend, unfold. The class attributes are where diffusers puts back end and parallelism."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "Attention", hidden_states: Tensor) -> Tensor:
        fold, unfold = AXES[attn.axis]
        b, t, s, _ = hidden_states.shape
        if attn.adds_time and t > 1:
            time = time_positions(t, hidden_states.shape[-1]).to(hidden_states)
            hidden_states = hidden_states + time[:, None]
        qkv = rearrange(
            attn.qkv(rearrange(hidden_states, fold)), "n l (three h d) -> three n l h d", three=3, h=attn.heads
        )
        query, key, value = qkv[0], qkv[1], qkv[2]
        query, key = attn.q_norm(query), attn.k_norm(key)
        if self._attention_backend is None and _short_in_16_bits(query):
            out = explicit_attention(query, key, value)
        else:
            out = dispatch_attention_fn(
                query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
            )
        return rearrange(attn.proj(out.flatten(2)), unfold, b=b, t=t, s=s)


class QKNorm(nn.RMSNorm):
    """Root-mean-square norm of queries or keys, in the precision of its weight: keeps logits bounded in 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class Attention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention along `axis` of (B, T, S, D).

    Time enters here, inside temporal and joint attention, and is zero at frame 0 (see `time_positions`); not with
    `adds_time=False`, for weights that found it in the stream.
    """

    _default_processor_cls = AxialAttnProcessor
    _available_processors = [AxialAttnProcessor]
    _supports_qkv_fusion = False  # DiT's projection is one already
    is_cross_attention = False

    def __init__(self, dim: int, num_heads: int, axis: str = "joint", qk_norm: bool = False, adds_time: bool = True):
        super().__init__()
        self.heads, self.axis, self.adds_time = num_heads, axis, adds_time and axis != "spatial"
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = QKNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = QKNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.set_processor(AxialAttnProcessor())

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.processor(self, hidden_states)

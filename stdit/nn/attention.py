"""Self-attention among the tokens of an axis. The kernel is diffusers' to choose (`set_attention_backend`)."""

from functools import partial

import numpy as np
import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from einops import rearrange
from torch import Tensor, nn

from stdit.nn.cache import FrameCache
from stdit.nn.layout import AXES, DenseLayout, Layout
from stdit.nn.positions import rotate, temporal_pos_embed


def _short_in_16_bits(query: Tensor, key: Tensor) -> bool:
    """Where plain products beat CPUs' fused kernel, whose backward pass is slow in bfloat16 (`tools/bench.py attention`)."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and max(query.shape[1], key.shape[1]) <= 256


def explicit_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v on (B, L, H, D) -> (B, L, H, D), the softmax in float32; attn_mask bool, true to see, or added."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if attn_mask is not None:
        added = attn_mask.is_floating_point()
        weights = weights + attn_mask if added else weights.masked_fill(~attn_mask, float("-inf"))
    return (weights.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value).transpose(1, 2)


class AxialAttnProcessor:
    """Fold, project, attend, unfold. The class attributes are where diffusers puts back end and parallelism."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "Attention",
        hidden_states: Tensor,
        layout: Layout | None = None,
        cache: FrameCache | None = None,
        vector: Tensor | None = None,
    ) -> Tensor:
        axis = attn.axis
        layout = layout or DenseLayout((*hidden_states.shape[1:3], 1))
        tokens = layout.fold(hidden_states, axis)
        places = layout.places(axis)
        frames = places[:, 0]
        if attn.adds_time and frames.max() > 0:  # nothing is added at frame 0
            table = temporal_pos_embed(int(frames.max()) + 1, tokens.shape[-1], layout.scale[0])
            tokens = tokens + table[frames].to(tokens)
        projected = attn.qkv(tokens)
        if attn.qkv_time is not None:
            steered = layout.spread(attn.qkv_time(vector)).expand(*hidden_states.shape[:3], -1)
            projected = projected + layout.fold(steered, axis)
        qkv = rearrange(projected, "n l (three h d) -> three n l h d", three=3, h=attn.heads)
        query, key, value = qkv[0], qkv[1], qkv[2]
        query, key = attn.q_norm(query), attn.k_norm(key)
        key_places = places
        if cache is not None and axis != "spatial":
            key, value, key_places = cache.seen(attn, key, value, places)
        if attn.turns:
            near = attn.nearer(key_places, frames)
            query, key = (rotate(x, (at * layout.scale)[:, : attn.turns]) for x, at in ((query, places), (key, near)))
        mask = attn.mask(frames, key_places[:, 0], layout.copies(axis), query.device)
        padding = layout.seen(axis)  # (N, 1, 1, keys)
        if padding is not None:
            mask = padding if mask is None else mask & padding
        if attn.relative_position_bias is not None and axis != "temporal":
            bias = attn.relative_position_bias(layout.spots(axis)).to(query.dtype)
            mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
        kernel = partial(self._kernel, attn_mask=mask)
        out = layout.attend(query, key, value, axis, kernel)
        return layout.unfold(attn.proj(out.flatten(2)), axis)

    def _kernel(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
        if self._attention_backend is None and _short_in_16_bits(query, key):
            return explicit_attention(query, key, value, attn_mask)
        return dispatch_attention_fn(
            query, key, value, attn_mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )


class CrossAttnProcessor(AxialAttnProcessor):
    """Patches ask, the condition's tokens answer: a frame those of its own, or all frames those of their clip."""

    def __call__(  # type: ignore[override]
        self, attn: "CrossAttention", hidden_states: Tensor, tokens: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        axis = "joint" if tokens.shape[1] == 1 else "spatial"
        fold, unfold = AXES[axis]
        query = rearrange(attn.q(rearrange(hidden_states, fold)), "n l (h d) -> n l h d", h=attn.heads)
        answers = rearrange(attn.kv(rearrange(tokens, fold)), "n l (two h d) -> two n l h d", two=2, h=attn.heads)
        mask = None if seen is None else rearrange(seen, "b t l -> (b t) 1 1 l")
        out = self._kernel(query, answers[0], answers[1], mask)
        return rearrange(attn.proj(out.flatten(2)), unfold, t=hidden_states.shape[1], s=hidden_states.shape[2])


# Whether a table of time, zero at frame 0, is added to the tokens, and by how many places (time, y, x) queries and keys
# are turned, so that distances count.
POSITION_ENCODINGS = {
    "sincos": (True, 0),
    "rope": (False, 1),
    "rope_3d": (False, 3),
    "sincos+rope_3d": (True, 3),
    "none": (False, 0),
}


class QKNorm(nn.RMSNorm):
    """Root-mean-square norm of queries or keys, in the precision of its weight: keeps logits bounded in 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class RelativePositionBias(nn.Module):
    """A learned number for every head and distance in rows and columns (BEiT's relative position bias, as in MDT).

    The table is BEiT's: its last three rows were for a class token and are never read.
    """

    def __init__(self, rows: int, columns: int, heads: int):
        super().__init__()
        self.grid = (rows, columns)
        self.table = nn.Parameter(0.02 * torch.randn((2 * rows - 1) * (2 * columns - 1) + 3, heads))

    def forward(self, spots: Tensor) -> Tensor:
        """(N, L, 2) -> (N, heads, queries, keys); larger distances than the grid has count as its largest."""
        rows, columns = self.grid
        distance = spots[:, :, None] - spots[:, None]
        y = distance[..., 0].clamp(1 - rows, rows - 1) + rows - 1
        x = distance[..., 1].clamp(1 - columns, columns - 1) + columns - 1
        index = (y * (2 * columns - 1) + x).to(self.table.device)
        return self.table[index].permute(0, 3, 1, 2)


class Attention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention along `axis` of (B, T, S, D).

    time: how tokens know their place here, one of `POSITION_ENCODINGS`. bias_grid: add a learned number for each distance in space,
    up to those of this grid. steered: the condition's vector, through a layer of its own, is added to queries, keys and
    values (DiffiT's TMSA). causal: a frame sees itself and earlier frames, of these
    the last `window` - 1 if a window is given, and in any case the first `sink` (Xiao et al., "StreamingLLM"), which beyond
    `horizon` frames stand as far off as the first of so many.
    """

    _default_processor_cls = AxialAttnProcessor
    _available_processors = [AxialAttnProcessor]
    _supports_qkv_fusion = False  # DiT's projection is one already
    is_cross_attention = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        axis: str = "joint",
        qk_norm: bool = False,
        time: str = "sincos",
        causal: bool = False,
        window: int | None = None,
        bias_grid: tuple[int, int] | None = None,
        steered: bool = False,
        sink: int = 0,
        horizon: int = 1,
    ):
        super().__init__()
        self.heads, self.axis, self.sink, self.horizon = num_heads, axis, sink, horizon
        self.relative_position_bias = (
            RelativePositionBias(*bias_grid, num_heads) if bias_grid is not None and axis != "temporal" else None
        )
        adds_time, turns = POSITION_ENCODINGS[time]
        self.adds_time = adds_time and axis != "spatial"
        self.turns = 0 if axis == "spatial" and turns == 1 else turns
        self.causal, self.window = causal and axis != "spatial", window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.qkv_time = nn.Linear(dim, 3 * dim, bias=False) if steered else None
        self.q_norm = QKNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = QKNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.set_processor(AxialAttnProcessor())

    def nearer(self, places: np.ndarray, frames: np.ndarray) -> np.ndarray:
        """Where keys (L, 3) stand for queries of `frames`: the first of a long clip no further off than in training."""
        late = int(frames.min()) + 1 - self.horizon
        if not self.sink or late <= 0:
            return places
        near = places.copy()
        near[near[:, 0] < self.sink, 0] += late
        return near

    def mask(
        self, frames: np.ndarray, key_frames: np.ndarray, copies: np.ndarray, device: torch.device
    ) -> Tensor | None:
        """(queries, keys) bool, true where a query may look; None where it may look everywhere."""
        if not self.causal:
            return None
        distance = frames[:, None] - key_frames[None]
        seen = (distance >= 0) & ((distance < (self.window or len(key_frames) + 1)) | (key_frames < self.sink))
        if copies.any():  # a noisy copy sees of noisy frames itself alone, and nothing sees a copy of another frame
            twin, own = copies[:, None] ^ copies[None], copies[:, None] & copies[None]
            seen &= np.where(own, distance == 0, ~twin | (copies[:, None] & (distance > 0)))
        return None if seen.all() else torch.from_numpy(seen).to(device)

    def forward(
        self,
        hidden_states: Tensor,
        layout: Layout | None = None,
        cache: FrameCache | None = None,
        vector: Tensor | None = None,
    ) -> Tensor:
        return self.processor(self, hidden_states, layout, cache, vector)


class CrossAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention from (B, T, S, D) to tokens (B, T|1, N, D); seen: (B, T|1, N) bool, false for padding."""

    _default_processor_cls = CrossAttnProcessor
    _available_processors = [CrossAttnProcessor]
    _supports_qkv_fusion = False
    is_cross_attention = True

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.set_processor(CrossAttnProcessor())

    def forward(self, hidden_states: Tensor, tokens: Tensor, seen: Tensor | None = None) -> Tensor:
        return self.processor(self, hidden_states, tokens, seen)

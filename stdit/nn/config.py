"""Settings that all transformer blocks of a model share."""

from dataclasses import dataclass
from typing import Literal

Axis = Literal["joint", "spatial", "temporal"]
# sincos: a temporal table, zero at frame 0, added inside attention. rope, rope_3d: rotary by frame, or by frame, row and
# column. latte: Latte's table, added to the hidden states. none: no position encoding.
PositionEncoding = Literal["sincos", "rope", "rope_3d", "sincos+rope_3d", "latte", "none"]


@dataclass(frozen=True)
class BlockConfig:
    """Sizes and choices that every block of a model shares.

    conditioning: a row of `nn.conditioning.CONDITIONINGS`. causal: a frame attends to the last `window` frames
    (including itself; None: all earlier ones) and to the first `sink` frames, whose distance is clamped to
    `max_train_frames` (Xiao et al., "StreamingLLM"). bias_grid: rows and columns of a learned relative position bias
    (BEiT), or None.
    """

    dim: int
    num_heads: int
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    conditioning: str = "adaln_zero"
    norm2_eps: float = 1e-6
    activation: str = "gelu_tanh"
    causal: bool = False
    window: int | None = None
    sink: int = 0
    max_train_frames: int = 1
    bias_grid: tuple[int, int] | None = None

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """Hidden channels of the feed-forward branch."""
        return int(self.dim * self.mlp_ratio)

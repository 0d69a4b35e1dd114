"""Layout of clips of many shapes in one sequence without padding (Dehghani et al., "Patch n' Pack")."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from stdit.nn.layout import Kernel, grid_positions


class PackedLayout:
    """Layout of clips of many shapes in one sequence (1, 1, L, D), clip after clip and frame after frame.

    grids: (T, rows, columns) of each clip in patches. Sequences of equal length attend in one kernel call.
    """

    scale = (1.0, 1.0, 1.0)

    def __init__(self, grids: Sequence[tuple[int, int, int]]):
        self.grids = tuple((int(t), int(rows), int(columns)) for t, rows, columns in grids)

    @property
    def counts(self) -> list[tuple[int, int]]:
        """Number of frames and of patches per frame of each clip."""
        return [(t, rows * columns) for t, rows, columns in self.grids]

    def lengths(self, axis: str) -> list[int]:
        """Number of tokens of every sequence, in the order of `fold`."""
        per_clip = {
            "joint": lambda t, s: [t * s],
            "spatial": lambda t, s: [s] * t,
            "temporal": lambda t, s: [t] * s,
        }[axis]
        return [length for t, s in self.counts for length in per_clip(t, s)]

    @cached_property
    def temporal_order(self) -> Tensor:
        """Indices (L,) that sort the tokens clip by clip, then patch by patch, then by frame."""
        parts, begin = [], 0
        for t, s in self.counts:
            parts.append(begin + torch.arange(t * s).view(t, s).T.flatten())
            begin += t * s
        return torch.cat(parts)

    @cached_property
    def frame_of_token(self) -> Tensor:
        """Index (L,) of each token's frame among the frames of all clips."""
        patches = torch.tensor([s for t, s in self.counts for _ in range(t)])
        return torch.arange(len(patches)).repeat_interleave(patches)

    def fold(self, x: Tensor, axis: str) -> Tensor:
        """Fold tokens (1, 1, L, D) to (1, L, D), in which the sequences of `axis` follow each other."""
        x = x[:, 0]
        return x.index_select(1, self.temporal_order.to(x.device)) if axis == "temporal" else x

    def unfold(self, x: Tensor, axis: str) -> Tensor:
        """Undo `fold`: (1, L, D) -> (1, 1, L, D)."""
        if axis == "temporal":
            x = x.index_select(1, self.temporal_order.argsort().to(x.device))
        return x[:, None]

    def positions(self, axis: str) -> np.ndarray:
        """Frame, row and column (L, 3) of each token within its clip."""
        positions = np.concatenate([grid_positions(*grid) for grid in self.grids])
        return positions[self.temporal_order.numpy()] if axis == "temporal" else positions

    def rotary_positions(self, axis: str) -> np.ndarray:
        """The positions (L, 3) of all patches."""
        return self.positions(axis)

    def spatial_positions(self, axis: str) -> Tensor:
        """Row and column (1, L, 2) of each token within its clip."""
        return torch.from_numpy(self.positions(axis)[None, :, 1:])

    def is_noisy_copy(self, axis: str) -> np.ndarray:
        """All false (L,): no frame is a noisy copy."""
        return np.zeros(len(self.positions(axis)), dtype=bool)

    def attended(self, axis: str) -> tuple[np.ndarray, np.ndarray]:
        """The positions of every token, and which are noisy copies."""
        return self.positions(axis), self.is_noisy_copy(axis)

    def padding_mask(self, axis: str) -> Tensor | None:
        """None, because there is no padding."""
        return None

    def expand_to_tokens(self, x: Tensor) -> Tensor:
        """Repeat values of frames (1, 1, frames of all clips, D) for the tokens of each frame: (1, 1, L, D)."""
        return x.index_select(2, self.frame_of_token.to(x.device))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, axis: str, kernel: Kernel) -> Tensor:
        """Run the kernel once per sequence length, or torch's varlen attention once (CUDA, 16 bits)."""
        lengths = torch.tensor(self.lengths(axis))
        if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
            return _varlen_attention(query, key, value, lengths)
        starts = lengths.cumsum(0) - lengths
        groups = [
            (length, (starts[lengths == length][:, None] + torch.arange(length)).flatten())
            for length in lengths.unique().tolist()
        ]
        outputs = [
            kernel(*(x[0].index_select(0, index.to(x.device)).unflatten(0, (-1, length)) for x in (query, key, value)))
            for length, index in groups
        ]
        back = torch.cat([index for _, index in groups]).argsort().to(query.device)
        return torch.cat([output.flatten(0, 1) for output in outputs]).index_select(0, back)[None]


def _varlen_attention(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
    """One call of torch's flash attention over all sequences (CUDA, 16 bits)."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(query.device, torch.int32)
    longest = int(lengths.max())
    out = varlen_attn(query[0], key[0], value[0], cu_seq_q=ends, cu_seq_k=ends, max_q=longest, max_k=longest)
    assert isinstance(out, Tensor)
    return out[None]

"""How tokens (B, T, S, D) fold into sequences for one attention call, and where each token stands."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # query, key, value (N, L, H, D) -> (N, L, H, D)

# By axis: how tokens fold into sequences, and back.
AXES = {
    "joint": ("b t s d -> b (t s) d", "b (t s) d -> b t s d"),
    "spatial": ("b t s d -> (b t) s d", "(b t) s d -> b t s d"),
    "temporal": ("b t s d -> (b s) t d", "(b s) t d -> b t s d"),
}


class Layout(Protocol):
    """Interface of a token layout. scale: the distance of neighbours in time, y and x.

    positions: (L, 3) frame, row and column of each token of a folded sequence. spatial_positions: (N|1, L, 2) row and
    column. is_noisy_copy: (L,) true for tokens of a noisy copy of the clip (teacher forcing). padding_mask:
    (N, 1, 1, L) bool, false for keys that are padding; None if there is none. expand_to_tokens: what was computed per
    frame, for every token. attend: runs a kernel over the folded sequences.
    """

    @property
    def scale(self) -> tuple[float, float, float]: ...
    def fold(self, x: Tensor, axis: str) -> Tensor: ...
    def unfold(self, x: Tensor, axis: str) -> Tensor: ...
    def positions(self, axis: str) -> np.ndarray: ...
    def spatial_positions(self, axis: str) -> Tensor: ...
    def is_noisy_copy(self, axis: str) -> np.ndarray: ...
    def padding_mask(self, axis: str) -> Tensor | None: ...
    def expand_to_tokens(self, x: Tensor) -> Tensor: ...
    def attend(self, query: Tensor, key: Tensor, value: Tensor, axis: str, kernel: Kernel) -> Tensor: ...


class DenseLayout:
    """Clips of one shape, (B, T, num_prefix_tokens + rows * columns, D).

    frame_offset: position in time of the first frame (a cache holds earlier ones). num_prefix_tokens: tokens of the
    condition before the patches of every frame; prefix_mask: (B, T, num_prefix_tokens) bool, false for padding among them.
    visible: (B, n) indices of the patches that are there, where some are hidden; `positions` then knows frames alone,
    `spatial_positions` rows and columns.
    """

    def __init__(
        self,
        grid: tuple[int, int, int],
        *,
        frame_offset: int = 0,
        scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
        num_prefix_tokens: int = 0,
        prefix_mask: Tensor | None = None,
        visible: Tensor | None = None,
    ):
        self.grid, self.frame_offset, self.scale = grid, frame_offset, scale
        self.num_prefix_tokens, self.prefix_mask, self.visible = num_prefix_tokens, prefix_mask, visible

    @property
    def patches_per_frame(self) -> int:
        """Patches of a frame, hidden ones aside."""
        return self.grid[1] * self.grid[2] if self.visible is None else self.visible.shape[1]

    def with_visible(self, visible: Tensor) -> "DenseLayout":
        """The same clips with patches (B, n) of every frame alone."""
        return DenseLayout(
            self.grid,
            frame_offset=self.frame_offset,
            scale=self.scale,
            num_prefix_tokens=self.num_prefix_tokens,
            prefix_mask=self.prefix_mask,
            visible=visible,
        )

    def fold(self, x: Tensor, axis: str) -> Tensor:
        return rearrange(x, AXES[axis][0])

    def unfold(self, x: Tensor, axis: str) -> Tensor:
        return rearrange(x, AXES[axis][1], t=self.grid[0], s=self.num_prefix_tokens + self.patches_per_frame)

    def positions(self, axis: str) -> np.ndarray:
        t, rows, columns = self.grid
        if axis == "temporal":  # the same for every patch: where in space does not matter
            return grid_positions(t, 1, 1, self.frame_offset)
        t, first = (t, self.frame_offset) if axis == "joint" else (1, 0)
        patches = grid_positions(t, rows, columns, first).reshape(t, rows * columns, 3)[:, : self.patches_per_frame]
        corner = patches[:, :1].repeat(self.num_prefix_tokens, axis=1)  # prefix tokens stand where their frame begins
        return np.concatenate([corner, patches], axis=1).reshape(-1, 3)

    def spatial_positions(self, axis: str) -> Tensor:
        t, rows, columns = self.grid
        cells = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).flatten(0, 1)
        cells = cells[None] if self.visible is None else cells[self.visible.cpu()]
        if axis == "joint":
            return cells.repeat(1, t, 1)
        return cells if len(cells) == 1 else cells.repeat_interleave(t, 0)

    def is_noisy_copy(self, axis: str) -> np.ndarray:
        return np.zeros(len(self.positions(axis)), dtype=bool)

    def padding_mask(self, axis: str) -> Tensor | None:
        if self.prefix_mask is None or axis == "temporal":  # in time a prefix token attends only to itself
            return None
        patches = self.prefix_mask.new_ones(*self.prefix_mask.shape[:2], self.patches_per_frame)
        folded = rearrange(torch.cat([self.prefix_mask, patches], 2)[..., None], AXES[axis][0])
        return folded[:, None, None, :, 0]

    def expand_to_tokens(self, x: Tensor) -> Tensor:
        return x  # (B, T|1, S|1, D) broadcasts

    def attend(self, query: Tensor, key: Tensor, value: Tensor, axis: str, kernel: Kernel) -> Tensor:
        return kernel(query, key, value)


class TeacherForcingLayout(DenseLayout):
    """Clean clips followed by their noisy copies, (B, 2 T, rows * columns, D).

    A frame of the copy has the position of its clean twin, and sees itself and the clean frames before it.
    """

    def positions(self, axis: str) -> np.ndarray:
        positions = super().positions(axis)
        if axis != "spatial":
            positions[:, 0] %= self.grid[0] // 2
        return positions

    def is_noisy_copy(self, axis: str) -> np.ndarray:
        tokens = np.arange(len(self.positions(axis)))
        return tokens * 2 >= len(tokens) if axis != "spatial" else np.zeros(len(tokens), dtype=bool)


def grid_positions(frames: int, rows: int, columns: int, first_frame: int = 0) -> np.ndarray:
    """(frames * rows * columns, 3), frame by frame and row by row."""
    grid = np.meshgrid(np.arange(first_frame, first_frame + frames), np.arange(rows), np.arange(columns), indexing="ij")
    return np.stack(grid, axis=-1).reshape(-1, 3)

"""Layouts: how tokens (B, T, S, D) fold into sequences for attention, and the position of every token."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # query, key, value (N, L, H, D) -> (N, L, H, D)

# By axis: the einops patterns that fold tokens into sequences, and back.
AXES = {
    "joint": ("b t s d -> b (t s) d", "b (t s) d -> b t s d"),
    "spatial": ("b t s d -> (b t) s d", "(b t) s d -> b t s d"),
    "temporal": ("b t s d -> (b s) t d", "(b s) t d -> b t s d"),
}


class Layout(Protocol):
    """Interface of a token layout; `axis` is a key of `AXES`."""

    @property
    def scale(self) -> tuple[float, float, float]:
        """Distance of neighbouring tokens in time, y and x."""

    def fold(self, x: Tensor, axis: str) -> Tensor:
        """Fold tokens (B, T, S, D) to the sequences (N, L, D) that attend along `axis`."""

    def unfold(self, x: Tensor, axis: str) -> Tensor:
        """Undo `fold`: (N, L, D) -> (B, T, S, D)."""

    def positions(self, axis: str) -> np.ndarray:
        """Frame, row and column (L, 3) of each token of a folded sequence."""

    def spatial_positions(self, axis: str) -> Tensor:
        """Row and column (N|1, L, 2) of each token of the folded sequences."""

    def rotary_positions(self, axis: str) -> np.ndarray:
        """As `positions`, or (N, L, 3) if they differ between sequences."""

    def is_noisy_copy(self, axis: str) -> np.ndarray:
        """(L,) bool, true for tokens of a noisy copy of the clip (teacher forcing)."""

    def attended(self, axis: str) -> tuple[np.ndarray, np.ndarray]:
        """Positions (L, 3) of the tokens among which the kernel of `attend` runs, and which of them are noisy copies."""

    def padding_mask(self, axis: str) -> Tensor | None:
        """(N, 1, 1, L) bool, false for keys that are padding; None if there is no padding."""

    def expand_to_tokens(self, x: Tensor) -> Tensor:
        """Expand what was computed per frame to all tokens of the frame."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, axis: str, kernel: Kernel) -> Tensor:
        """Run a kernel over folded queries, keys and values (N, L, H, D)."""


class DenseLayout:
    """Layout of a batch of clips of one shape, (B, T, num_prefix_tokens + rows * columns, D).

    grid: (T, rows, columns). frame_offset: position in time of the first frame (a cache holds earlier frames).
    num_prefix_tokens: tokens of the condition before the patches of every frame; prefix_mask: (B, T, num_prefix_tokens)
    bool, false for padding among them. visible: (B, n), or (B, T, n) if they differ between frames, indices of the visible patches
    if others are hidden (MDT, TREAD); then only the frames of `positions` are valid, and `spatial_positions` has rows and
    columns.
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
        """Number of visible patches per frame."""
        return self.grid[1] * self.grid[2] if self.visible is None else self.visible.shape[-1]

    def with_visible(self, visible: Tensor) -> "DenseLayout":
        """The same layout with only the visible patches (B, n) or (B, T, n) of every frame."""
        return type(self)(
            self.grid,
            frame_offset=self.frame_offset,
            scale=self.scale,
            num_prefix_tokens=self.num_prefix_tokens,
            prefix_mask=self.prefix_mask,
            visible=visible,
        )

    def fold(self, x: Tensor, axis: str) -> Tensor:
        """Fold tokens (B, T, S, D) to sequences (N, L, D)."""
        return rearrange(x, AXES[axis][0])

    def unfold(self, x: Tensor, axis: str) -> Tensor:
        """Undo `fold`: (N, L, D) -> (B, T, S, D)."""
        return rearrange(x, AXES[axis][1], t=self.grid[0], s=self.num_prefix_tokens + self.patches_per_frame)

    def positions(self, axis: str) -> np.ndarray:
        """Positions (L, 3) of every sequence of an axis; prefix tokens have that of their frame's first patch."""
        t, rows, columns = self.grid
        if axis == "temporal":  # one sequence per patch: rows and columns do not matter
            return grid_positions(t, 1, 1, self.frame_offset)
        t, first = (t, self.frame_offset) if axis == "joint" else (1, 0)
        patches = grid_positions(t, rows, columns, first).reshape(t, rows * columns, 3)[:, : self.patches_per_frame]
        prefix = patches[:, :1].repeat(self.num_prefix_tokens, axis=1)
        return np.concatenate([prefix, patches], axis=1).reshape(-1, 3)

    def spatial_positions(self, axis: str) -> Tensor:
        """Row and column (N|1, L, 2) of the visible patches."""
        t, rows, columns = self.grid
        # On the CPU also where the default device is another: tables are made there.
        at = [torch.arange(count, device="cpu") for count in (rows, columns)]
        cells = torch.stack(torch.meshgrid(*at, indexing="ij"), -1).flatten(0, 1)
        if self.visible is None:
            return cells[None] if axis != "joint" else cells[None].repeat(1, t, 1)
        by_frame = cells[_by_frame(self.visible).cpu()].expand(-1, t, -1, -1)
        return by_frame.flatten(1, 2) if axis == "joint" else by_frame.flatten(0, 1)

    def rotary_positions(self, axis: str) -> np.ndarray:
        """Frame, row and column, (L, 3) for all sequences, or (N, L, 3) where each clip has other visible patches."""
        positions = self.positions(axis)
        if self.visible is None or axis == "temporal":
            return positions
        cells = self.spatial_positions(axis).numpy()
        return np.concatenate([np.broadcast_to(positions[:, :1], (*cells.shape[:2], 1)), cells], axis=-1)

    def is_noisy_copy(self, axis: str) -> np.ndarray:
        """All false (L,): no frame is a noisy copy."""
        return np.zeros(len(self.positions(axis)), dtype=bool)

    def attended(self, axis: str) -> tuple[np.ndarray, np.ndarray]:
        """The positions of every token, and which are noisy copies."""
        return self.positions(axis), self.is_noisy_copy(axis)

    def padding_mask(self, axis: str) -> Tensor | None:
        """Mask (N, 1, 1, L) of padding among the prefix tokens, or None."""
        if self.prefix_mask is None or axis == "temporal":  # along time, prefix tokens attend only to themselves
            return None
        patches = self.prefix_mask.new_ones(*self.prefix_mask.shape[:2], self.patches_per_frame)
        folded = rearrange(torch.cat([self.prefix_mask, patches], 2)[..., None], AXES[axis][0])
        return folded[:, None, None, :, 0]

    def expand_to_tokens(self, x: Tensor) -> Tensor:
        """Leave `x` (B, T|1, S|1, D) as it is, because it broadcasts."""
        return x

    def attend(self, query: Tensor, key: Tensor, value: Tensor, axis: str, kernel: Kernel) -> Tensor:
        """Run the kernel once over all sequences."""
        return kernel(query, key, value)


class TeacherForcingLayout(DenseLayout):
    """Layout of clean clips followed in time by their noisy copies, (B, 2 T, rows * columns, D).

    A noisy frame has the position of its clean counterpart, and attends to itself and to earlier clean frames.
    """

    def positions(self, axis: str) -> np.ndarray:
        """Positions (L, 3), in which noisy frames have those of their clean counterparts."""
        positions = super().positions(axis)
        if axis != "spatial":
            positions[:, 0] = self.frame_offset + (positions[:, 0] - self.frame_offset) % (self.grid[0] // 2)
        return positions

    def is_noisy_copy(self, axis: str) -> np.ndarray:
        """(L,) bool, true in the second half of the frames."""
        tokens = np.arange(len(self.positions(axis)))
        return tokens * 2 >= len(tokens) if axis != "spatial" else np.zeros(len(tokens), dtype=bool)


def visible_count(patches: int, ratio: float) -> int:
    """How many of the patches of a frame are visible where a share of them is hidden: at least one."""
    return max(1, int(patches * (1 - ratio)))


def gather_patches(x: Tensor, visible: Tensor) -> Tensor:
    """Select the visible patches, (B, n) or (B, T, n), of every frame: (B, T, S, D) -> (B, T, n, D)."""
    return x.gather(2, _index(x, visible))


def scatter_patches(x: Tensor, visible: Tensor, patches: Tensor) -> Tensor:
    """Put patches (B, T, n, D) at the visible places, (B, n) or (B, T, n), of every frame of `x` (B, T, S, D)."""
    return x.scatter(2, _index(x, visible), patches.to(x))


def _index(x: Tensor, visible: Tensor) -> Tensor:
    return _by_frame(visible.to(x.device))[..., None].expand(len(x), x.shape[1], -1, x.shape[-1])


def _by_frame(visible: Tensor) -> Tensor:
    """Visible patches (B, n) or (B, T, n) -> (B, T|1, n)."""
    return visible if visible.ndim == 3 else visible[:, None]


def grid_positions(frames: int, rows: int, columns: int, first_frame: int = 0) -> np.ndarray:
    """Frame, row and column (frames * rows * columns, 3) of every patch, frame by frame and row by row."""
    grid = np.meshgrid(np.arange(first_frame, first_frame + frames), np.arange(rows), np.arange(columns), indexing="ij")
    return np.stack(grid, axis=-1).reshape(-1, 3)

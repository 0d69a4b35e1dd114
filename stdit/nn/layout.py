"""Which tokens meet: how tokens (B, T, S, D) fold into sequences for one attention call, and which frame each is of."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # query, key, value (N, L, H, D) -> (N, L, H, D)

AXES = {
    "joint": ("b t s d -> b (t s) d", "b (t s) d -> b t s d"),
    "spatial": ("b t s d -> (b t) s d", "(b t) s d -> b t s d"),
    "temporal": ("b t s d -> (b s) t d", "(b s) t d -> b t s d"),
}


class Layout(Protocol):
    """What attention has to know about the tokens it is given. scale: the distance of neighbours in time, y and x."""

    scale: tuple[float, float, float]

    def fold(self, x: Tensor, axis: str) -> Tensor: ...
    def unfold(self, x: Tensor, axis: str) -> Tensor: ...
    def places(self, axis: str) -> np.ndarray: ...  # (L, 3) frame, row and column of each token of a folded sequence
    def spots(self, axis: str) -> Tensor: ...  # (N|1, L, 2) row and column of each token
    def copies(self, axis: str) -> np.ndarray: ...  # (L,) whether a token is of a noisy copy of the clip
    def seen(
        self, axis: str
    ) -> Tensor | None: ...  # (N, 1, 1, L) bool, false for keys that are padding; None if none is
    def spread(self, x: Tensor) -> Tensor: ...  # what is computed once a frame, for every token
    def attend(self, query: Tensor, key: Tensor, value: Tensor, axis: str, kernel: Kernel) -> Tensor: ...


class DenseLayout:
    """Clips of one shape, (B, T, extras + rows * columns, D). `begin`: the place in time of the first frame (a cache holds
    earlier ones). kept: (B, n), where not every patch of a frame is there (`places` then tells frames alone, `spots` where
    in space). extras: tokens of the condition before the patches of every frame; shown: (B, T, extras) bool, false for
    padding among them, or None."""

    def __init__(
        self,
        grid: tuple[int, int, int],
        begin: int = 0,
        scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
        extras: int = 0,
        shown: Tensor | None = None,
        kept: Tensor | None = None,
    ):
        self.grid, self.begin, self.scale, self.extras, self.shown, self.kept = grid, begin, scale, extras, shown, kept

    @property
    def patches(self) -> int:
        """Of a frame."""
        return self.grid[1] * self.grid[2] if self.kept is None else self.kept.shape[1]

    def keeping(self, kept: Tensor) -> "DenseLayout":
        """The same clips with these patches (B, n) of every frame alone."""
        return DenseLayout(self.grid, self.begin, self.scale, self.extras, self.shown, kept)

    def spots(self, axis: str) -> Tensor:
        """(N|1, L, 2) row and column of each token of the folded sequences."""
        t, rows, columns = self.grid
        spots = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).flatten(0, 1)
        spots = spots[None] if self.kept is None else spots[self.kept.cpu()]
        if axis == "joint":
            return spots.repeat(1, t, 1)
        return spots if len(spots) == 1 else spots.repeat_interleave(t, 0)

    def fold(self, x: Tensor, axis: str) -> Tensor:
        return rearrange(x, AXES[axis][0])

    def unfold(self, x: Tensor, axis: str) -> Tensor:
        return rearrange(x, AXES[axis][1], t=self.grid[0], s=self.extras + self.patches)

    def places(self, axis: str) -> np.ndarray:
        t, rows, columns = self.grid
        if axis == "temporal":  # the same for every patch: where in space does not matter
            return _places(t, 1, 1, self.begin)
        t, begin = (t, self.begin) if axis == "joint" else (1, 0)
        patches = _places(t, rows, columns, begin).reshape(t, rows * columns, 3)[:, : self.patches]
        corner = patches[:, :1].repeat(self.extras, axis=1)  # tokens of the condition stand where their frame begins
        return np.concatenate([corner, patches], axis=1).reshape(-1, 3)

    def seen(self, axis: str) -> Tensor | None:
        if self.shown is None or axis == "temporal":  # in time a token meets itself alone
            return None
        patches = self.shown.new_ones(*self.shown.shape[:2], self.patches)
        folded = rearrange(torch.cat([self.shown, patches], 2)[..., None], AXES[axis][0])
        return folded[:, None, None, :, 0]

    def copies(self, axis: str) -> np.ndarray:
        return np.zeros(len(self.places(axis)), dtype=bool)

    def spread(self, x: Tensor) -> Tensor:
        return x  # (B, T|1, S|1, D) broadcasts

    def attend(self, query: Tensor, key: Tensor, value: Tensor, axis: str, kernel: Kernel) -> Tensor:
        return kernel(query, key, value)


class TeacherForcingLayout(DenseLayout):
    """Clips and, behind them, their noisy copies, (B, 2 T, rows * columns, D): for teacher forcing.

    A frame of the copy stands at the place of its clean twin, and sees itself and the clean frames before it.
    """

    def places(self, axis: str) -> np.ndarray:
        places = super().places(axis)
        if axis != "spatial":
            places[:, 0] %= self.grid[0] // 2
        return places

    def copies(self, axis: str) -> np.ndarray:
        tokens = np.arange(len(self.places(axis)))
        return tokens * 2 >= len(tokens) if axis != "spatial" else np.zeros(len(tokens), dtype=bool)


class PackedLayout:
    """Clips of many shapes in one row (1, 1, L, D), frame after frame, clip after clip (NaViT's patch-n-pack).

    grids: (T, rows, columns) of each clip in patches. Sequences of equal length attend together.
    """

    scale = (1.0, 1.0, 1.0)

    def __init__(self, grids: Sequence[tuple[int, int, int]]):
        self.grids = tuple((int(t), int(rows), int(columns)) for t, rows, columns in grids)

    @property
    def counts(self) -> list[tuple[int, int]]:
        """Frames and patches a frame of each clip."""
        return [(t, rows * columns) for t, rows, columns in self.grids]

    def lengths(self, axis: str) -> list[int]:
        """Tokens of every sequence, in the order in which `fold` leaves them."""
        per_clip = {
            "joint": lambda t, s: [t * s],
            "spatial": lambda t, s: [s] * t,
            "temporal": lambda t, s: [t] * s,
        }[axis]
        return [length for t, s in self.counts for length in per_clip(t, s)]

    @cached_property
    def supports_patch_levels(self) -> Tensor:
        """(L,) the order in which the frames of one patch follow each other."""
        parts, begin = [], 0
        for t, s in self.counts:
            parts.append(begin + torch.arange(t * s).view(t, s).T.flatten())
            begin += t * s
        return torch.cat(parts)

    @cached_property
    def rows(self) -> Tensor:
        """(L,) for each token, the place of its frame among the frames of all clips."""
        patches = torch.tensor([s for t, s in self.counts for _ in range(t)])
        return torch.arange(len(patches)).repeat_interleave(patches)

    def fold(self, x: Tensor, axis: str) -> Tensor:
        x = x[:, 0]
        return x.index_select(1, self.supports_patch_levels.to(x.device)) if axis == "temporal" else x

    def unfold(self, x: Tensor, axis: str) -> Tensor:
        if axis == "temporal":
            x = x.index_select(1, self.supports_patch_levels.argsort().to(x.device))
        return x[:, None]

    def places(self, axis: str) -> np.ndarray:
        places = np.concatenate([_places(*grid) for grid in self.grids])
        return places[self.supports_patch_levels.numpy()] if axis == "temporal" else places

    def seen(self, axis: str) -> Tensor | None:
        return None

    def spots(self, axis: str) -> Tensor:
        return torch.from_numpy(self.places(axis)[None, :, 1:])

    def copies(self, axis: str) -> np.ndarray:
        return np.zeros(len(self.places(axis)), dtype=bool)

    def spread(self, x: Tensor) -> Tensor:
        return x.index_select(2, self.rows.to(x.device))  # (1, 1, frames of all clips, D)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, axis: str, kernel: Kernel) -> Tensor:
        lengths = torch.tensor(self.lengths(axis))
        if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
            return _varlen(query, key, value, lengths)
        starts = lengths.cumsum(0) - lengths
        groups = [
            (length, (starts[lengths == length][:, None] + torch.arange(length)).flatten())
            for length in lengths.unique().tolist()
        ]
        made = [
            kernel(*(x[0].index_select(0, where.to(x.device)).unflatten(0, (-1, length)) for x in (query, key, value)))
            for length, where in groups
        ]
        back = torch.cat([where for _, where in groups]).argsort().to(query.device)
        return torch.cat([part.flatten(0, 1) for part in made]).index_select(0, back)[None]


def _places(frames: int, rows: int, columns: int, begin: int = 0) -> np.ndarray:
    """(frames * rows * columns, 3), frame by frame and row by row."""
    grid = np.meshgrid(np.arange(begin, begin + frames), np.arange(rows), np.arange(columns), indexing="ij")
    return np.stack(grid, axis=-1).reshape(-1, 3)


def _varlen(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
    """One call of torch's flash attention over all sequences (CUDA, 16 bits)."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(query.device, torch.int32)
    longest = int(lengths.max())
    return varlen_attn(query[0], key[0], value[0], ends, ends, longest, longest)[None]

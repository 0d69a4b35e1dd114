"""Context parallelism: the processes of a group each hold some frames of every clip, and exchange them for attention.

In joint attention and along time every process attends with a share of the heads over all frames (Jacobs et al.,
"DeepSpeed-Ulysses"); attention within a frame needs no exchange, and heads that cannot be shared out are left whole along
time, where patches are shared out in their place.
"""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from stdit.nn.layout import DenseLayout, Kernel


def check_shared_frames(frames: int, processes: int) -> None:
    """Raise ValueError if a clip's latent frames cannot be shared out evenly."""
    if frames % processes:
        near = max(1, round(frames / processes)) * processes
        raise ValueError(
            f"{frames} latent frames cannot be shared by {processes} processes; use {near}, or a context of a number that "
            "divides them."
        )


class ContextParallel:
    """The frames of clips over the processes of a group. group: torch's process group (None: all processes)."""

    def __init__(self, group: Any = None):
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def check_same(self, number: int, device: torch.device) -> None:
        """Raise ValueError unless all processes of the group have the same whole number."""
        mine = torch.tensor([number % (1 << 62)], device=device)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine, group=self.group)
        if any(int(other) != int(mine) for other in every):
            raise ValueError(
                "processes that share the frames of clips have read different clips: one of them could not read a file. Start "
                "the run again, and it resumes; check the files with stdit check-media."
            )

    def own_frames(self, x: Tensor, dim: int = 1, *, copies: int = 1) -> Tensor:
        """The frames of this process, of each copy of the clip in x; what holds for all frames (one, or none) stays."""
        if x.ndim <= dim or x.shape[dim] == 1:
            return x
        clips = x.chunk(copies, dim)
        return torch.cat([clip.chunk(self.size, dim)[self.rank] for clip in clips], dim)

    def first_frame(self, frames: int) -> int:
        """The number of the first of the frames that this process holds."""
        return frames * self.rank

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The frames of all processes, in order. Gradients are summed over the group."""
        from torch.distributed.nn.functional import all_gather  # not in every build of torch

        return torch.cat(all_gather(x.contiguous(), group=self.group), dim=dim)

    def exchange(self, x: Tensor) -> Tensor:
        """Send part i of (size, ...) to process i, and receive one part of each."""
        from torch.distributed.nn.functional import all_to_all_single

        x = x.contiguous()
        return all_to_all_single(torch.empty_like(x), x, group=self.group)


class ContextParallelLayout(DenseLayout):
    """The layout `inner` of the frames that one process holds, whose attention is over those of all."""

    def __init__(self, inner: DenseLayout, parallel: ContextParallel):
        self.inner, self.parallel = inner, parallel
        super().__init__(inner.grid, frame_offset=inner.frame_offset, scale=inner.scale)

    def positions(self, axis: str) -> np.ndarray:
        """Positions (L, 3) of the tokens that this process holds."""
        return self.inner.positions(axis)

    def is_noisy_copy(self, axis: str) -> np.ndarray:
        """(L,) bool of the tokens that this process holds."""
        return self.inner.is_noisy_copy(axis)

    def attended(self, axis: str) -> tuple[np.ndarray, np.ndarray]:
        """Positions (L, 3) of all tokens that attend to each other, process after process, and which are noisy copies."""
        own, noisy = self.inner.positions(axis), self.inner.is_noisy_copy(axis)
        if axis == "spatial":
            return own, noisy
        frames = int(own[:, 0].max() - own[:, 0].min()) + 1
        moved = [own + np.array([(i - self.parallel.rank) * frames, 0, 0]) for i in range(self.parallel.size)]
        return np.concatenate(moved), np.tile(noisy, self.parallel.size)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, axis: str, kernel: Kernel) -> Tensor:
        """Exchange, run the kernel over whole sequences, and exchange back."""
        if axis == "spatial":
            return kernel(query, key, value)
        size, heads = self.parallel.size, query.shape[2]
        by_heads = heads % size == 0
        if not by_heads and (axis == "joint" or query.shape[0] % size):
            raise ValueError(
                f"{heads} heads cannot be shared by {size} processes; use a context that divides num_heads, or "
                "axes=[spatial, temporal]."
            )
        shared = 3 if by_heads else 1  # the dimension of (three, N, L, H, D) that is shared out: heads, or sequences
        found = self._exchange(torch.stack([query, key, value]), share=shared, join=2)
        return self._exchange(kernel(*found.unbind(0))[None], share=2, join=shared)[0]

    def _exchange(self, x: Tensor, share: int, join: int) -> Tensor:
        """Share out one dimension among the processes, and join the parts of another that they hold."""
        parts = torch.stack(x.chunk(self.parallel.size, share))
        return torch.cat(self.parallel.exchange(parts).unbind(0), dim=join)

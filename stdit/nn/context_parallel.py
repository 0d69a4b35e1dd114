"""Context parallelism: the processes of a group each hold some frames of every clip, and exchange them for attention.

In joint attention and along time every process attends with a share of the heads over all frames (Jacobs et al.,
"DeepSpeed-Ulysses"); attention within a frame needs no exchange, and heads that cannot be shared out are left whole along
time, where patches are shared out in their place. Where heads are too few, groups of processes share them, and keys and values
travel from group to group (`ring_attention`).
"""

import math
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from stdit.nn.layout import DenseLayout, Kernel
from stdit.nn.ring_attention import attend_in_ring, check_ring_kernels, torch_ring


def check_shared_frames(frames: int, processes: int) -> None:
    """Raise ValueError if a clip's latent frames cannot be shared out evenly."""
    if frames % processes:
        near = max(1, round(frames / processes)) * processes
        raise ValueError(
            f"{frames} latent frames cannot be shared by {processes} processes; use {near}, or a context of a number that "
            "divides them."
        )


def check_shared_heads(heads: int, processes: int, ring: int, *, causal: bool) -> None:
    """Raise ValueError if joint attention of these heads cannot be shared by processes, `ring` of which form each ring."""
    if heads % (processes // ring):
        fits = processes // math.gcd(heads, processes)
        instead = "" if causal else f"train.parallel.ring={fits} (pipelines: enable_context_parallel(ring={fits})), "
        raise ValueError(
            f"{heads} heads cannot be shared by {processes // ring} processes; use {instead}a context that divides num_heads, or "
            "axes=[spatial, temporal]."
        )


def check_ring(ring: int, *, causal: bool) -> None:
    """Raise ValueError for ring attention of a causal model, or if torch has none."""
    if ring == 1:
        return
    if causal:
        raise ValueError(
            f"ring={ring} does not go with causal=true: ring attention takes no masks, which causal frames, windows and teacher forcing "
            "need; use ring=1 and a context that divides num_heads."
        )
    torch_ring()


def check_shared_attention(
    arguments: Mapping[str, Any], processes: int, ring: int, *, device: str, in_16_bits: bool
) -> None:
    """Raise ValueError if attention of a model cannot be shared by processes, `ring` of which form each ring.

    arguments: of the model. device: its kind. in_16_bits: whether attention runs in bfloat16 or float16.
    """
    causal, heads = arguments["causal"], arguments["num_heads"]
    check_ring(ring, causal=causal)
    if "joint" in arguments["axes"]:
        check_shared_heads(heads, processes, ring, causal=causal)
    if ring > 1:
        check_ring_kernels(device, arguments["hidden_size"] // heads, in_16_bits=in_16_bits)


def sent_by_attention(processes: int, ring: int, *, forwards: int, size: int) -> float:
    """Bytes that a process sends in a training step for each channel of a token that it holds, in a block that exchanges.

    forwards: forward passes, one more with checkpointing. size: bytes of a number.
    """
    sharing = processes // ring
    # Shared heads: queries, keys, values and outputs, of which a process keeps its own part; as much in the backward pass.
    by_heads = 4 * size * (forwards + 1) * (sharing - 1) / sharing
    # A ring: keys and values to the others, backward as well, and then their gradients, in float32, all the way round.
    around = 2 * size * (ring - 1) * (forwards + 1) + 2 * 4 * ring if ring > 1 else 0
    return by_heads + around


class ContextParallel:
    """The frames of clips over groups of neighbouring processes. All processes of a run make it alike.

    size: processes of a group (None: all). ring: of these, the processes around which keys and values travel; size / ring
    neighbours share heads. timeout: of the groups (None: torch's). ValueError if one does not divide the other.
    """

    def __init__(self, size: int | None = None, *, ring: int = 1, timeout: timedelta | None = None):
        every = dist.get_world_size()
        self.size = size or every
        if every % self.size or self.size % ring:
            raise ValueError(
                f"{every} processes cannot be divided into groups of {self.size} with rings of {ring}; use numbers that divide."
            )
        ranks = torch.arange(every).reshape(-1, ring, self.size // ring)

        def group_of(lists: torch.Tensor) -> Any:
            """The group of this process among lists (groups, processes) of ranks."""
            if lists.shape[1] == every:
                return dist.group.WORLD
            return dist.new_subgroups_by_enumeration(lists.tolist(), timeout=timeout)[0]

        self.group = group_of(ranks.flatten(1))
        self.rank = dist.get_rank(self.group)
        self.sharing_heads, self.ring = self.size // ring, None
        self.head_group = self.group
        if ring > 1:
            self.ring = group_of(ranks.transpose(1, 2).flatten(0, 1))
            self.head_group = group_of(ranks.flatten(0, 1)) if self.sharing_heads > 1 else None

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
        """Send part i of (sharing_heads, ...) to process i of those that share heads, and receive one part of each."""
        from torch.distributed.nn.functional import all_to_all_single

        x = x.contiguous()
        return all_to_all_single(torch.empty_like(x), x, group=self.head_group)


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
        if self.parallel.ring is not None:  # without masks (`check_ring`)
            kernel = partial(attend_in_ring, group=self.parallel.ring)
        size, heads = self.parallel.sharing_heads, query.shape[2]
        if size == 1:
            return kernel(query, key, value)
        by_heads = heads % size == 0
        # Of joint attention, heads are always shared (`check_shared_heads`).
        if not by_heads and query.shape[0] % size:
            raise ValueError(
                f"neither {heads} heads nor {query.shape[0]} sequences along time (patches times clips) can be shared by {size} "
                "processes; use a context that divides one of them."
            )
        shared = 3 if by_heads else 1  # the dimension of (three, N, L, H, D) that is shared out: heads, or sequences
        found = self._exchange(torch.stack([query, key, value]), share=shared, join=2)
        return self._exchange(kernel(*found.unbind(0))[None], share=2, join=shared)[0]

    def _exchange(self, x: Tensor, share: int, join: int) -> Tensor:
        """Share out one dimension among the processes, and join the parts of another that they hold."""
        parts = torch.stack(x.chunk(self.parallel.sharing_heads, share))
        return torch.cat(self.parallel.exchange(parts).unbind(0), dim=join)

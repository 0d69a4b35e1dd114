"""Attention that is masked by frames, without the products that a mask would throw away.

Which frames see which is a small table. Neighbouring queries form chunks that attend to the keys they see, without a mask where
they all see the same: any fused kernel then runs over them, and time grows with what is seen. flex attention reads the same table.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

LEAST_QUERIES = 64  # of a chunk: fewer leave a kernel idle (`stdit bench windows`)
_BLOCK = 128  # tokens of a block of flex attention
_KEPT = 16  # block masks, each of one shape of clips


class FrameMask(NamedTuple):
    """Which runs of keys each run of queries sees; a run is the tokens of one frame, next to each other.

    sees: (runs of queries, runs of keys) bool. queries, keys: tokens of every run.
    """

    sees: np.ndarray
    queries: np.ndarray
    keys: np.ndarray

    def products(self) -> int:
        """Pairs of queries and keys that `chunks` multiply."""
        groups = self._groups()
        return sum(int(self.queries[a:b].sum() * self.keys[self.sees[a:b].any(0)].sum()) for a, b in groups)

    def chunks(self, device: torch.device | str = "cpu") -> tuple["Chunk", ...]:
        """All queries in chunks, in order."""
        found, masks = [], dict[bytes, Tensor]()
        for first, end in self._groups():
            sees, queries = self.sees[first:end], self.queries[first:end]
            seen = np.flatnonzero(sees.any(0))
            sees, mask = sees[:, seen], None
            if not sees.all():
                whole = np.repeat(np.repeat(sees, queries, 0), self.keys[seen], 1)
                key = sees.tobytes() + queries.tobytes() + self.keys[seen].tobytes()
                if key not in masks:  # chunks inside a clip have one mask
                    masks[key] = torch.from_numpy(whole)[None, None].to(device)
                mask = masks[key]
            found.append(Chunk(int(queries.sum()), self._ranges(seen), mask))
        return tuple(found)

    def _groups(self) -> list[tuple[int, int]]:
        """Runs of queries [first, end) that together have enough of them; what is left over joins the last."""
        found, first, count = [], 0, 0
        for i, tokens in enumerate(self.queries.tolist()):
            count += tokens
            if count >= LEAST_QUERIES:
                found.append((first, i + 1))
                first, count = i + 1, 0
        if count:
            found.append((found.pop()[0] if found else 0, len(self.queries)))
        return found

    def _ranges(self, runs: np.ndarray) -> tuple[tuple[int, int], ...]:
        """The tokens [first, end) of runs of keys, joined where they touch."""
        ends = np.cumsum(self.keys)
        found: list[tuple[int, int]] = []
        for run in runs.tolist():
            first, end = int(ends[run] - self.keys[run]), int(ends[run])
            if found and found[-1][1] == first:
                found[-1] = (found[-1][0], end)
            else:
                found.append((first, end))
        return tuple(found)

    def block_mask(self, device: torch.device) -> Any:
        """A `BlockMask` of flex attention, which is made once for a shape and kept."""
        return _block_mask(self.sees.tobytes(), tuple(self.queries.tolist()), tuple(self.keys.tolist()), device=device)


class Chunk(NamedTuple):
    """Neighbouring queries, and the keys that any of them sees.

    queries: their number. keys: ranges [first, end). mask: (1, 1, queries, keys) bool, true where a query may attend; None if all
    see the same keys.
    """

    queries: int
    keys: tuple[tuple[int, int], ...]
    mask: Tensor | None


class _Ranges(torch.autograd.Function):
    """Ranges of a tensor along dimension 1 as views, whose gradients are added up in one tensor.

    The backward pass of a slice fills a tensor of the size of all: for as many slices as frames, that grows with their square.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranges: tuple[tuple[int, int], ...]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.ranges = x.shape, ranges
        return tuple(x[:, first:end] for first, end in ranges)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = grads[0].new_zeros(ctx.shape)
        for (first, end), grad in zip(ctx.ranges, grads, strict=True):
            total[:, first:end] += grad
        return total, None


# Query, key, value (N, L, H, D) and a mask, or a `BlockMask`, or None -> (N, L, H, D).
MaskedKernel = Callable[[Tensor, Tensor, Tensor, Any], Tensor]


def attend_in_chunks(
    query: Tensor, key: Tensor, value: Tensor, *, chunks: tuple[Chunk, ...], kernel: MaskedKernel
) -> Tensor:
    """Attention (N, L, H, D) in which every chunk of queries attends to its keys."""
    if len(chunks) == 1 and chunks[0].keys == ((0, key.shape[1]),):  # as in short clips: nothing to slice or to join
        return kernel(query, key, value, chunks[0].mask)
    ranges = tuple(dict.fromkeys(found for chunk in chunks for found in chunk.keys))
    keys, values = (dict(zip(ranges, _slices(x, ranges), strict=True)) for x in (key, value))
    outputs = []
    for part, chunk in zip(query.split([chunk.queries for chunk in chunks], 1), chunks, strict=True):
        seen_keys, seen_values = (_joined([x[at] for at in chunk.keys]) for x in (keys, values))
        outputs.append(kernel(part, seen_keys, seen_values, chunk.mask))
    return torch.cat(outputs, 1)


def _slices(x: Tensor, ranges: tuple[tuple[int, int], ...]) -> tuple[Tensor, ...]:
    if torch.compiler.is_compiling():  # which fuses the sums of gradients of plain slices
        return tuple(x[:, first:end] for first, end in ranges)
    return _Ranges.apply(x, ranges)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@lru_cache(maxsize=_KEPT)
def _block_mask(sees: bytes, queries: tuple[int, ...], keys: tuple[int, ...], device: torch.device) -> Any:
    """The block mask of a `FrameMask`, from sums over its table: no mask of all tokens is made, as torch's helper would."""
    from torch.nn.attention.flex_attention import BlockMask

    table = np.frombuffer(sees, dtype=bool).reshape(len(queries), len(keys))
    runs = [np.repeat(np.arange(len(lengths)), lengths) for lengths in (queries, keys)]
    (first, last), (left, right) = (_ends_of_blocks(run) for run in runs)
    sums = np.pad(table.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    seen = sums[last + 1][:, right + 1] - sums[first][:, right + 1] - sums[last + 1][:, left] + sums[first][:, left]
    whole = seen == np.outer(last - first + 1, right - left + 1)
    for axis, run in enumerate(runs):
        if len(run) % _BLOCK:  # a block beyond the last token is never whole, as torch has it
            whole[(slice(None),) * axis + (-1,)] = False
    with torch.inference_mode(False):
        found, query_run, key_run = (torch.from_numpy(x).to(device) for x in (table.copy(), *runs))

        def sees_token(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return found[query_run[query], key_run[key]]

        lengths = len(runs[0]), len(runs[1])
        (some, which), (all_of, whole_ones) = (_ordered(kind) for kind in (~whole & (seen > 0), whole))
        blocks = BlockMask.from_kv_blocks(
            some, which, all_of, whole_ones, BLOCK_SIZE=_BLOCK, mask_mod=sees_token, seq_lengths=lengths
        )
        return blocks.to(device)


def _ends_of_blocks(run: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The runs of the first and of the last token of every block."""
    starts = np.arange(0, len(run), _BLOCK)
    return run[starts], run[np.minimum(starts + _BLOCK, len(run)) - 1]


def _ordered(blocks: np.ndarray) -> tuple[Tensor, Tensor]:
    """The number of blocks in every row of (rows, columns) bool, (1, 1, rows), and their columns first, (1, 1, rows, columns)."""
    columns = np.argsort(~blocks, axis=1, kind="stable")
    return torch.from_numpy(blocks.sum(1).astype(np.int32))[None, None], torch.from_numpy(columns.astype(np.int32))[
        None, None
    ]

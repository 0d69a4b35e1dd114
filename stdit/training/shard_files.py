"""Files of a checkpoint in shards: GROUP-00001-of-00002.safetensors has the rows of the first of two processes.

Its metadata says which rows they are, so that any number of processes can read the rows that they need.
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from stdit.training.parallel import like, local, rows_of

ROWS = "rows"  # in the metadata: the first row of every tensor that is in shards
_NAME = re.compile(r"(?P<group>.+)-\d{5}-of-\d{5}")


class _Part(NamedTuple):
    """Some rows of a tensor: the number of the first, their shape, and the file that has them."""

    first: int
    shape: tuple[int, ...]
    file: Path


class ShardedTensors(Mapping[str, Tensor]):
    """The tensors of a group of shards, read from the files when they are asked for; some rows of them take less memory."""

    def __init__(self, files: Sequence[Path]):
        self._parts: dict[str, list[_Part]] = {}
        for file in files:
            with safe_open(file, framework="pt") as shard:
                rows = json.loads((shard.metadata() or {}).get(ROWS, "{}"))
                for key in shard.keys():  # noqa: SIM118 (no mapping)
                    part = _Part(int(rows.get(key, 0)), tuple(shard.get_slice(key).get_shape()), file)
                    self._parts.setdefault(key, []).append(part)
        for parts in self._parts.values():
            parts.sort(key=lambda part: part.first)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, key: str) -> Tensor:
        """The whole tensor."""
        return self.rows(key, 0, None)

    def shape_of(self, key: str) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        shapes = [part.shape for part in self._parts[key]]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()

    def rows(self, key: str, first: int, end: int | None) -> Tensor:
        """The rows [first, end) of a tensor (None: to its last), from the files that have some of them."""
        found: list[Tensor] = []
        for start, shape, file in self._parts[key]:
            if not shape:
                with safe_open(file, framework="pt") as shard:
                    return shard.get_tensor(key)
            begin, stop = max(first - start, 0), shape[0] if end is None else min(end - start, shape[0])
            if begin < stop:
                found.append(_slice(file, key, begin, stop))
        return torch.cat(found) if found else _slice(self._parts[key][0].file, key, 0, 0)


def _slice(file: Path, key: str, begin: int, end: int) -> Tensor:
    with safe_open(file, framework="pt") as shard:
        return shard.get_slice(key)[begin:end]


def group_files(folder: Path) -> dict[str, Mapping[str, Tensor]]:
    """The groups of a checkpoint that is in shards; empty for any other."""
    groups: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if named := _NAME.fullmatch(file.stem):
            groups.setdefault(named["group"], []).append(file)
    return {group: ShardedTensors(files) for group, files in groups.items()}


def check_files(folder: Path, names: Collection[str]) -> None:
    """Raise ValueError if a number in one of these files of shards is not finite; one tensor is read at a time."""
    for file in sorted(folder.glob("*.safetensors")):
        if file.name not in names or not _NAME.fullmatch(file.stem):
            continue
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (no mapping)
                check_finite({file.stem: {key: tensors.get_tensor(key)}}, str(folder), "use an older checkpoint")


def part_of(group: Mapping[str, Tensor], key: str, tensor: Tensor) -> Tensor:
    """A tensor of a checkpoint, or of one like `tensor`, which is sharded, what this process is to hold of it."""
    rows = rows_of(tensor)
    if rows is None:
        return group[key]
    count, width = tensor.shape[0], tensor.numel() // max(1, tensor.shape[0])
    found = group.shape_of(key) if isinstance(group, ShardedTensors) else tuple(group[key].shape)
    if found[0] != count or math.prod(found[1:]) != width:  # a kernel may be kept as a matrix
        raise RuntimeError(f"{key} has the shape {list(found)} instead of {list(tensor.shape)}")
    part = group.rows(key, *rows) if isinstance(group, ShardedTensors) else group[key][slice(*rows)].clone()
    return like(part.reshape(local(tensor).shape).to(local(tensor)), tensor)


def check_finite(tensors: Mapping[str, Mapping[str, Tensor]], what: str, remedy: str) -> None:
    """Raise ValueError if a number in groups of tensors is not finite."""
    for group, named in tensors.items():
        for name, value in named.items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise ValueError(f"{what} has a number that is not finite in {group}/{name}; {remedy}.")

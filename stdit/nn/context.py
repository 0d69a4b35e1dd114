"""The inputs that all blocks of one forward pass share: condition, layout, and position tables made once per axis."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stdit.nn.cache import FrameCache
from stdit.nn.config import BlockConfig
from stdit.nn.frame_mask import FrameMask
from stdit.nn.layout import Layout
from stdit.nn.modulation import Condition
from stdit.nn.positions import rope_freqs, temporal_pos_embed

# By position encoding: whether a temporal table is added to the tokens inside attention, and the number of RoPE axes
# (time; or time, row and column).
POSITION_ENCODINGS = {
    "sincos": (True, 0),
    "rope": (False, 1),
    "rope_3d": (False, 3),
    "sincos+rope_3d": (True, 3),
    "latte": (False, 0),
    "none": (False, 0),
}


class AxisTables(NamedTuple):
    """Position tables and masks of attention along one axis; a field is None where attention does not need it.

    time: (L, D), added to the tokens. query_rope, key_rope: (L, 1, pairs, 2), or (N, L, 1, pairs, 2) where sequences differ. frames: what each frame sees, as chunks, or as
    a `BlockMask` for flex attention; None if every frame sees all. mask: (N, 1, 1, keys) bool, false for padding. bias_index:
    (N|1, L, L) rows of the relative position bias. retained: indices of the keys that are cached for the next call.
    """

    time: Tensor | None = None
    query_rope: Tensor | None = None
    key_rope: Tensor | None = None
    frames: Any = None
    mask: Tensor | None = None
    bias_index: Tensor | None = None
    retained: Tensor | None = None


class BlockContext(NamedTuple):
    """The arguments of a block besides the hidden states; `tables` has an entry for each (axis, position encoding).

    It is a named tuple so that accelerate's hooks move its tensors to the block's device.
    """

    condition: Condition
    layout: Layout
    tables: Mapping[tuple[str, str], AxisTables]
    cache: FrameCache | None = None


def make_context(
    config: BlockConfig,
    attentions: Iterable[tuple[str, str]],
    condition: Condition,
    layout: Layout,
    cache: FrameCache | None = None,
    *,
    flex: bool = False,
) -> BlockContext:
    """Make the context of blocks with these (axis, position encoding) pairs, with tables on the condition's device.

    flex: the blocks attend by flex attention, which takes block masks.
    """
    device = condition.embedding.device
    pairs = dict.fromkeys(attentions)
    tables = {
        (axis, encoding): _axis_tables(config, axis, encoding, layout, cache=cache, device=device, flex=flex)
        for axis, encoding in pairs
    }
    return BlockContext(condition, layout, tables, cache)


def cached_positions(context: BlockContext) -> dict[str, np.ndarray]:
    """Positions (L, 3) of the keys, by axis, that the cache holds after a writing pass."""
    cache, layout = context.cache, context.layout
    assert cache is not None
    found = {}
    for axis, _ in context.tables:
        if axis != "spatial" and axis not in found:
            positions = np.concatenate([cache.positions(axis), layout.positions(axis)])
            found[axis] = positions[cache.retained(positions)]
    return found


def _axis_tables(
    config: BlockConfig,
    axis: str,
    encoding: str,
    layout: Layout,
    *,
    cache: FrameCache | None,
    device: torch.device,
    flex: bool,
) -> AxisTables:
    positions = layout.positions(axis)
    adds_time, rope_axes = POSITION_ENCODINGS[encoding]
    rope_axes = 0 if axis == "spatial" and rope_axes == 1 else rope_axes
    time = None
    if adds_time and axis != "spatial" and positions[:, 0].max() > 0:  # the table is zero at frame 0
        table = temporal_pos_embed(int(positions[:, 0].max()) + 1, config.dim, layout.scale[0])
        time = table[torch.from_numpy(positions[:, 0])].to(device)
    key_positions, retained = positions, None
    if cache is not None and axis != "spatial":
        key_positions = np.concatenate([cache.positions(axis), positions])
        retained = torch.from_numpy(cache.retained(key_positions)).to(device) if cache.writing else None
    query_rope = key_rope = None
    if rope_axes:
        rebased = rebase_sink_positions(config, key_positions, positions)
        rotary = layout.rotary_positions(axis)[..., :rope_axes]
        query_rope = key_rope = rope_freqs(rotary, config.head_dim // 2, layout.scale).to(device)
        if rebased is not positions:
            key_rope = rope_freqs(rebased[:, :rope_axes], config.head_dim // 2, layout.scale).to(device)
    among, noisy = layout.attended(axis)
    among_keys = key_positions if cache is not None else among
    seen = visible_frames(config, axis, among, among_keys, noisy=noisy)
    padding = layout.padding_mask(axis)
    frames = None if seen is None else seen.block_mask(device) if flex else seen.chunks(device)
    index = None
    if config.bias_grid is not None and axis != "temporal":
        index = relative_position_index(layout.spatial_positions(axis), config.bias_grid).to(device)
    return AxisTables(time, query_rope, key_rope, frames=frames, mask=padding, bias_index=index, retained=retained)


def rebase_sink_positions(config: BlockConfig, key_positions: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Move the sink frames among key positions (L, 3), so that no distance exceeds the frames of a training clip."""
    beyond = int(positions[:, 0].min()) + 1 - config.max_train_frames
    if not config.sink or beyond <= 0:
        return key_positions
    moved = key_positions.copy()
    moved[moved[:, 0] < config.sink, 0] += beyond
    return moved


def relative_position_index(spatial_positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Indices (N, L, L) into the relative position bias of `grid`, from rows and columns (N, L, 2).

    Distances that exceed the grid are clamped.
    """
    rows, columns = grid
    distance = spatial_positions[:, :, None] - spatial_positions[:, None]
    y = distance[..., 0].clamp(1 - rows, rows - 1) + rows - 1
    x = distance[..., 1].clamp(1 - columns, columns - 1) + columns - 1
    return y * (2 * columns - 1) + x


def visible_frames(
    config: BlockConfig, axis: str, positions: np.ndarray, key_positions: np.ndarray, noisy: np.ndarray
) -> FrameMask | None:
    """Which frames see which, by the positions (L, 3) of queries and keys; None if every query may attend to every key.

    noisy: (L,) bool, the tokens of noisy copies.
    """
    if not config.causal or axis == "spatial":
        return None
    query_runs, key_runs = _runs(positions, noisy), _runs(key_positions, noisy)
    frames, key_frames = positions[query_runs[:-1], 0], key_positions[key_runs[:-1], 0]
    distance = frames[:, None] - key_frames[None]
    allowed = (distance >= 0) & ((distance < (config.window or len(key_positions) + 1)) | (key_frames < config.sink))
    if noisy.any():
        # Teacher forcing: noisy frames attend to themselves and earlier clean frames, clean frames to clean frames.
        noisy_query, noisy_key = noisy[query_runs[:-1], None], noisy[None, key_runs[:-1]]
        allowed &= np.where(noisy_query, np.where(noisy_key, distance == 0, distance > 0), ~noisy_key)
    return None if allowed.all() else FrameMask(allowed, np.diff(query_runs), np.diff(key_runs))


def _runs(positions: np.ndarray, noisy: np.ndarray) -> np.ndarray:
    """The first tokens of runs of tokens of one frame, and after them the number of tokens."""
    changes = np.diff(positions[:, 0]) != 0
    if len(noisy) == len(positions):
        changes |= np.diff(noisy)
    return np.concatenate([[0], np.flatnonzero(changes) + 1, [len(positions)]])

"""Key map of MDT v2 (Gao et al., "MDTv2"): a masked trunk, learned positions, a relative position bias."""

import re

import torch
from torch import Tensor

from stdit.model.stdit import STDiT

Tensors = dict[str, Tensor]
_BIAS, _INDEX = "attn.rel_pos_bias.relative_position_bias_table", "attn.rel_pos_bias.relative_position_index"
FIXED_CONFIG = {"trunk": "masked", "learned_pos_embed": True, "relative_position_bias": True}


def _block_counts(tensors: Tensors) -> list[int]:
    """Numbers of encoder, skip-connected, decoder and side blocks."""
    parts = ("en_inblocks", "en_outblocks", "de_blocks", "sideblocks")
    return [len({key.split(".")[1] for key in tensors if key.startswith(f"{part}.")}) for part in parts]


def to_dit(tensors: Tensors) -> Tensors:
    """Rename to DiT's names. Raises ValueError for more than one side block."""
    first, second, _, sides = _block_counts(tensors)
    if sides != 1:
        raise ValueError(f"MDT with {sides} side blocks is not supported; convert MDT v2, which has one.")
    begin, out = {"en_inblocks": 0, "en_outblocks": first, "de_blocks": first + second}, {}
    for key, value in tensors.items():
        if key.endswith(_INDEX):  # computed from the grid
            continue
        if key.endswith(_BIAS):
            key = key.replace(_BIAS, "attn.relative_position_bias.table")
        if match := re.match(r"(\w+blocks)\.(\d+)\.(.*)", key):
            number = begin.get(match[1], 0) + int(match[2])
            key = f"trunk.side_interpolater.{match[3]}" if match[1] == "sideblocks" else f"blocks.{number}.{match[3]}"
        renamed = {"pos_embed": "pos_embed.patches", "decoder_pos_embed": "trunk.decoder_pos_embed.patches"}
        out[renamed.get(key, key)] = value[0] if key in renamed else value
    out["trunk.mask_token"] = out.pop("mask_token").flatten()
    return out


def from_dit(tensors: Tensors) -> Tensors:
    """Rename DiT's names to MDT's; the decoder's depth, which no tensor holds, comes from `restore`."""
    tensors = dict(tensors)
    decoder = int(tensors.pop("num_decoder_blocks"))
    depth = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks."))
    half = (depth - decoder) // 2
    side = round(len(tensors["pos_embed.patches"]) ** 0.5)
    out = {
        "pos_embed": tensors.pop("pos_embed.patches")[None],
        "decoder_pos_embed": tensors.pop("trunk.decoder_pos_embed.patches")[None],
        "mask_token": tensors.pop("trunk.mask_token")[None, None],
    }
    for key, value in tensors.items():
        if match := re.match(r"blocks\.(\d+)\.(.*)", key):
            number = int(match[1])
            part, begin = ("en_inblocks", 0) if number < half else ("en_outblocks", half) if number < 2 * half else ("de_blocks", 2 * half)  # fmt: skip
            key = f"{part}.{number - begin}.{match[2]}"
        key = key.replace("trunk.side_interpolater.", "sideblocks.0.")
        if key.endswith("attn.relative_position_bias.table"):
            out[key.replace("attn.relative_position_bias.table", _INDEX)] = _relative_position_index(side)
            key = key.replace("attn.relative_position_bias.table", _BIAS)
        out[key] = value
    return out


def _relative_position_index(side: int) -> Tensor:
    """(side^2, side^2) rows of the bias table of a square grid."""
    positions = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).flatten(0, 1)
    distance = positions[:, None] - positions[None] + side - 1
    return distance[..., 0] * (2 * side - 1) + distance[..., 1]


def restore(tensors: Tensors, model: STDiT) -> Tensors:
    """Add the number of decoder blocks, for `from_dit`."""
    tensors = {key: value for key, value in tensors.items() if key != "pos_embed"}
    return {**tensors, "num_decoder_blocks": torch.tensor(model.config.num_decoder_blocks)}


def arguments(tensors: Tensors, config: dict) -> dict:
    """The arguments of STDiT in which MDT differs from DiT."""
    patch, side = tensors["x_embedder.proj.weight"].shape[-1], round(len(tensors["pos_embed.patches"]) ** 0.5)
    skips = {int(m[1]) for key in tensors if (m := re.match(r"blocks\.(\d+)\.skip_linear\.weight", key))}
    blocks = 1 + max(skips)
    return {
        **FIXED_CONFIG, "sample_size": (1, side * patch, side * patch),
        "num_decoder_blocks": blocks - 2 * min(skips),
    }  # fmt: skip

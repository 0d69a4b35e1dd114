"""MDT v2's names and ours (Gao et al.): a masked trunk with learned places and a bias for distances."""

import re

import torch
from torch import Tensor

from stdit.model.stdit import STDiT

Tensors = dict[str, Tensor]
_BIAS, _INDEX = "attn.rel_pos_bias.relative_position_bias_table", "attn.rel_pos_bias.relative_position_index"
WIRED = {"trunk": "masked", "learned_pos_embed": True, "relative_position_bias": True}


def _counts(tensors: Tensors) -> list[int]:
    parts = ("en_inblocks", "en_outblocks", "de_blocks", "sideblocks")
    return [len({key.split(".")[1] for key in tensors if key.startswith(f"{part}.")}) for part in parts]


def to_dit(tensors: Tensors) -> Tensors:
    """DiT's names; ValueError for more than one side block."""
    first, second, _, sides = _counts(tensors)
    if sides != 1:
        raise ValueError(f"MDT with {sides} side blocks is not known; MDT v2 has one.")
    begin, out = {"en_inblocks": 0, "en_outblocks": first, "de_blocks": first + second}, {}
    for key, value in tensors.items():
        if key.endswith(_INDEX):  # computed
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
    """The way back. The decoder's depth is told by nothing in the tensors but the caller's `restore`."""
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
            out[key.replace("attn.relative_position_bias.table", _INDEX)] = _index(side)
            key = key.replace("attn.relative_position_bias.table", _BIAS)
        out[key] = value
    return out


def _index(side: int) -> Tensor:
    spots = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).flatten(0, 1)
    distance = spots[:, None] - spots[None] + side - 1
    return distance[..., 0] * (2 * side - 1) + distance[..., 1]


def restore(tensors: Tensors, model: STDiT) -> Tensors:
    tensors = {key: value for key, value in tensors.items() if key != "pos_embed"}
    return {**tensors, "num_decoder_blocks": torch.tensor(model.config.num_decoder_blocks)}


def arguments(tensors: Tensors, config: dict) -> dict:
    patch, side = tensors["x_embedder.proj.weight"].shape[-1], round(len(tensors["pos_embed.patches"]) ** 0.5)
    skips = {int(m[1]) for key in tensors if (m := re.match(r"blocks\.(\d+)\.skip_linear\.weight", key))}
    blocks = 1 + max(skips)
    return {
        **WIRED, "sample_size": (1, side * patch, side * patch),
        "num_decoder_blocks": blocks - 2 * min(skips),
    }  # fmt: skip

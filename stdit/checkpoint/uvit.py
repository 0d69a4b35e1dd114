"""Key map of U-ViT (Bao et al., "All are Worth Words"): in-context tokens, long skip connections, learned positions."""

import re

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
NAMES = {
    "patch_embed.proj": "x_embedder.proj",
    "label_emb": "y_embedder.embedding_table",
    "norm": "final_layer.norm_final",
    "decoder_pred": "final_layer.linear",
    "final_layer": "final_conv",
}
FIXED_CONFIG = {
    "conditioning": "in_context", "trunk": "long_skip", "learned_pos_embed": True, "timestep_mlp": False, "activation": "gelu",
    "timestep_offset": 1.0,  # its first timestep is 1
}  # fmt: skip
HEADS = {512: 8}  # by width: U-ViT-S; its other widths have as many heads as DiT's


def _count(tensors: Tensors, part: str) -> int:
    """The number of blocks in a list of blocks."""
    found = [int(match[1]) for key in tensors if (match := re.match(rf"{part}\.(\d+)\.", key))]
    return 1 + max(found, default=-1)


def to_dit(tensors: Tensors) -> Tensors:
    """Rename to DiT's names. Raises ValueError for a timestep MLP, which no released weights have."""
    if any(key.startswith("time_embed.") for key in tensors):
        raise ValueError(
            "U-ViT with mlp_time_embed=True is not supported; convert weights whose time token is the bare sinusoid."
        )
    half, out = _count(tensors, "in_blocks"), {}
    for key, value in tensors.items():
        head, _, kind = key.rpartition(".")
        if match := re.match(r"(in_blocks|out_blocks)\.(\d+)\.(.*)", key):
            number = int(match[2]) + (half + 1 if match[1] == "out_blocks" else 0)
            out[f"blocks.{number}.{match[3]}"] = value
        elif key.startswith("mid_block."):
            out[key.replace("mid_block", f"blocks.{half}", 1)] = value
        elif key == "pos_embed":
            num_prefix = 2 if "label_emb.weight" in tensors else 1
            out["pos_embed.prefix"] = value[0, :num_prefix].flip(0)  # U-ViT: label, time; STDiT: time, label
            out["pos_embed.patches"] = value[0, num_prefix:]
        else:
            out[f"{NAMES.get(head, head)}.{kind}"] = value
    for key in [key for key in out if key.endswith("attn.qkv.weight")]:
        out.setdefault(key.replace("weight", "bias"), torch.zeros(len(out[key])))
    return out


def from_dit(tensors: Tensors) -> Tensors:
    """Rename DiT's names to U-ViT's.

    A bias of queries, keys and values that is zero everywhere is left out, since the released weights have none.
    """
    out: Tensors = {}
    half = _count(tensors, "blocks") // 2
    tensors = {key: value for key, value in tensors.items() if key != "pos_embed"}
    back = {ours: theirs for theirs, ours in NAMES.items()}
    without_bias = not any(value.any() for key, value in tensors.items() if key.endswith("attn.qkv.bias"))
    for key, value in tensors.items():
        head, _, kind = key.rpartition(".")
        if match := re.match(r"blocks\.(\d+)\.(.*)", key):
            number = int(match[1])
            name = f"in_blocks.{number}" if number < half else f"out_blocks.{number - half - 1}"
            if not (without_bias and key.endswith("attn.qkv.bias")):
                out[f"{'mid_block' if number == half else name}.{match[2]}"] = value
        elif not key.startswith("pos_embed."):
            out[f"{back.get(head, head)}.{kind}"] = value
    table = torch.cat([tensors["pos_embed.prefix"].flip(0), tensors["pos_embed.patches"]])
    return {**out, "pos_embed": table[None]}


def arguments(tensors: Tensors, config: dict) -> dict:
    """The arguments of STDiT in which U-ViT differs from DiT."""
    patch, side = tensors["x_embedder.proj.weight"], round(len(tensors["pos_embed.patches"]) ** 0.5)
    found = {
        **FIXED_CONFIG, "output_conv": "final_conv.weight" in tensors, "learn_sigma": False,
        "sample_size": (1, side * patch.shape[-1], side * patch.shape[-1]),
    }  # fmt: skip
    return {**found, "num_heads": HEADS[len(patch)]} if len(patch) in HEADS else found

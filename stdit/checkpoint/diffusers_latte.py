"""Key map of diffusers' `LatteTransformer3DModel`: text to video, adaLN-single, cross-attention to captions in spatial blocks only."""

import re

import torch
from torch import Tensor

from stdit.model.stdit import STDiT

Tensors = dict[str, Tensor]

_NAMES = {
    "pos_embed.proj": "x_embedder.proj",
    "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "adaln_single.linear": "adaLN_single.1",
    "caption_projection.linear_1": "caption_embedder.fc1",
    "caption_projection.linear_2": "caption_embedder.fc2",
    "proj_out": "final_layer.linear",
}
_BLOCK = {
    "attn1.to_out.0": "attn.proj",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_out.0": "cross_attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_FUSED = {"attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "cross_attn.kv": ("attn2.to_k", "attn2.to_v")}
_BLOCK_LISTS = ("transformer_blocks", "temporal_transformer_blocks")
_MODULATION_TABLE = "scale_shift_table"
FIXED_CONFIG = {
    "conditioning": "adaln_single", "caption_axes": ["spatial"], "axes": ["spatial", "temporal"], "position_encoding": "latte",
}  # fmt: skip


def to_dit(tensors: Tensors) -> Tensors:
    """Rename to DiT's names: block 2i is Latte's spatial block i, block 2i + 1 its temporal block i."""
    rest, out = dict(tensors), Tensors()
    if _MODULATION_TABLE in rest:
        out["final_layer.adaLN_modulation.table"] = rest.pop(_MODULATION_TABLE)
    for theirs, ours in _NAMES.items():
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in rest:
                out[f"{ours}.{kind}"] = rest.pop(f"{theirs}.{kind}")
    blocks = {match[0]: match for key in rest if (match := re.match(r"(\w*transformer_blocks)\.(\d+)\.", key))}
    for prefix, match in blocks.items():
        name = f"blocks.{2 * int(match[2]) + _BLOCK_LISTS.index(match[1])}."
        if prefix + _MODULATION_TABLE in rest:
            out[f"{name}adaLN_modulation.table"] = rest.pop(prefix + _MODULATION_TABLE)
        for kind in ("weight", "bias"):
            for theirs, ours in _BLOCK.items():
                if f"{prefix}{theirs}.{kind}" in rest:
                    out[f"{name}{ours}.{kind}"] = rest.pop(f"{prefix}{theirs}.{kind}")
            for ours, parts in _FUSED.items():
                if all(f"{prefix}{part}.{kind}" in rest for part in parts):
                    out[f"{name}{ours}.{kind}"] = torch.cat([rest.pop(f"{prefix}{part}.{kind}") for part in parts])
    return {**out, **rest}


def from_dit(tensors: Tensors) -> Tensors:
    """Rename DiT's names to those of diffusers' Latte."""
    out = Tensors()
    names, block = ({ours: theirs for theirs, ours in table.items()} for table in (_NAMES, _BLOCK))
    for key, value in tensors.items():
        head, _, kind = key.rpartition(".")
        if key == "pos_embed":
            continue
        if not (match := re.match(r"blocks\.(\d+)\.(.+)", head)):
            out[_MODULATION_TABLE if kind == "table" else f"{names[head]}.{kind}"] = value
            continue
        prefix, part = f"{_BLOCK_LISTS[int(match[1]) % 2]}.{int(match[1]) // 2}", match[2]
        if kind == "table":
            out[f"{prefix}.{_MODULATION_TABLE}"] = value
        elif part in _FUSED:
            chunks = value.chunk(len(_FUSED[part]))
            out |= {f"{prefix}.{name}.{kind}": x.clone() for name, x in zip(_FUSED[part], chunks, strict=True)}
        else:
            out[f"{prefix}.{block[part]}.{kind}"] = value
    return out


def arguments(tensors: Tensors, config: dict) -> dict:
    """The arguments of STDiT in which Latte differs from DiT, and those that its config.json gives."""
    size = config.get("sample_size", 64)
    found = {
        **FIXED_CONFIG, "caption_channels": tensors["caption_embedder.fc1.weight"].shape[1],
        "sample_size": (config.get("video_length", 16), size, size), "norm2_eps": config.get("norm_eps", 1e-6),
    }  # fmt: skip
    return {**found, "num_heads": config["num_attention_heads"]} if "num_attention_heads" in config else found


def config_of(model: STDiT) -> dict:
    """The arguments of `LatteTransformer3DModel` for an STDiT."""
    config = model.config
    return {
        "num_attention_heads": config.num_heads, "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels, "out_channels": model.out_channels, "num_layers": config.depth // 2,
        "cross_attention_dim": config.hidden_size, "attention_bias": True, "sample_size": config.sample_size[1],
        "patch_size": model.patch_size[1], "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": config.norm2_eps,
        "caption_channels": config.caption_channels, "video_length": config.sample_size[0],
    }  # fmt: skip

"""Key map of diffusers' `DiTTransformer2DModel`: DiT's weights under other names, with a copy of the embedders in every block."""

import torch
from torch import Tensor

from stdit.model.stdit import STDiT

Tensors = dict[str, Tensor]

_EMBEDDERS = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
    "class_embedder.embedding_table": "y_embedder.embedding_table",
}
_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
_QKV = ("to_q", "to_k", "to_v")


def to_dit(tensors: Tensors) -> Tensors:
    """Rename to DiT's names.

    Raises ValueError if the embedders of the blocks differ (fine-tuned separately), since STDiT has one for all blocks.
    """
    rest, out = dict(tensors), Tensors()
    depth = 1 + max((int(key.split(".")[1]) for key in rest if key.startswith("transformer_blocks.")), default=-1)
    for kind in ("weight", "bias"):
        for theirs, ours in _ENDS.items():
            _move(rest, out, f"{theirs}.{kind}", f"{ours}.{kind}")
        for i in range(depth):
            block = f"transformer_blocks.{i}"
            for theirs, ours in _EMBEDDERS.items():
                key, name = f"{block}.norm1.emb.{theirs}.{kind}", f"{ours}.{kind}"
                if key in rest and name in out and not torch.equal(rest[key], out[name]):
                    raise ValueError(
                        f"{key!r} differs from block 0's; embedders that differ between blocks are not supported; convert weights "
                        "whose blocks share them."
                    )
                _move(rest, out, key, name)
            for theirs, ours in _BLOCK.items():
                _move(rest, out, f"{block}.{theirs}.{kind}", f"blocks.{i}.{ours}.{kind}")
            parts = [f"{block}.attn1.{name}.{kind}" for name in _QKV]
            if all(part in rest for part in parts):
                out[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([rest.pop(part) for part in parts])
    rest.pop("pos_embed.pos_embed", None)  # the sin-cos table, which some versions store
    return {**out, **rest}


def from_dit(tensors: Tensors) -> Tensors:
    """Rename to diffusers' names, copying the embedders into every block."""
    rest, out = dict(tensors), Tensors()
    depth = 1 + max(int(key.split(".")[1]) for key in rest if key.startswith("blocks."))
    rest.pop("pos_embed", None)
    for kind in ("weight", "bias"):
        for theirs, ours in _ENDS.items():
            _move(rest, out, f"{ours}.{kind}", f"{theirs}.{kind}")
        embedders = {theirs: rest.pop(f"{ours}.{kind}", None) for theirs, ours in _EMBEDDERS.items()}
        for i in range(depth):
            block = f"transformer_blocks.{i}"
            for theirs, value in embedders.items():
                if value is not None:
                    out[f"{block}.norm1.emb.{theirs}.{kind}"] = value.clone()
            for theirs, ours in _BLOCK.items():
                _move(rest, out, f"blocks.{i}.{ours}.{kind}", f"{block}.{theirs}.{kind}")
            parts = rest.pop(f"blocks.{i}.attn.qkv.{kind}").chunk(3)
            out |= {f"{block}.attn1.{name}.{kind}": part.clone() for name, part in zip(_QKV, parts, strict=True)}
    return {**out, **rest}


def arguments(tensors: Tensors, config: dict) -> dict:
    """The arguments of STDiT in which diffusers differs from DiT, and those that its config.json gives."""
    found: dict = {"frequency_shift": 1.0, "norm2_eps": config.get("norm_eps", 1e-5)}
    if "num_attention_heads" in config:
        found["num_heads"] = config["num_attention_heads"]
    if "sample_size" in config:
        found["sample_size"] = (1, config["sample_size"], config["sample_size"])
    return found


def config_of(model: STDiT) -> dict:
    """The arguments of `DiTTransformer2DModel` for an STDiT."""
    config = model.config
    return {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels,
        "out_channels": model.out_channels,
        "num_layers": config.depth,
        "sample_size": config.sample_size[1],
        "patch_size": model.patch_size[1],
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": config.norm2_eps,
    }


def _move(source: Tensors, target: Tensors, key: str, name: str) -> None:
    if key in source:
        target[name] = source.pop(key)

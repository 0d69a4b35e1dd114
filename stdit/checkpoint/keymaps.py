"""What other people's weights are called, and what their configuration must have been.

A format is two steps: its names to DiT's (`to_dit`) and what differs from DiT in meaning (`arguments`, `adapt`).
DiT's names are ours, but that its patch embedding is a convolution and that its position table is stored.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from stdit.checkpoint import diffusers_dit, diffusers_latte, mdt, uvit
from stdit.model.config import SIZES
from stdit.model.stdit import STDiT
from stdit.nn.positions import latte_pos_embed, spatial_pos_embed

Tensors = dict[str, Tensor]
HEADS = {width: heads for _, width, heads in SIZES.values()}


def same(tensors: Tensors) -> Tensors:
    return dict(tensors)


@dataclass(frozen=True)
class Format:
    """How one family's weights become ours and go back."""

    name: str
    objective: str
    to_dit: Callable[[Tensors], Tensors] = same
    from_dit: Callable[[Tensors], Tensors] = same
    arguments: Callable[[Tensors, dict], dict] = lambda tensors, config: {}
    adapt: Callable[[Tensors, dict], Tensors] = lambda tensors, arguments: tensors
    restore: Callable[[Tensors, STDiT], Tensors] = lambda tensors, model: tensors
    betas: str = "linear"  # of DDPM, in training
    needs: Callable[[STDiT], str] = lambda model: ""  # why a model cannot be written so, or nothing


def infer(tensors: Tensors, given: dict) -> dict:
    """The arguments of STDiT that DiT-named tensors tell; ValueError naming what they cannot."""
    patch = tensors["x_embedder.proj.weight"]
    width, channels, size = patch.shape[0], patch.shape[1], patch.shape[-1]
    heads = given.get("num_heads", HEADS.get(width))
    if heads is None:
        raise ValueError(
            f"the weights are {width} wide, which is none of {sorted(HEADS)}, so the number of heads cannot be told; "
            "give it with --set num_heads=N."
        )
    table = tensors.get("y_embedder.embedding_table.weight")
    features = tensors["final_layer.linear.weight"].shape[0]
    grid = round(tensors["pos_embed"].shape[1] ** 0.5) if "pos_embed" in tensors else 32 // size
    return {
        "depth": 1 + max(int(key.split(".")[1]) for key in tensors if re.match(r"blocks\.\d+\.", key)),
        "hidden_size": width,
        "num_heads": heads,
        "patch_size": (1, size, size),
        "in_channels": channels,
        "num_classes": 0 if table is None else len(table) - 1,
        "sample_size": (1, grid * size, grid * size),
        "axes": ["spatial"],
        "mlp_ratio": tensors["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "learn_sigma": features == 2 * channels * size * size,
    }


def table_matches(tensors: Tensors, key: str, ours: Callable[[int, int], Tensor]) -> None:
    """Take a stored table out; ValueError if it is not the one we compute."""
    table = tensors.pop(key, None)
    if table is None:
        return
    expected = ours(table.shape[1], table.shape[2])
    if expected.shape != table.shape[1:] or (expected - table[0].float()).abs().max() > 1e-4:
        raise ValueError(f"{key!r} is not the sin-cos table these weights are made with; learned tables are not known.")


def square_positions(count: int, dim: int) -> Tensor:
    side = round(count**0.5)
    return spatial_pos_embed(side, side, dim)


def strip(tensors: Tensors) -> Tensors:
    """DiT's tensors as ours: tables out, the convolution as a product."""
    tensors = dict(tensors)
    table_matches(tensors, "pos_embed", square_positions)
    table_matches(tensors, "temp_embed", latte_pos_embed)
    tensors["x_embedder.proj.weight"] = tensors["x_embedder.proj.weight"].flatten(1)
    return tensors


def dress(tensors: Tensors, model: STDiT) -> Tensors:
    """The way back: ours as DiT's."""
    tensors, (_, ph, pw) = dict(tensors), model.patch_size
    weight = tensors["x_embedder.proj.weight"]
    tensors["x_embedder.proj.weight"] = weight.unflatten(1, (model.in_channels, ph, pw))
    _, height, width = model.config.sample_size
    tensors["pos_embed"] = spatial_pos_embed(height // ph, width // pw, weight.shape[0])[None].clone()
    return tensors


def head_rows(tensors: Tensors, change: Callable[[Tensor], Tensor]) -> Tensors:
    """Change the last layer's weight and bias, seen as (patch, channels, ...)."""
    return {
        **tensors,
        **{f"final_layer.linear.{k}": change(tensors[f"final_layer.linear.{k}"]) for k in ("weight", "bias")},
    }


def _sit_arguments(tensors: Tensors, config: dict) -> dict:
    return {"timestep_scale": 1e-3, "timestep_reversed": True, "learn_sigma": False}


def _sit_adapt(tensors: Tensors, arguments: dict) -> Tensors:
    """Drop the unused half of the channels and turn the velocity around: ours is noise - data, SiT's data - noise."""
    channels, patch = arguments["in_channels"], arguments["patch_size"][1] ** 2
    return head_rows(tensors, lambda x: -x.unflatten(0, (patch, -1))[:, :channels].flatten(0, 1))


def _sit_restore(tensors: Tensors, model: STDiT) -> Tensors:
    """The sign back, and the variance rows that SiT's code makes and throws away, as zeros."""

    def rows(x: Tensor) -> Tensor:
        velocity = -x.unflatten(0, (-1, model.in_channels))
        return torch.cat([velocity, torch.zeros_like(velocity)], dim=1).flatten(0, 1)

    return head_rows(tensors, rows)


def _latte_arguments(tensors: Tensors, config: dict) -> dict:
    frames = tensors["temp_embed"].shape[1] if "temp_embed" in tensors else 16
    _, height, width = infer(tensors, {"num_heads": 1})["sample_size"]
    return {"axes": ["spatial", "temporal"], "position_encoding": "latte", "sample_size": (frames, height, width)}


def _latte_restore(tensors: Tensors, model: STDiT) -> Tensors:
    frames, width = model.config.sample_size[0], model.config.hidden_size
    return {**tensors, "temp_embed": latte_pos_embed(frames, width)[None].clone()}


def _is(model: STDiT, classes: bool = True, **wanted) -> str:
    """What keeps a model from being one of these settings, or nothing."""
    values = {**dict(model.config), "axes": list(model.config.axes), "caption_axes": list(model.config.caption_axes)}
    other = [f"{key}={values[key]!r} (not {value!r})" for key, value in wanted.items() if values[key] != value]
    if model.patch_size[0] != 1 or model.patch_size[1] != model.patch_size[2]:
        other.append(f"patch_size={list(model.patch_size)} (not square in space, 1 in time)")
    if model.config.sample_size[1] != model.config.sample_size[2]:
        other.append(f"sample_size={list(model.config.sample_size)} (not square)")
    if classes and not model.num_classes:
        other.append("num_classes=0 (there is always a class table)")
    if model.config.depth % len(wanted["axes"]):
        other.append(f"depth={model.config.depth} (not whole pairs)")
    return ", ".join(other)


# What none of DiT's kin has: another conditioning, another trunk.
_WIRED = {
    "conditioning": "adaln_zero", "caption_channels": None, "trunk": "stack", "learned_pos_embed": False, "timestep_mlp": True,
    "output_conv": False, "gelu": "tanh", "relative_position_bias": False,
}  # fmt: skip
_PLAIN = {**_WIRED, "qk_norm": False, "frequency_shift": 0.0, "norm2_eps": 1e-6}
_DIT_CLOCK = {"timestep_scale": 1.0, "timestep_reversed": False, "timestep_offset": 0.0}

FORMATS = {
    "dit": Format(
        "dit", "ddpm", needs=lambda m: _is(m, axes=["spatial"], learn_sigma=True, **_PLAIN, **_DIT_CLOCK)
    ),
    "sit": Format(
        "sit", "flow", arguments=_sit_arguments, adapt=_sit_adapt,
        restore=_sit_restore,
        needs=lambda m: _is(m, axes=["spatial"], learn_sigma=False, timestep_scale=1e-3, timestep_reversed=True, **_PLAIN),
    ),
    "latte": Format(
        "latte", "ddpm", arguments=_latte_arguments, restore=_latte_restore,
        needs=lambda m: _is(m, False, axes=["spatial", "temporal"], position_encoding="latte", **_PLAIN, **_DIT_CLOCK),
    ),
    "diffusers": Format(
        "diffusers", "ddpm", diffusers_dit.to_dit, diffusers_dit.from_dit, diffusers_dit.arguments,
        needs=lambda m: _is(m, axes=["spatial"], qk_norm=False, mlp_ratio=4.0, frequency_shift=1.0, **_WIRED, **_DIT_CLOCK),
    ),
    "diffusers_latte": Format(
        "diffusers_latte", "ddpm", diffusers_latte.to_dit, diffusers_latte.from_dit, diffusers_latte.arguments,
        needs=lambda m: _is(
            m, False, qk_norm=False, mlp_ratio=4.0, num_classes=0,
            **{**_WIRED, **_DIT_CLOCK, **diffusers_latte.WIRED, "caption_channels": m.config.caption_channels},
        ),
    ),
    "uvit": Format(
        "uvit", "ddpm", uvit.to_dit, uvit.from_dit, uvit.arguments, betas="scaled_linear",
        needs=lambda m: _is(m, False, axes=["spatial"], learn_sigma=False, **{**_PLAIN, **_DIT_CLOCK, **uvit.WIRED, "output_conv": m.config.output_conv}),
    ),
    "mdt": Format(
        "mdt", "ddpm", mdt.to_dit, mdt.from_dit, mdt.arguments, restore=mdt.restore,
        needs=lambda m: _is(m, axes=["spatial"], learn_sigma=True, **{**_PLAIN, **_DIT_CLOCK, **mdt.WIRED}),
    ),
}  # fmt: skip


def recognise(names: Iterable[str]) -> str | None:
    """The format that tensors of these names most likely are, or None."""
    names = set(names)
    if "transformer_blocks.0.norm1.linear.weight" in names:
        return "diffusers"
    if "temporal_transformer_blocks.0.scale_shift_table" in names:
        return "diffusers_latte"
    if "decoder_pred.weight" in names and any(name.startswith("mid_block.") for name in names):
        return "uvit"
    if "decoder_pos_embed" in names and any(name.startswith("sideblocks.") for name in names):
        return "mdt"
    if "temp_embed" in names:
        return "latte"
    return "dit" if {"x_embedder.proj.weight", "blocks.0.attn.qkv.weight"} <= names else None

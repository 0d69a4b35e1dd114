"""Key maps of published weights, and the configuration that each format implies.

A format renames its parameters to DiT's (`to_dit`) and states where their meaning differs (`arguments`, `adapt`).
STDiT has DiT's names, except that DiT's patch embedding is a convolution and that DiT stores its position table.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stdit.checkpoint import diffusers_dit, diffusers_latte, mdt, uvit
from stdit.model.config import SIZES
from stdit.model.stdit import STDiT
from stdit.nn.positions import latte_pos_embed, spatial_pos_embed

Tensors = dict[str, Tensor]
HEADS = {width: heads for _, width, heads in SIZES.values()}


def identity(tensors: Tensors) -> Tensors:
    """Return the tensors unchanged."""
    return dict(tensors)


@dataclass(frozen=True)
class Format:
    """How the weights of one family are converted to STDiT and back.

    objective: what its models predict. to_dit, from_dit: rename to DiT's names and back. arguments: from DiT-named
    tensors and config.json, arguments of the model. adapt, restore: change tensors where their meaning differs, and
    back. betas: the DDPM noise schedule of training. mismatch: why a model cannot be written in this format, or "".
    """

    name: str
    objective: str
    to_dit: Callable[[Tensors], Tensors] = identity
    from_dit: Callable[[Tensors], Tensors] = identity
    arguments: Callable[[Tensors, dict], dict] = lambda tensors, config: {}
    adapt: Callable[[Tensors, dict], Tensors] = lambda tensors, arguments: tensors
    restore: Callable[[Tensors, STDiT], Tensors] = lambda tensors, model: tensors
    betas: str = "linear"
    mismatch: Callable[[STDiT], str] = lambda model: ""


def infer(tensors: Tensors, settings: dict) -> dict:
    """Infer the arguments of STDiT from DiT-named tensors; ValueError if the number of heads is unknown."""
    patch = tensors["x_embedder.proj.weight"]
    width, channels, size = patch.shape[0], patch.shape[1], patch.shape[-1]
    heads = settings.get("num_heads", HEADS.get(width))
    if heads is None:
        raise ValueError(
            f"the weights are {width} wide, not one of {sorted(HEADS)}, so the number of heads cannot be inferred; "
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


def pop_sincos_table(tensors: Tensors, key: str, make_table: Callable[[int, int], Tensor]) -> None:
    """Remove a stored table; ValueError unless it is the one that STDiT computes with `make_table(count, dim)`."""
    table = tensors.pop(key, None)
    if table is None:
        return
    expected = make_table(table.shape[1], table.shape[2])
    if expected.shape != table.shape[1:] or (expected - table[0].float()).abs().max() > _rounding(table):
        raise ValueError(
            f"{key!r} is not the sin-cos table of this format; learned tables are not supported here, convert weights without one."
        )


def _rounding(table: Tensor) -> float:
    """How far the numbers of a table, at most 1, may be from exact ones: more if weights of half precision hold it."""
    for dtype in (torch.bfloat16, torch.float16):  # float32 by now, but with numbers of the shorter type alone
        if torch.equal(table.to(dtype).to(table.dtype), table):
            return torch.finfo(dtype).eps
    return 1e-4


def square_pos_embed(count: int, dim: int) -> Tensor:
    """The sin-cos table (count, dim) of a square grid."""
    side = round(count**0.5)
    return spatial_pos_embed(side, side, dim)


def from_dit_layout(tensors: Tensors) -> Tensors:
    """Convert DiT's tensors to STDiT's: drop the sin-cos tables, and make the patch embedding a matrix."""
    tensors = dict(tensors)
    pop_sincos_table(tensors, "pos_embed", square_pos_embed)
    pop_sincos_table(tensors, "temp_embed", latte_pos_embed)
    tensors["x_embedder.proj.weight"] = tensors["x_embedder.proj.weight"].flatten(1)
    return tensors


def to_dit_layout(tensors: Tensors, model: STDiT) -> Tensors:
    """Convert STDiT's tensors to DiT's, the inverse of `from_dit_layout`."""
    tensors, (_, ph, pw) = dict(tensors), model.patch_size
    weight = tensors["x_embedder.proj.weight"]
    tensors["x_embedder.proj.weight"] = weight.unflatten(1, (model.in_channels, ph, pw))
    _, height, width = model.config.sample_size
    tensors["pos_embed"] = spatial_pos_embed(height // ph, width // pw, weight.shape[0])[None].clone()
    return tensors


def map_head(tensors: Tensors, change: Callable[[Tensor], Tensor]) -> Tensors:
    """Apply `change` to the last layer's weight and bias, whose rows are (patch, channels)."""
    return {
        **tensors,
        **{f"final_layer.linear.{k}": change(tensors[f"final_layer.linear.{k}"]) for k in ("weight", "bias")},
    }


def _sit_arguments(tensors: Tensors, config: dict) -> dict:
    """SiT's times run from 0 (noise) to 1 (data)."""
    return {"timestep_scale": 1e-3, "timestep_reversed": True, "learn_sigma": False}


def _sit_adapt(tensors: Tensors, arguments: dict) -> Tensors:
    """Drop the unused half of the channels and negate the velocity: STDiT predicts noise - data, SiT data - noise."""
    channels, patch = arguments["in_channels"], arguments["patch_size"][1] ** 2
    return map_head(tensors, lambda x: -x.unflatten(0, (patch, -1))[:, :channels].flatten(0, 1))


def _sit_restore(tensors: Tensors, model: STDiT) -> Tensors:
    """Negate the velocity again, and add as zeros the variance rows that SiT's code computes and discards."""

    def rows(x: Tensor) -> Tensor:
        velocity = -x.unflatten(0, (-1, model.in_channels))
        return torch.cat([velocity, torch.zeros_like(velocity)], dim=1).flatten(0, 1)

    return map_head(tensors, rows)


def _latte_arguments(tensors: Tensors, config: dict) -> dict:
    """Latte alternates spatial and temporal blocks."""
    frames = tensors["temp_embed"].shape[1] if "temp_embed" in tensors else 16
    _, height, width = infer(tensors, {"num_heads": 1})["sample_size"]
    return {"axes": ["spatial", "temporal"], "position_encoding": "latte", "sample_size": (frames, height, width)}


def _latte_restore(tensors: Tensors, model: STDiT) -> Tensors:
    """Add the temporal table that Latte stores."""
    frames, width = model.config.sample_size[0], model.config.hidden_size
    return {**tensors, "temp_embed": latte_pos_embed(frames, width)[None].clone()}


def _mismatch(model: STDiT, needs_classes: bool = True, **required: Any) -> str:
    """Describe the settings in which a model differs from what a format requires; "" if there are none."""
    values = {**dict(model.config), "axes": list(model.config.axes), "caption_axes": list(model.config.caption_axes)}
    differing = [f"{key}={values[key]!r} (not {value!r})" for key, value in required.items() if values[key] != value]
    if model.patch_size[0] != 1 or model.patch_size[1] != model.patch_size[2]:
        differing.append(f"patch_size={list(model.patch_size)} (not square in space, 1 in time)")
    if model.config.sample_size[1] != model.config.sample_size[2]:
        differing.append(f"sample_size={list(model.config.sample_size)} (not square)")
    if needs_classes and not model.num_classes:
        differing.append("num_classes=0 (the format always has a class table)")
    if model.config.depth % len(required["axes"]):
        differing.append(f"depth={model.config.depth} (not a multiple of {len(required['axes'])})")
    return ", ".join(differing)


# The architecture that DiT, SiT, Latte and diffusers' DiT have in common.
_DIT_CONFIG: dict[str, Any] = {
    "conditioning": "adaln_zero", "caption_channels": None, "trunk": "stack", "learned_pos_embed": False, "timestep_mlp": True,
    "output_conv": False, "activation": "gelu_tanh", "relative_position_bias": False,
}  # fmt: skip
_DIT_NUMERICS: dict[str, Any] = {**_DIT_CONFIG, "qk_norm": False, "frequency_shift": 0.0, "norm2_eps": 1e-6}
_DIT_TIMESTEPS: dict[str, Any] = {"timestep_scale": 1.0, "timestep_reversed": False, "timestep_offset": 0.0}

FORMATS = {
    "dit": Format(
        "dit", "ddpm",
        mismatch=lambda m: _mismatch(m, axes=["spatial"], learn_sigma=True, **_DIT_NUMERICS, **_DIT_TIMESTEPS),
    ),
    "sit": Format(
        "sit", "flow", arguments=_sit_arguments, adapt=_sit_adapt, restore=_sit_restore,
        mismatch=lambda m: _mismatch(
            m, axes=["spatial"], learn_sigma=False, timestep_scale=1e-3, timestep_reversed=True, **_DIT_NUMERICS
        ),
    ),
    "latte": Format(
        "latte", "ddpm", arguments=_latte_arguments, restore=_latte_restore,
        mismatch=lambda m: _mismatch(
            m, needs_classes=False, axes=["spatial", "temporal"], position_encoding="latte", **_DIT_NUMERICS, **_DIT_TIMESTEPS
        ),
    ),
    "diffusers": Format(
        "diffusers", "ddpm", to_dit=diffusers_dit.to_dit, from_dit=diffusers_dit.from_dit, arguments=diffusers_dit.arguments,
        mismatch=lambda m: _mismatch(
            m, axes=["spatial"], qk_norm=False, mlp_ratio=4.0, frequency_shift=1.0, **_DIT_CONFIG, **_DIT_TIMESTEPS
        ),
    ),
    "diffusers_latte": Format(
        "diffusers_latte", "ddpm",
        to_dit=diffusers_latte.to_dit, from_dit=diffusers_latte.from_dit, arguments=diffusers_latte.arguments,
        mismatch=lambda m: _mismatch(
            m, needs_classes=False, qk_norm=False, mlp_ratio=4.0, num_classes=0,
            **{**_DIT_CONFIG, **_DIT_TIMESTEPS, **diffusers_latte.FIXED_CONFIG, "caption_channels": m.config.caption_channels},
        ),
    ),
    "uvit": Format(
        "uvit", "ddpm", to_dit=uvit.to_dit, from_dit=uvit.from_dit, arguments=uvit.arguments, betas="scaled_linear",
        mismatch=lambda m: _mismatch(
            m, needs_classes=False, axes=["spatial"], learn_sigma=False,
            **{**_DIT_NUMERICS, **_DIT_TIMESTEPS, **uvit.FIXED_CONFIG, "output_conv": m.config.output_conv},
        ),
    ),
    "mdt": Format(
        "mdt", "ddpm", to_dit=mdt.to_dit, from_dit=mdt.from_dit, arguments=mdt.arguments, restore=mdt.restore,
        mismatch=lambda m: _mismatch(
            m, axes=["spatial"], learn_sigma=True, **{**_DIT_NUMERICS, **_DIT_TIMESTEPS, **mdt.FIXED_CONFIG}
        ),
    ),
}  # fmt: skip


def recognise(names: Iterable[str]) -> str | None:
    """Guess the format of tensors from their names; None if no format fits."""
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

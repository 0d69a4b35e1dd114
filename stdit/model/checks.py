"""Argument validation for STDiT, before anything is built."""

from collections.abc import Mapping, Sequence
from typing import Any

from stdit.conditions import check_extra_conditions
from stdit.labels import check_names
from stdit.model.capabilities import check_trunk_options
from stdit.model.trunks import TRUNKS
from stdit.nn.conditioning import CONDITIONINGS
from stdit.nn.layout import AXES
from stdit.nn.mlp import ACTIVATIONS
from stdit.variants import pick

POS_SCALINGS = ("none", "interpolate")
LARGEST_DEPTH = 10_000  # blocks; published models have fewer than 100


def check_arguments(config: Any, defaults: Mapping[str, object]) -> None:
    """Raise ValueError for constructor arguments of STDiT that are invalid or do not go together.

    config: the arguments, by attribute and by key (a diffusers config); defaults: those of the constructor.
    """
    check_shape(config.depth, config.hidden_size, config.num_heads, config.patch_size)
    check_classes(config.num_classes, config.class_names)
    check_axes(config.axes)
    check_axes(config.caption_axes, "caption_axes", may_be_empty=True)
    if config.label_std < 0:
        raise ValueError(f"label_std must be >= 0, got {config.label_std}; DiT's is 0.02.")
    check_choice("pos_scaling", config.pos_scaling, POS_SCALINGS)
    check_choice("activation", config.activation, tuple(ACTIVATIONS))
    check_causal(
        config.position_encoding,
        config.axes,
        config.patch_size,
        config.sample_size[0],
        causal=config.causal,
        window=config.window,
        sink=config.sink,
    )
    check_conditioning(config.conditioning, config.caption_channels, config.causal, config.relative_position_bias)
    pick(TRUNKS, config.trunk, "trunk")
    check_extra_conditions(config.extra_conditions or {})
    check_trunk_options(config.trunk, dict(config), defaults)


def check_shape(depth: int, hidden_size: int, num_heads: int, patch_size: Sequence[int]) -> None:
    """Raise ValueError for sizes from which no transformer can be built."""
    if not 1 <= depth <= LARGEST_DEPTH:
        raise ValueError(f"depth must be >= 1 and at most {LARGEST_DEPTH}, got {depth}; it is the number of blocks.")
    if num_heads < 1 or hidden_size < 1:
        raise ValueError(f"hidden_size and num_heads must be >= 1, got {hidden_size} and {num_heads}; use 384 and 6.")
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size={hidden_size} is not a multiple of num_heads={num_heads}; change one of them.")
    if hidden_size % 4:
        raise ValueError(f"hidden_size={hidden_size} is not a multiple of 4, which sin-cos positions in x and y need.")
    if len(patch_size) != 3 or min(patch_size) < 1:
        raise ValueError(f"patch_size={list(patch_size)} is not (time, height, width), each >= 1. Use [1, 2, 2].")


def check_classes(num_classes: int, class_names: Sequence[str] | None) -> None:
    """Raise ValueError for a negative number of classes, or for class names that are not one per class."""
    if num_classes < 0:
        raise ValueError(f"num_classes must be >= 0, got {num_classes}; 0 makes an unconditional model.")
    check_names(class_names)
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(
            f"{len(class_names)} class_names for num_classes={num_classes}; give one name per class, or none."
        )


def check_axes(axes: Sequence[str], name: str = "axes", may_be_empty: bool = False) -> None:
    """Raise ValueError for an unknown axis of attention."""
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown or not (axes or may_be_empty):
        reason = f"{unknown} is unknown" if unknown else "the list is empty"
        raise ValueError(f"{name}={list(axes)}: {reason}. Choose from: {', '.join(AXES)}.")


def check_causal(
    position_encoding: str,
    axes: Sequence[str],
    patch_size: Sequence[int],
    train_frames: int,
    *,
    causal: bool,
    window: int | None,
    sink: int,
) -> None:
    """Raise ValueError for a causal model that cannot run with a key-value cache.

    train_frames: latent frames of its training clips.
    """
    if window is not None and (window < 2 or not causal):
        raise ValueError(
            f"window={window} with causal={causal}: a window is 2 latent frames or more, and needs causal=true."
        )
    if sink < 0 or (sink and (window is None or sink + window > train_frames)):
        raise ValueError(
            f"sink={sink} with window={window} and {train_frames} latent frames in sample_size: sink frames are "
            "attended to in addition to a window, which is learnt only from clips that contain both; set a window, and "
            "train on sink + window latent frames or more."
        )
    rotary = position_encoding in ("rope", "rope_3d")  # a table added to the tokens would run out as the clip grows
    if causal and (not rotary or patch_size[0] != 1 or set(axes) == {"spatial"}):
        raise ValueError(
            f"causal=true with position_encoding={position_encoding!r}, axes={list(axes)} and "
            f"patch_size={list(patch_size)}: a causal model needs position_encoding='rope' or 'rope_3d', patches of one "
            "frame, and joint or temporal attention."
        )


def check_conditioning(
    conditioning: str, caption_channels: int | None, causal: bool, relative_position_bias: bool
) -> None:
    """Raise ValueError for a conditioning that is unknown or conflicts with the other choices."""
    kind = pick(CONDITIONINGS, conditioning, "conditioning")
    if caption_channels is not None and caption_channels < 1:
        raise ValueError(
            f"caption_channels must be >= 1 or null, got {caption_channels}: the width of a text encoder's tokens."
        )
    if kind.in_context and caption_channels and causal:
        raise ValueError(
            "conditioning='in_context' repeats a caption in every frame, which a causal model's cache does not "
            "support; use conditioning='cross_attention' or 'adaln_zero'."
        )
    if relative_position_bias and (causal or kind.in_context):
        raise ValueError(
            f"relative_position_bias=true with causal={causal} and conditioning={conditioning!r}: the bias needs "
            "whole clips and only patches; use causal=false and adaln_zero, or relative_position_bias=false."
        )


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError, which names the nearest choice, for a value that is not among the choices."""
    pick(dict.fromkeys(choices), value, name)

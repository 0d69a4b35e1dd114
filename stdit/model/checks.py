"""Argument validation for STDiT, before anything is built."""

from collections.abc import Sequence

from stdit.nn.conditioning import CONDITIONINGS
from stdit.nn.layout import AXES
from stdit.variants import pick


def check_shape(depth: int, hidden_size: int, num_heads: int, patch_size: Sequence[int]) -> None:
    """Raise ValueError for sizes that make no transformer."""
    if depth < 1:
        raise ValueError(f"depth must be >= 1, got {depth}; a model has at least one block.")
    if num_heads < 1 or hidden_size < 1:
        raise ValueError(f"hidden_size and num_heads must be >= 1, got {hidden_size} and {num_heads}.")
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size={hidden_size} is not a multiple of num_heads={num_heads}; change one of them.")
    if hidden_size % 4:
        raise ValueError(f"hidden_size={hidden_size} is not a multiple of 4, which sin-cos positions in x and y need.")
    if len(patch_size) != 3 or min(patch_size) < 1:
        raise ValueError(f"patch_size={list(patch_size)} is not (time, height, width), each >= 1. Use [1, 2, 2].")


def check_classes(num_classes: int, class_names: Sequence[str] | None) -> None:
    """Raise ValueError for a negative number of classes, or names that are not one per class."""
    if num_classes < 0:
        raise ValueError(f"num_classes must be >= 0, got {num_classes}; 0 makes an unconditional model.")
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(
            f"{len(class_names)} class_names for num_classes={num_classes}; give one name per class, or none."
        )


def check_axes(axes: Sequence[str], name: str = "axes", may_be_empty: bool = False) -> None:
    """Raise ValueError for an unknown axis of attention."""
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown or not (axes or may_be_empty):
        raise ValueError(
            f"{name}={list(axes)}: {unknown or 'an empty list'} is unknown. Choose from: {', '.join(AXES)}."
        )


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
    """Raise ValueError for a causal model that a cache could not serve; train_frames: latent frames of its training clips."""
    if window is not None and (window < 2 or not causal):
        raise ValueError(
            f"window={window} with causal={causal}: a window is 2 latent frames or more, of a causal model."
        )
    if sink < 0 or (sink and (window is None or sink + window > train_frames)):
        raise ValueError(
            f"sink={sink} with window={window} and sample_size of {train_frames} latent frames: sink frames are attended to "
            "beside a window, learnt where clips hold both; set a window, and train on sink + window latent frames or more."
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
    """Raise ValueError for a way of conditioning that is unknown or does not go with the other choices."""
    kind = pick(CONDITIONINGS, conditioning, "conditioning")
    if caption_channels is not None and caption_channels < 1:
        raise ValueError(
            f"caption_channels must be >= 1 or null, got {caption_channels}: the width of a text encoder's tokens."
        )
    if kind.in_context and caption_channels and causal:
        raise ValueError(
            "conditioning='in_context' repeats a caption in every frame, which a causal model's cache does not hold; use "
            "conditioning='cross_attention' or 'adaln_zero'."
        )
    if relative_position_bias and (causal or kind.in_context):
        raise ValueError(
            f"relative_position_bias=true with causal={causal} and conditioning={conditioning!r}: it is for patches of whole "
            "clips alone; use causal=false and adaln_zero, or relative_position_bias=false."
        )


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError for a value that is not among the choices, naming the nearest."""
    pick(dict.fromkeys(choices), value, name)

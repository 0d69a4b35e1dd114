"""What makes no model, said before it is built."""

from collections.abc import Sequence

from stdit.nn.conditioning import CONDITIONINGS
from stdit.nn.layout import AXES
from stdit.variants import pick


def check_shape(depth, hidden_size, num_heads, patch_size, axes, num_classes, class_names) -> None:
    if depth < 1 or num_classes < 0:
        raise ValueError(
            f"depth={depth} and num_classes={num_classes}: a model has at least one block and no fewer than 0 classes."
        )
    if num_heads < 1 or hidden_size < 1:
        raise ValueError(f"hidden_size={hidden_size} and num_heads={num_heads}: both are 1 or more.")
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size={hidden_size} is not a multiple of num_heads={num_heads}; change one of them.")
    if hidden_size % 4:
        raise ValueError(f"hidden_size={hidden_size} is not a multiple of 4, which sin-cos positions in x and y need.")
    if len(patch_size) != 3 or min(patch_size) < 1:
        raise ValueError(f"patch_size={list(patch_size)} is not (time, height, width), each 1 or more. Use [1, 2, 2].")
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown or not axes:
        raise ValueError(f"axes={list(axes)}: {unknown or 'an empty list'} is unknown. Choose from: {', '.join(AXES)}.")
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(
            f"{len(class_names)} class_names for num_classes={num_classes}; give one name a class, or none."
        )


def check_pos_scaling(pos_scaling: str) -> None:
    pick({"none": None, "interpolate": None}, pos_scaling, "pos_scaling")


def check_causal(
    causal: bool, window: int | None, sink: int, position_encoding: str, axes: Sequence[str], patch_size, frames: int
) -> None:
    """frames: latent frames of what it is trained on."""
    if window is not None and (window < 2 or not causal):
        raise ValueError(f"window={window} with causal={causal}: a window is 2 frames or more, of a causal model.")
    if sink < 0 or (sink and (window is None or sink + window > frames)):
        raise ValueError(
            f"sink={sink} with window={window} and sample_size of {frames} latent frames: the first frames that are seen "
            "beside a window, learnt where clips hold both; set a window, and train on sink + window latent frames or more."
        )
    if causal and (position_encoding not in ("rope", "rope_3d") or patch_size[0] != 1 or set(axes) == {"spatial"}):
        raise ValueError(
            f"causal=true with position_encoding={position_encoding!r}, axes={list(axes)} and patch_size={list(patch_size)}: a causal "
            "model needs position_encoding='rope' or 'rope_3d', patches of one frame, and joint or temporal attention."
        )


def check_conditioning(
    conditioning: str, caption_channels: int | None, causal: bool, relative_position_bias: bool
) -> None:
    """ValueError for a way of conditioning that is unknown or cannot do what is asked of it."""
    how = pick(CONDITIONINGS, conditioning, "conditioning")
    if caption_channels is not None and caption_channels < 1:
        raise ValueError(
            f"caption_channels={caption_channels}: the width of a text encoder's tokens, 1 or more, or null."
        )
    if how.joins and caption_channels and causal:
        raise ValueError(
            "conditioning='in_context' repeats a caption in every frame, which a causal model's cache does not hold; use "
            "conditioning='cross_attention' or 'adaln_zero'."
        )
    if relative_position_bias and (causal or how.joins):
        raise ValueError(
            f"relative_position_bias=true with causal={causal} and conditioning={conditioning!r}: it is for patches of whole clips alone; "
            "use causal=false and adaln_zero, or relative_position_bias=false."
        )

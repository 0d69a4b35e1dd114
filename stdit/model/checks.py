"""What makes no model, said before it is built."""

from collections.abc import Sequence

from stdit.model.trunks import TRUNKS
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


def check_causal(causal: bool, window: int | None, time_entry: str, axes: Sequence[str], patch_size) -> None:
    if window is not None and (window < 2 or not causal):
        raise ValueError(f"window={window} with causal={causal}: a window is 2 frames or more, of a causal model.")
    if causal and (time_entry not in ("rotary", "rotary_3d") or patch_size[0] != 1 or set(axes) == {"spatial"}):
        raise ValueError(
            f"causal=true with time_entry={time_entry!r}, axes={list(axes)} and patch_size={list(patch_size)}: a causal "
            "model needs time_entry='rotary' or 'rotary_3d', patches of one frame, and joint or temporal attention."
        )


def check_conditioning(conditioning: str, caption_channels: int | None, causal: bool) -> None:
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


def check_trunk(
    trunk: str, depth: int, decode_depth: int, conditioning: str, causal: bool, time_entry: str, place_bias: bool
) -> None:
    """ValueError for a wiring that is unknown, or whose depth or company does not fit."""
    if pick(TRUNKS, trunk, "trunk").u and (depth < 3 or CONDITIONINGS[conditioning].joins):
        raise ValueError(
            f"trunk='u_shape' with depth={depth} and conditioning={conditioning!r}: it takes 3 blocks or more, and patches "
            "alone; use depth=3 and conditioning='time_attention' (DiffiT) or 'adaln_zero'."
        )
    if not TRUNKS[trunk].masked:
        if place_bias and (causal or CONDITIONINGS[conditioning].joins):
            raise ValueError("place_bias=true is for patches alone; use it without causal=true and in_context.")
        return
    if decode_depth < 1 or depth <= decode_depth or (depth - decode_depth) % 2:
        raise ValueError(
            f"trunk='masked' with depth={depth} and decode_depth={decode_depth}: the encoder is two halves, so use a "
            f"depth of decode_depth and an even number more, such as depth={decode_depth + 2}."
        )
    if causal or CONDITIONINGS[conditioning].joins or time_entry.endswith("3d"):
        raise ValueError(
            f"trunk='masked' hides patches, which conditioning={conditioning!r}, causal={causal} and "
            f"time_entry={time_entry!r} do not take; use adaln_zero, causal=false and time_entry='attention'."
        )


def check_joint(
    trunk: str,
    depth: int,
    single_depth: int,
    conditioning: str,
    causal: bool,
    axes: Sequence[str],
    caption_channels: int | None,
) -> None:
    """ValueError for dual and single streams in company they do not take, or without a text."""
    if trunk != "joint":
        if single_depth:
            raise ValueError(f"single_depth={single_depth} belongs to trunk='joint'; leave it out.")
        return
    if not caption_channels:
        raise ValueError(
            "trunk='joint' has a stream of text: name a text encoder (text.encoder=words), or use trunk='stack'."
        )
    if not 0 <= single_depth <= depth:
        raise ValueError(f"single_depth={single_depth} of depth={depth}: use 0 to {depth}.")
    if causal or conditioning != "adaln_zero" or set(axes) != {"joint"}:
        raise ValueError(
            f"trunk='joint' with conditioning={conditioning!r}, causal={causal} and axes={list(axes)}: its blocks have "
            "adaln_zero and attention over all tokens; use conditioning=adaln_zero, causal=false, axes=[joint]."
        )

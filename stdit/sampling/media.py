"""Pictures and clips as callers have them (PIL images, arrays, tensors, lists of these), as pixels (B, 3, F, H, W)."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stdit.data.pictures import BLACK, upright
from stdit.pixels import to_float

Kind = Literal["clip", "image", "either"]
_TAKEN = (
    "give PIL images, lists of them, arrays (F, H, W, 3) of uint8 or of floats in [0, 1], or tensors (B, 3, F, H, W) of floats "
    "in [-1, 1]"
)


def as_clips(given: Any, name: str, kind: Kind = "clip") -> Tensor:
    """Convert a caller's clip, clips or image to pixels (B, 3, F, H, W) in [-1, 1]; those of stdit are unchanged.

    given: what has one picture is one frame; a list of pictures is a clip, a list of clips a batch. Arrays (F, H, W, 3),
    (B, F, H, W, 3) or (H, W, 3) are uint8 or floats in [0, 1]; tensors (B, 3, F, H, W), (3, F, H, W) or (3, H, W) floats in
    [-1, 1], and tensors (B, F, 3, H, W) or (F, 3, H, W), as diffusers gives them, floats in [0, 1]. Half precision is widened
    to float32. kind: "image": several
    pictures are a batch of images, not a clip; "either": of tensors only. name: of the argument, for messages. Raises
    ValueError for anything else.
    """
    clips = _converted(given, name, kind)
    check_clip(clips, name)
    return clips.float() if clips.element_size() < 4 else clips


def check_clip(clip: Tensor, name: str) -> None:
    """Raise ValueError unless a clip is (B, 3, F, H, W) of floats in [-1, 1]."""
    if clip.ndim != 5 or clip.shape[1] != 3 or not clip.is_floating_point() or not clip.shape[2]:
        raise ValueError(
            f"{name} is {clip.dtype} of shape {tuple(clip.shape)}; pixels are (B, 3, F, H, W) floats in [-1, 1]."
        )
    low, high = float(clip.min()), float(clip.max())
    if not (low >= -1.001 and high <= 1.001):  # a thousandth for rounding of pixels that were resampled
        raise ValueError(f"{name} holds values from {low:.3g} to {high:.3g}; scale pixels to [-1, 1].")


def as_mask(given: Any) -> Tensor:
    """Convert a mask to bool (H, W) or (F, H, W), true where pixels are generated.

    given: a PIL image (white is generated, transparent is not) or a list of them, one per frame; an array or tensor of bool, of whole
    numbers from 0 to 255 (uint16: to 65535) or of floats in [0, 1], of which the upper half is generated. ValueError for
    others, and for whole numbers that are but 0 and 1.
    """
    if isinstance(given, Tensor):
        if given.dtype == torch.bool:
            return given
        given = (given.float() if given.is_floating_point() else given).cpu().numpy()
    if isinstance(given, Image.Image):
        return torch.from_numpy(np.asarray(Image.fromarray(upright(given, ground=BLACK)).convert("L")) > 127)
    if isinstance(given, np.ndarray):
        return torch.from_numpy(_mask_of_array(given))
    if isinstance(given, Sequence) and not isinstance(given, str) and given:
        masks = [as_mask(one) for one in given]
        if len({mask.shape for mask in masks}) == 1:
            return torch.stack(masks)
    raise ValueError(f"mask is {_described(given)}; give a PIL image, a list of them, or an array or tensor (F, H, W).")


def _mask_of_array(given: np.ndarray) -> np.ndarray:
    if given.dtype == bool:
        return given
    if given.dtype.kind not in "uif":
        raise ValueError(f"mask is {_described(given)}; give an array of bool, of 0 to 255, or of floats in [0, 1].")
    white = 1 if given.dtype.kind == "f" else 65535 if given.dtype == np.uint16 else 255
    low, high = (given.min(), given.max()) if given.size else (0, 0)
    if not (low >= -0.001 and high <= white * 1.001):  # as resampling leaves them
        raise ValueError(
            f"mask is {_described(given)} with values from {low:.5g} to {high:.5g}; give bool, or 0 to {white} of this type."
        )
    if white > 1 and high == 1:
        raise ValueError(f"mask is {_described(given)} that holds 0 and 1; use bool, or 0 and {white}.")
    return given > white / 2


def _converted(given: Any, name: str, kind: Kind) -> Tensor:
    if isinstance(given, Tensor):
        return _from_tensor(given, kind)
    if isinstance(given, np.ndarray):
        return _from_array(given, name, kind)
    if isinstance(given, Image.Image):
        return to_float(upright(given)[None])[None]
    if not isinstance(given, Sequence) or isinstance(given, str | bytes) or not given:
        raise ValueError(f"{name} is {_described(given)}; {_TAKEN}.")
    parts = [_converted(one, name, "clip") for one in given]
    sizes = dict.fromkeys(tuple(part.shape[-2:]) for part in parts)
    if len(sizes) > 1:
        listed = ", ".join(f"{height} x {width}" for height, width in list(sizes)[:4])
        raise ValueError(f"{name} has pictures of several sizes (height x width): {listed}; resize them to one.")
    frames = all(_is_picture(one) for one in given) and kind != "image"
    if not frames and len({part.shape[2] for part in parts}) > 1:
        counts = ", ".join(str(part.shape[2]) for part in parts[:8])
        raise ValueError(
            f"{name} has clips of several lengths ({counts} frames); cut them to one, or call once for each."
        )
    return torch.cat(parts, dim=2 if frames else 0)


def _is_picture(given: Any) -> bool:
    return isinstance(given, Image.Image) or (isinstance(given, np.ndarray | Tensor) and given.ndim == 3)


def _from_array(given: np.ndarray, name: str, kind: Kind) -> Tensor:
    if given.ndim not in (3, 4, 5) or given.shape[-1] != 3 or (given.dtype != np.uint8 and given.dtype.kind != "f"):
        raise ValueError(f"{name} is {_described(given)}; {_TAKEN}.")
    if given.ndim == 5 or (given.ndim == 4 and kind == "image"):
        frames = given if given.ndim == 5 else given[:, None]
    else:
        frames = given[None] if given.ndim == 4 else given[None, None]
    if given.dtype == np.uint8:
        return to_float(frames)
    low, high = (float(given.min()), float(given.max())) if given.size else (0.0, 0.0)
    if not (low >= -0.001 and high <= 1.001):
        raise ValueError(
            f"{name} is an array of values from {low:.3g} to {high:.3g}; arrays are uint8, or floats in [0, 1]."
        )
    return torch.from_numpy(np.ascontiguousarray(frames)).float().movedim(-1, 1) * 2 - 1


def _from_tensor(given: Tensor, kind: Kind) -> Tensor:
    if given.ndim == 4 and kind != "clip":
        return given.unsqueeze(2)
    clips = given[None] if given.ndim == 4 else given[None, :, None] if given.ndim == 3 else given
    frames_first = clips.ndim == 5 and clips.shape[1] != 3 and clips.shape[2] == 3 and clips.is_floating_point()
    if frames_first and float(clips.min()) >= 0:  # as diffusers has them
        return clips.transpose(1, 2) * 2 - 1
    return clips


def _described(given: Any) -> str:
    if isinstance(given, np.ndarray):
        return f"an array of {given.dtype} of shape {given.shape}"
    if hasattr(given, "frames"):
        return f"a {type(given).__name__}, whose .frames are the clips"
    return "an empty list" if isinstance(given, list | tuple) and not given else f"a {type(given).__name__}"

"""Read the labels, sizes and rates of a model folder without loading the model. This module imports no torch."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from stdit.files import printable, read_json
from stdit.labels import check_names
from stdit.legacy import renamed_section


class ModelLabels(NamedTuple):
    """The labels, captions and sizes that a saved pipeline accepts.

    num_classes: 0 for a model without labels. captions: whether it takes captions. num_frames, height, width, fps:
    those of its training. causal: whether it can stream. mask_strategies: how known frames were chosen in training.
    """

    num_classes: int
    class_names: tuple[str, ...] | None
    captions: bool
    num_frames: int
    height: int
    width: int
    fps: float
    causal: bool
    mask_strategies: tuple[str, ...]


def read_labels(folder: str | Path) -> ModelLabels:
    """Read the labels, sizes and rates of a pipeline folder; ValueError, in one line, if it contains no model."""
    folder = Path(folder)
    pipeline = renamed_section("pipeline", _read(folder, "model_index.json"))
    model = renamed_section("model", _read(folder, "transformer/config.json"))
    check_settings(folder, "model_index.json", pipeline)
    check_settings(folder, "transformer/config.json", model)
    if missing := [key for key in ("num_frames", "height", "width", "fps") if key not in pipeline]:
        raise ValueError(f"{str(folder)!r}: model_index.json has no {missing[0]}; copy or export the model again.")
    names = model.get("class_names")
    check_names(names)
    return ModelLabels(
        num_classes=model.get("num_classes") or 0,
        class_names=tuple(names) if names else None,
        captions=bool(model.get("caption_channels")),
        num_frames=pipeline["num_frames"],
        height=pipeline["height"],
        width=pipeline["width"],
        fps=pipeline["fps"],
        causal=bool(model.get("causal")),
        mask_strategies=tuple(pipeline.get("mask_strategies") or ("shared",)),
    )


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} contains no model (no {name}); give a folder that training wrote.")
    return read_json(path)


def check_settings(folder: Path, file: str, settings: dict[str, Any]) -> None:
    """Raise ValueError for settings of a file in a model folder that are not of their kind: sizes, rates, names."""
    for key, (expected, holds) in _RULES[file].items():
        if key in settings and not holds(settings[key]):
            raise ValueError(
                f"{str(folder)!r}: {key}={printable(repr(settings[key]))[:100]} in {file} is not {expected}; correct it."
            )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)


# File -> key -> (what its value must be, whether a value is that).
_RULES: dict[str, dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "model_index.json": {
        **dict.fromkeys(("num_frames", "height", "width"), ("a whole number >= 1", _is_count)),
        "fps": ("a number above 0", _is_rate),
        "objective": ("flow or ddpm", lambda value: value in ("flow", "ddpm")),
        "mask_strategies": ("a list of names", lambda value: value is None or _are_texts(value)),
        **dict.fromkeys(
            ("text_encoder", "vae_fingerprint"), ("a text", lambda value: value is None or isinstance(value, str))
        ),
    },
    "transformer/config.json": {
        "num_classes": ("a whole number >= 0", lambda value: value in (None, 0) or _is_count(value)),
    },
}

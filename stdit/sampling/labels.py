"""Read the labels, sizes and rates of a model folder without loading the model. This module imports no torch."""

from pathlib import Path
from typing import Any, NamedTuple

from stdit.files import read_json
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

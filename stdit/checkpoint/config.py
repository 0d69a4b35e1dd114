"""The config of a run that starts from other weights. This module imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

# Parts of a model outside its blocks that may be reinitialised, by the name of their attribute.
PARTS = ("x_embedder", "t_embedder", "y_embedder", "caption_embedder", "final_layer")


@dataclass
class InitFrom:
    """Weights to start from, and how they become the weights of this model.

    path: a folder that `STDiT.from_pretrained` loads. temporal: "insert" new blocks wherever `model.axes` has a
    temporal one (they are the identity at first), or "convert" the image model's own blocks. patch: the frame of a
    temporal patch that an image kernel is applied to. classes: keep the class table, or replace all of it but its null
    row. restart: parts to reinitialise (one of PARTS each).
    """

    path: str | None = None  # folder that STDiT.from_pretrained loads; null: start from random weights
    temporal: Literal["insert", "convert"] = "insert"  # insert new temporal blocks, or convert the image model's
    patch: Literal["first", "centre", "mean"] = "mean"  # frame of a temporal patch that an image kernel is applied to
    classes: Literal["keep", "replace"] = "keep"  # keep the class table, or replace all but its null row
    restart: list[str] = field(default_factory=list)  # parts to reinitialise, such as x_embedder, final_layer

    def __post_init__(self) -> None:
        unknown = [part for part in self.restart if part not in PARTS]
        if unknown:
            raise ValueError(
                f"init_from.restart={self.restart}: {unknown[0]!r} is not a part of a model. "
                f"Choose from: {', '.join(PARTS)}."
            )

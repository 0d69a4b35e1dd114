"""Numbers about a clip: its frame rate, duration and size (SDXL's micro-conditioning)."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from stdit.conditions.base import ClipFacts, Conditioner, Key
from stdit.nn.embedders import MicroConditionEmbedder
from stdit.variants import pick

# Numbers that describe a clip: frames per second, seconds, height and width in pixels.
MICRO_CONDITIONS = ("fps", "seconds", "height", "width")


class Micro(Conditioner):
    """Numbers about a clip, added to the conditioning vector; nan stands for an unknown number."""

    name = "micro"
    keywords = ("micro_conditions",)
    module = "micro_embedder"
    clip_ndim = 2
    guided = False  # both branches of guidance get the size and frame rate of the generated clip
    stored = False  # it follows from the clip
    dropout_salt = (1,)

    def __init__(self, names: Sequence[str]):
        for name in names:
            pick(dict.fromkeys(MICRO_CONDITIONS), name, "model.micro_conditions")
        if len(set(names)) < len(names):
            raise ValueError(f"model.micro_conditions={list(names)} names one number twice; give each once.")
        self.names = tuple(names)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self | None:
        """Make it if the config has `micro_conditions`."""
        return cls(config["micro_conditions"]) if config.get("micro_conditions") else None

    def embedder(self, dim: int) -> nn.Module:
        """Make the embedder of the chosen numbers."""
        return MicroConditionEmbedder(len(self.names), dim)

    def null(self, count: int) -> Tensor:
        """All numbers unknown: nan (count, 1, N)."""
        return torch.full((count, 1, len(self.names)), float("nan"))

    def default(self, count: int) -> None:
        """None, so that nothing is added, not even the embedder's bias."""
        return None

    @classmethod
    def read(cls, record: Mapping[str, Any], clip: ClipFacts) -> Any:
        """All of `MICRO_CONDITIONS`, computed from the clip."""
        return describe(clip)

    def drop(self, values: Any, keys: Sequence[Key], rate: float) -> Any:
        """Select the model's numbers, and replace those of dropped clips by nan."""
        columns = values[:, [MICRO_CONDITIONS.index(name) for name in self.names]]
        return torch.where(torch.tensor(self.dropped(keys, rate))[:, None], float("nan"), columns)

    def parse(self, given: Any, count: int) -> Tensor:
        """Convert numbers (count, N) to a value; None gives unknown numbers for all clips."""
        return self.null(1) if given is None else super().parse(given, count)  # type: ignore[return-value]

    def of_clip(self, clip: ClipFacts) -> Tensor:
        """Numbers (1, 1, N) of the clip to be generated, for all clips of a batch."""
        numbers = dict(zip(MICRO_CONDITIONS, describe(clip), strict=True))
        return torch.tensor([[[numbers[name] for name in self.names]]])


def describe(clip: ClipFacts) -> tuple[float, ...]:
    """Compute the numbers `MICRO_CONDITIONS` of a clip."""
    frames, height, width = clip.size
    return (clip.fps, frames / clip.fps, float(height), float(width))

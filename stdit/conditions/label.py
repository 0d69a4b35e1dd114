"""Class labels, as numbers or names, with a null class for guidance."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from stdit.conditions.base import ClipFacts, Conditioner, Key
from stdit.labels import label_number, label_values
from stdit.nn.embedders import LabelEmbedder
from stdit.rng import keyed_generator


class Label(Conditioner):
    """One of `num_classes` labels, added to the conditioning vector; label `num_classes` is the null (DiT)."""

    name = "label"
    keywords = ("class_labels",)
    module = "y_embedder"
    clip_ndim = 1
    stored = False  # a latent cache has its own column of labels
    dropout_salt = ()  # shared with captions: a clip loses its label and its caption together

    def __init__(self, num_classes: int, class_names: Sequence[str] | None = None, std: float = 0.02):
        self.num_classes, self.class_names, self.std = num_classes, class_names, std

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self | None:
        """Make it if the config has `num_classes`."""
        if not config.get("num_classes"):
            return None
        return cls(config["num_classes"], config.get("class_names"), config.get("label_std", 0.02))

    def embedder(self, dim: int) -> nn.Module:
        """Make the embedding table."""
        return LabelEmbedder(self.num_classes, dim, self.std)

    def null(self, count: int) -> Tensor:
        """Label `num_classes` (count, 1)."""
        return torch.full((count, 1), self.num_classes)

    @classmethod
    def read(cls, record: Mapping[str, Any], clip: ClipFacts) -> Any:
        """The record's label."""
        return record.get("label")

    @classmethod
    def collate(cls, raws: Sequence[Any]) -> Any:
        """Integer tensor (B,), with -1 for missing labels."""
        return torch.tensor([-1 if raw is None else raw for raw in raws])

    def drop(self, values: Any, keys: Sequence[Key], rate: float) -> Any:
        """Replace the labels of dropped clips by `num_classes`."""
        return torch.where(torch.tensor(self.dropped(keys, rate)), self.num_classes, values)

    def redraw(self, values: Any, keys: Sequence[Key]) -> Any:
        """Any of the labels, drawn by the clips' keys."""
        generators = [keyed_generator("guidance", *key, 1) for key in keys]
        return torch.cat([torch.randint(self.num_classes, (1,), generator=one) for one in generators]).to(values)

    def parse(self, given: Any, count: int) -> Tensor:
        """Convert numbers or names, one per clip or one for all, to (count, 1); (B, T) tensors or arrays are per latent frame."""
        if given is None:
            return self.null(count)
        rows = label_values(given)
        per_frame = getattr(given, "ndim", 1) > 1
        labels = torch.tensor([[self.number(one) for one in (row if per_frame else [row])] for row in rows])
        if len(labels) not in (1, count):
            raise ValueError(f"{len(labels)} class_labels for {count} clips; give one per clip, or one for all.")
        return labels.expand(count, -1)

    def preview(
        self, records: Callable[[int], Mapping[str, Any]], samples: int, count: int, *, frames: int
    ) -> dict[str, Any]:
        """Labels that cycle through the classes."""
        return {"class_labels": [i % self.num_classes for i in range(count)]}

    def number(self, value: Any) -> int:
        """Number of a label of this model; ValueError if it is unknown or out of range."""
        return label_number(value, self.num_classes, self.class_names)

"""The scales of guidance that a few-step model has learnt, in place of a second evaluation of the network."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stdit.conditions.base import ClipFacts, Conditioner, Key
from stdit.nn.embedders import MicroConditionEmbedder
from stdit.ranges import exact
from stdit.rng import keyed_generator

PLAIN_SHARE = 0.45  # clips at scale 1, which edits that keep what a clip shows are made with


class LearntGuidance(Conditioner):
    """A guidance scale for each guider, added to the conditioning vector (Meng et al., "On Distillation of Guided Diffusion").

    scales: guider -> the largest scale of training; a value's numbers are in the order of their names, since JSON keeps no
    order. A scale of 1 is no guidance.
    """

    name = "guidance"
    keywords = ("guidance_scales",)
    module = "guidance_embedder"
    clip_ndim = 2
    guided = False
    guided_by_default = False
    stored = False

    def __init__(self, scales: Mapping[str, float]):
        if not scales or not all(1 < scale < float("inf") for scale in scales.values()):
            raise ValueError(f"scales={dict(scales)} must name a guider, and a largest scale above 1 for each")
        self.scales = {str(name): float(scale) for name, scale in sorted(scales.items())}

    def embedder(self, dim: int) -> nn.Module:
        """Make the embedder of the scales, which adds nothing at first."""
        return MicroConditionEmbedder(len(self.scales), dim)

    def null(self, count: int) -> Tensor:
        """No guidance: ones (count, 1, N)."""
        return torch.ones(count, 1, len(self.scales))

    @classmethod
    def read(cls, record: Mapping[str, Any], clip: ClipFacts) -> Any:
        """None: a clip has no scale, training draws one."""
        return None

    def of_keys(self, keys: Sequence[Key]) -> Tensor:
        """Draw a guider and its scale for each training clip; the others, and all of some clips, are 1: (B, N)."""
        found = torch.ones(len(keys), len(self.scales))
        for row, key in zip(found, keys, strict=True):
            guided, which, share = torch.rand(3, generator=keyed_generator("guidance", *key)).tolist()
            number = int(which * len(self.scales))
            row[number] += (guided >= PLAIN_SHARE) * share * (list(self.scales.values())[number] - 1)
        return found

    def at_scale(self, guider: str, scale: float) -> Tensor:
        """The value (1, 1, N) of one guider's scale for all clips; ValueError for one that was not learnt."""
        if guider not in self.scales:
            raise ValueError(
                f"guider={guider!r} (--guider) is none of those that this model has learnt; choose one of: {', '.join(self.scales)}."
            )
        most = self.scales[guider]
        if not 1 <= scale <= most:
            raise ValueError(
                f"guidance_scale={exact(scale)} (--guidance) is not among those that this model has learnt for {guider!r}, 1 to {exact(most)}; choose one "
                "of them."
            )
        found = self.null(1)
        found[..., list(self.scales).index(guider)] = scale
        return found

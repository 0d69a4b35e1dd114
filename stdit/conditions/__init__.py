"""Conditions of a model, one conditioner per file. A new condition needs its file and a row here.

The order of the table is the order in which embedders are made and summed, so append new rows at the end.
"""

from collections.abc import Mapping
from typing import Any

from stdit.conditions.actions import Actions, ActionSpace
from stdit.conditions.base import ClipFacts, Conditioner
from stdit.conditions.caption import Caption
from stdit.conditions.guidance import LearntGuidance
from stdit.conditions.label import Label
from stdit.conditions.micro import Micro
from stdit.conditions.values import Conditions, Guided, Tokens
from stdit.variants import pick

CONDITIONERS: dict[str, type[Conditioner]] = {
    "label": Label, "micro": Micro, "caption": Caption, "actions": Actions, "guidance": LearntGuidance,
}  # fmt: skip

__all__ = [
    "CONDITIONERS",
    "ActionSpace",
    "Actions",
    "Caption",
    "ClipFacts",
    "Conditioner",
    "Conditions",
    "Guided",
    "Label",
    "LearntGuidance",
    "Micro",
    "Tokens",
    "check_extra_conditions",
    "collate_conditions",
    "conditioners_of",
    "read_conditions",
]  # fmt: skip


def conditioners_of(config: Mapping[str, Any]) -> dict[str, Conditioner]:
    """Conditioners of a model's config by name, in the order of the table."""
    found = {name: kind.from_config(config) for name, kind in CONDITIONERS.items()}
    return {name: conditioner for name, conditioner in found.items() if conditioner is not None}


def check_extra_conditions(extra: Mapping[str, Any], key: str = "extra_conditions") -> None:
    """Raise ValueError for extra conditions that are unknown or invalid.

    A condition is invalid if its arguments are wrong, or if other config keys turn it on (such as num_classes).
    """
    for name, arguments in extra.items():
        kind = pick(CONDITIONERS, name, f"condition in {key}")
        if "from_config" in vars(kind):
            raise ValueError(f"{key} has {name!r}, which other config keys turn on; leave it out of {key}.")
        try:
            kind.from_config({"extra_conditions": {name: arguments}})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{key}.{name}={arguments}: {error}; give the arguments of {kind.__name__}.") from error


def read_conditions(record: Mapping[str, Any], clip: ClipFacts) -> dict[str, Any]:
    """Raw value of every condition from a clip's record; None where the data has none."""
    return {name: kind.read(record, clip) for name, kind in CONDITIONERS.items()}


def collate_conditions(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate the conditions of samples to those of a batch, without conditions that no sample has."""
    batch = {}
    for name, kind in CONDITIONERS.items():
        raws = [sample.get(name) for sample in samples]
        if any(raw is not None for raw in raws) and (collated := kind.collate(raws)) is not None:
            batch[name] = collated
    return batch

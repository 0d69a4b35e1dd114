"""What a run has written: its losses, the tensors of a checkpoint, and how far two checkpoints differ."""

from pathlib import Path

import torch

from stdit.training.metrics import read_metrics
from stdit.training.state import read_checkpoint


def losses(name: str, column: str = "loss") -> list[float]:
    return [float(row[column]) for row in read_metrics(Path(f"output/{name}/training_metrics.csv")) if row[column]]


def state(name: str, step: int) -> dict[str, torch.Tensor]:
    groups = read_checkpoint(Path(f"checkpoints/{name}/step-{step}")).tensors
    return {f"{group}/{key}": tensors[key] for group, tensors in groups.items() for key in tensors}


def largest_difference(one: dict, two: dict) -> float:
    assert one.keys() == two.keys()
    pairs = [(value.double(), two[key].double().reshape(value.shape)) for key, value in one.items()]
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-3)) for a, b in pairs)

"""Averages of the weights whose length is chosen after training.

Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3: two averages with power
functions as weights are kept in training and written now and then; least squares over these snapshots gives the average
of any length in between.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stdit.files import atomic_write
from stdit.training.parallel import like, local, trained_parameters, whole
from stdit.training.shard_files import part_of

# The largest distance of the snapshots' best weights over time to those of the average, as a share of the latter.
WORST_FIT = 0.1


def exponent(length: float) -> float:
    """The exponent gamma whose power function, (gamma + 1) tau^gamma / t^(gamma + 1), has this relative length.

    length: the standard deviation of the weights over time, as a share of the time (sigma_rel in the paper's equation
    126), above 0 and at most 0.288. ValueError for another.
    """
    if not 0 < length < 0.2887:
        raise ValueError(
            f"the length of an average must be > 0 and <= 0.288 (1/sqrt(12), the plain mean), got {length}."
        )
    t = length**-2
    roots = np.roots([1, 7, 16 - t, 12 - t])
    return float(roots.real.max())


class PowerAverages:
    """Averages of a model's weights whose lengths grow with the number of steps.

    lengths: as shares of the training so far. values: for each length the averages of the parameters, in float32; of a sharded
    model what this process holds of them.
    """

    def __init__(self, model: nn.Module, lengths: Sequence[float]):
        self.lengths, self._exponents = list(lengths), [exponent(length) for length in lengths]
        self.names = list(trained_parameters(model))
        self.values = [[local(p).detach().clone().float() for p in trained_parameters(model).values()] for _ in lengths]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after a step, counted from 1 (equation 2 of the paper)."""
        if not self.lengths:
            return
        parameters = [local(p).detach() for p in trained_parameters(model).values()]
        for gamma, values in zip(self._exponents, self.values, strict=True):
            torch._foreach_lerp_(values, [p.float() for p in parameters], 1 - (1 - 1 / step) ** (gamma + 1))

    def state(self, model: nn.Module) -> dict[str, dict[str, Tensor]]:
        """The averages as groups of a checkpoint: average_0, average_1. model: which is sharded as they are."""
        parameters = trained_parameters(model)
        return {
            f"average_{i}": {
                name: like(value, parameters[name]) for name, value in zip(self.names, values, strict=True)
            }
            for i, values in enumerate(self.values)
        }

    def restore(self, model: nn.Module, tensors: Mapping[str, Mapping[str, Tensor]], lengths: Sequence[float]) -> None:
        """Load what `state` gave for averages of these lengths; ValueError if they are others."""
        if list(lengths) != self.lengths:
            raise ValueError(
                f"the checkpoint has averages of the lengths {list(lengths)}, but train.average_lengths={self.lengths}; they begin with "
                f"a run. Set train.average_lengths={list(lengths)}, or start again with train.resume=never."
            )
        parameters = trained_parameters(model)
        for i, values in enumerate(self.values):
            for name, value in zip(self.names, values, strict=True):
                value.copy_(local(part_of(tensors[f"average_{i}"], name, parameters[name])))

    def write(self, model: nn.Module, folder: Path, step: int, *, main: bool = True) -> None:
        """Write a snapshot in 16 bits to folder/step-N.safetensors, from the main process; all must call it."""
        tensors = {}
        for group, values in self.state(model).items():
            for name, value in values.items():  # one at a time: a sharded one is gathered
                full = whole(value)
                if main:
                    tensors[f"{group.removeprefix('average_')}/{name}"] = full.half().cpu().contiguous()
        if not main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        info = {"step": str(step), "lengths": " ".join(map(repr, self.lengths))}
        with atomic_write(folder / f"step-{step}.safetensors") as tmp:
            save_file(tensors, tmp, metadata=info)


class Snapshot(NamedTuple):
    """One average at one step: number `number` of the averages in a file."""

    path: Path
    number: int
    step: int
    exponent: float


def read_snapshots(folder: Path, last_step: int) -> list[Snapshot]:
    """The snapshots of a run up to a step; ValueError if there are none, or if a file is none."""
    found = []
    for path in sorted(folder.glob("step-*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                info = file.metadata() or {}
            step, lengths = int(info["step"]), [float(length) for length in info["lengths"].split()]
        except Exception as error:
            raise ValueError(f"{path} is no snapshot of averages ({error}); remove it, or restore it.") from error
        if step <= last_step:
            found += [Snapshot(path, i, step, exponent(length)) for i, length in enumerate(lengths)]
    if not found:
        raise ValueError(
            f"{folder} has no snapshots of averages; train with train.average_lengths=[0.05,0.1], which writes them beside "
            "the checkpoints."
        )
    return found


def weights_of(snapshots: Sequence[Snapshot], length: float, step: int) -> np.ndarray:
    """The weights of the snapshots whose sum is nearest to the average of a length at a step.

    ValueError if it is not near: the snapshots do not give this length.
    """
    weights, missing = _fit(snapshots, length, step)
    if missing <= WORST_FIT:
        return weights
    last = max(one.step for one in snapshots)
    newest = [one._replace(step=step) for one in snapshots if one.step == last]
    if last < step and _fit([*snapshots, *newest], length, step)[1] <= WORST_FIT:
        raise ValueError(
            f"the last snapshot is of step {last}, which gives no average of length {length:g} at step {step}; restore "
            f"{newest[0].path.with_name(f'step-{step}.safetensors')}, or train for more steps, which writes another."
        )
    raise ValueError(
        f"the {len(snapshots)} snapshots do not give an average of length {length:g} (they miss {missing:.0%} of "
        "it); choose one between those of train.average_lengths, or train with others."
    )


def _fit(snapshots: Sequence[Snapshot], length: float, step: int) -> tuple[np.ndarray, float]:
    """The weights of the snapshots whose sum is nearest to an average, and its distance as a share of the average's norm."""
    gamma = exponent(length)
    pairs = [(one.step, one.exponent) for one in snapshots]
    products = np.array([[_product(a, b) for b in pairs] for a in pairs])
    wanted = np.array([_product(pair, (step, gamma)) for pair in pairs])
    weights = np.linalg.lstsq(products, wanted, rcond=1e-12)[0]
    norm = _product((step, gamma), (step, gamma))
    missing = max(0.0, norm - 2 * wanted @ weights + weights @ products @ weights)
    return weights, (missing / norm) ** 0.5


def _product(a: tuple[int, float], b: tuple[int, float]) -> float:
    """The inner product over time of two power functions, of (step, exponent) each."""
    (early, first), (late, second) = sorted((a, b))
    return (first + 1) * (second + 1) / (first + second + 1) * (early / late) ** second / late


def average(snapshots: Sequence[Snapshot], length: float, step: int) -> dict[str, Tensor]:
    """The parameters averaged over a length before a step, in float32."""
    total: dict[str, Tensor] = {}
    for snapshot, weight in zip(snapshots, weights_of(snapshots, length, step), strict=True):
        with safe_open(snapshot.path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                number, name = key.split("/", 1)
                if int(number) == snapshot.number:
                    part = float(weight) * file.get_tensor(key).float()
                    total[name] = total[name] + part if name in total else part
    return total

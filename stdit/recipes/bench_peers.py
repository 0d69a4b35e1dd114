"""DiT, Latte and diffusers beside stdit in one run: training and sampling, each model in turn (`stdit bench peers`)."""

import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stdit.precision import Precision, autocast
from stdit.recipes.machine import Machine, gib, timed
from stdit.recipes.models import default_device
from stdit.recipes.peer_models import Contestant, RaceSize, contestants
from stdit.recipes.peer_sources import check_sources
from stdit.training.optim import build_optimizers

# DiT-XL/2 at 256 px, and Latte-XL/2 on 16 frames of it.
IMAGES = RaceSize(0, 32, depth=28, hidden_size=1152, num_heads=16, batch=32, samples=8, steps=25)
CLIPS = RaceSize(16, 32, depth=28, hidden_size=1152, num_heads=16, batch=2, samples=2, steps=10)
TINY = {"depth": 2, "hidden_size": 32, "num_heads": 2, "size": 8, "batch": 2, "samples": 2, "steps": 2}


class Race(NamedTuple):
    """One race. what: "training" or "sampling"; precision: of operations, weights are float32."""

    kind: str
    what: str
    precision: Precision = "bf16"
    compiled: bool = False

    @property
    def name(self) -> str:
        """As it stands in a report."""
        return f"{self.what} {self.kind}, {self.precision}{', compiled' if self.compiled else ''}"


RACES = [
    *(Race(kind, what) for kind in ("images", "clips") for what in ("training", "sampling")),
    Race("images", "training", "fp32"),
    *(Race(kind, what, compiled=True) for kind in ("images", "clips") for what in ("training", "sampling")),
]


def run_race(race: Race, machine: Machine, sources: Path, rounds: int = 5) -> str:
    """Run the models in turn; returns a line with clips a second of each, as a multiple of ours, and its memory."""
    size = IMAGES if race.kind == "images" else CLIPS
    if not machine.full:
        size = size._replace(**TINY, frames=min(size.frames, 4))
    runs: dict[str, Callable[[], Any]] = {}
    refused, memory = [], {}
    for one in contestants(size, sources, machine.device):
        runs[one.name] = run = _steps(one, race, machine)
        try:
            if race.compiled:
                for block in one.blocks:
                    block.compile(fullgraph=True, backend=machine.compiler)
            for _ in range(2):  # kernels are chosen and graphs compiled
                run()
        except torch._dynamo.exc.TorchDynamoException as error:
            refused.append(f"{one.name} cannot be compiled ({str(error).splitlines()[0][:80]})")
            del runs[one.name]
            continue
        memory[one.name] = machine.peak(run)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            machine.wait()
            seconds[name].append(timed(run))
    clips = size.batch if race.what == "training" else size.samples
    rates = {name: clips / statistics.median(values) for name, values in seconds.items()}
    found = [f"{name} {rate:.4g}/s ({rate / rates['stdit']:.2f}, {gib(memory[name])})" for name, rate in rates.items()]
    return "; ".join([*found, *refused])


def _steps(one: Contestant, race: Race, machine: Machine) -> Callable[[], None]:
    """A training step, or the sampling of a batch, until the device is done."""
    precision = partial(autocast, race.precision, machine.device)
    if race.what == "sampling":
        one.model.eval()
        return partial(_sample, one, precision, machine)
    one.model.train()
    [optimizer] = build_optimizers(one.model, "adamw", 1e-4)
    return partial(_train, one, optimizer, precision, machine=machine)


def _train(
    one: Contestant, optimizer: torch.optim.Optimizer, precision: Callable[[], Any], *, machine: Machine
) -> None:
    with precision():
        loss = one.loss()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    machine.wait()
    if not math.isfinite(loss.item()):
        raise ValueError(f"the loss of {one.name} is {loss.item()}; its sources or this machine are at fault.")


def _sample(one: Contestant, precision: Callable[[], Any], machine: Machine) -> None:
    with precision(), torch.no_grad():
        found = one.sample()
    machine.wait()
    if not torch.isfinite(found).all():
        raise ValueError(f"samples of {one.name} are not finite; its sources or this machine are at fault.")


def lines(machine: Machine, sources: Path, rounds: int = 5) -> Iterator[str]:
    """A line for every race."""
    check_sources(sources)
    for race in RACES:
        yield f"{race.name}: {run_race(race, machine, sources, rounds)}"
        machine.clear()


def bench_peers(sources: Path, rounds: int) -> None:
    """Print a line for every race; tiny models without a GPU, whose figures say nothing about speed."""
    device = torch.device(default_device())
    machine = Machine(device, full=device.type == "cuda")
    check_sources(sources)
    print(
        f"{machine.name}, torch {torch.__version__}; clips or images a second, as a multiple of stdit's, largest memory"
    )
    if not machine.full:
        print("tiny models, since there is no GPU here: these figures say nothing about speed")
    for line in lines(machine, sources, rounds):
        print(line, flush=True)

"""The largest model that some minutes on this machine can train on clips of a config, from measured speeds."""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from stdit.config import Config, load_typed
from stdit.data.datasets import build_dataset
from stdit.data.workers import num_workers
from stdit.model.config import model_arguments
from stdit.model.cost import forward_cost, training_memory
from stdit.pixels import to_float
from stdit.precision import resolve
from stdit.recipes.plan import arguments_of
from stdit.rng import keyed_rng
from stdit.vae import VideoVAE, load_vae

STEPS = 4000
FEWEST_STEPS = 1000
# Hidden size, depth and heads, from small to large; the largest that trains STEPS steps in time is taken.
MODELS = ((160, 6, 4), (256, 8, 4), (384, 12, 6), (768, 12, 12))
MOST_WINDOWS = 16  # of a clip that are encoded beforehand
_ENCODING = 0.25  # of the minutes, for encoding beforehand
_MEMORY = 0.6  # of the device's, that a step may take
_UTILISATION = 0.35  # of large products, that a training step of such models reaches (`stdit bench floor`)
_TIMED = 6  # clips that are read to find out how long it takes


class Choice(NamedTuple):
    """What fits into the time: overrides of the model and its steps, and what they take.

    windows: of each clip that are encoded beforehand; 0: clips are read in training. seconds: of all. reading: seconds to
    read and encode a clip. rate: operations a second.
    """

    overrides: list[str]
    parameters: int
    steps: int
    windows: int
    seconds: float
    reading: float
    rate: float


def key_of(override: str) -> str:
    """The key of an override key=value."""
    return override.partition("=")[0]


@dataclass(frozen=True)
class Budget:
    """A config `base` with overrides, those of the user after all others, and seconds for training it on a device."""

    base: str
    overrides: list[str]
    given: list[str]
    device: str = field(kw_only=True)
    seconds: float = field(kw_only=True)

    def config(self, more: Sequence[str] = ()) -> Config:
        """The config with further overrides, over which those of the user go."""
        return load_typed(Config, self.base, [*self.overrides, *more, *self.given])

    def choose(self, clips: int) -> Choice:
        """The largest model that can be trained on so many clips, after measuring this machine."""
        config = self.config()
        vae = load_vae(config.vae.name).to(self.device)
        precision = resolve(config.train.precision, self.device)
        rate, reading = measure_rate(self.device, precision), seconds_to_read(config, vae)
        windows = self._windows(config, clips * reading)
        before = windows * clips * reading
        each = 0.0 if windows else reading
        chosen = None
        for own in self._models():
            config = self.config(own)
            arguments, batch, latent = arguments_of(config, vae), config.train.batch_size, self._latent(config, vae)
            cost = forward_cost(arguments, latent, config.objective.route_ratio)
            seconds = batch * (6 * cost.total / (rate * _UTILISATION) + each)
            wanted = config.train.steps if self._is_given("train.steps") else STEPS
            possible = min(wanted, int((self.seconds - before) / seconds))
            memory = training_memory(
                arguments, latent, batch, optimizer=config.train.optimizer, bf16=precision == "bf16", checkpointing=False,
                fused=precision != "bf16", route_ratio=config.objective.route_ratio,
            )  # fmt: skip
            if chosen and (possible < wanted or memory.peak > _MEMORY * memory_of(self.device)):
                break
            steps = wanted if self._is_given("train.steps") else max(FEWEST_STEPS, possible)
            own += [f"{key}={steps}" for key in ("train.steps", "train.decay_steps") if not self._is_given(key)]
            chosen = Choice(
                own,
                cost.parameters,
                steps,
                windows=windows,
                seconds=before + steps * seconds,
                reading=reading,
                rate=rate,
            )
        assert chosen is not None
        return chosen

    def _models(self) -> list[list[str]]:
        """Overrides of the models to choose from, small to large, with the sizes that the user gives.

        Rows whose heads do not divide the width are left out; if none is left, the size that is not given follows the other.
        """
        rows = [self._row(*sizes) for sizes in MODELS]
        fitting = [own for own, (width, heads) in zip(rows, map(self._sizes, rows), strict=True) if width % heads == 0]
        if fitting:
            return fitting
        width, heads = self._sizes()
        if not self._is_given("model.hidden_size"):
            unit = 8 * heads  # heads of 8, 16, ... channels
            return [self._row(max(1, round(wanted / unit)) * unit, depth, heads) for wanted, depth, _ in MODELS]
        return [self._row(width, depth, math.gcd(width, wanted)) for _, depth, wanted in MODELS]

    def _row(self, width: int, depth: int, heads: int) -> list[str]:
        sizes = {"model.hidden_size": width, "model.depth": depth, "model.num_heads": heads}
        return [f"{key}={value}" for key, value in sizes.items() if not self._is_given(key)]

    def _sizes(self, more: Sequence[str] = ()) -> tuple[int, int]:
        """Width and heads of the model with further overrides."""
        found = model_arguments(self.config(more).model)
        return found["hidden_size"], found["num_heads"]

    def _windows(self, config: Config, once: float) -> int:
        """Windows of each clip to encode beforehand, where reading all clips takes `once` seconds; 0 if it does not pay."""
        if config.data.packing or config.data.sizes or self._is_given("data.source"):
            return 0
        windows = min(MOST_WINDOWS, int(_ENCODING * self.seconds / once))
        return windows if windows * once < self.seconds else 0

    def _is_given(self, key: str) -> bool:
        return key in map(key_of, self.given)

    def _latent(self, config: Config, vae: VideoVAE) -> tuple[int, int, int]:
        data = config.data
        return vae.latent_shape(data.num_frames, data.height, data.width, arguments_of(config, vae)["patch_size"])


def measure_rate(device: str, precision: str) -> float:
    """Operations a second of large matrix products on a device."""
    side = 1024 if device == "cpu" else 4096
    square = torch.randn(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        float((square @ square)[0, 0])  # reading a number waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / statistics.median(seconds[2:])


def seconds_to_read(config: Config, vae: VideoVAE) -> float:
    """Seconds to read and encode one clip of a config, of which the loader's processes share the reading."""
    dataset = build_dataset(config.data)
    reading, encoding = [], []
    for number in range(min(4 * _TIMED, len(dataset))):
        began = time.perf_counter()
        try:
            pixels = dataset.load(number, keyed_rng("sample", number))["pixels"]
        except (ValueError, OSError):  # a file that training leaves out
            continue
        middle = time.perf_counter()
        with torch.no_grad():
            vae.encode(to_float(pixels[None].to(vae.device)))
        reading.append(middle - began)
        encoding.append(time.perf_counter() - middle)
        if len(reading) == _TIMED:
            break
    if not reading:
        raise ValueError(f"none of the first files of {config.data.root} can be used; see stdit check-media.")
    workers = max(1, num_workers(config.data.workers, True, 1))
    return statistics.median(reading) / workers + statistics.median(encoding)


def memory_of(device: str) -> float:
    """Bytes of memory of a device, or of this machine."""
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info()[1])
    import psutil  # comes with accelerate

    return float(psutil.virtual_memory().total)

"""What a planned training takes with given settings, and the settings with which it fits into a given memory."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from stdit.config import Config, load_typed
from stdit.model.cost import (
    Memory,
    Shape,
    forward_cost,
    optimizer_memory,
    over_processes,
    training_memory,
    waiting_on_host,
)
from stdit.nn.context_parallel import sent_by_attention
from stdit.nn.ring_attention import has_ring_kernels
from stdit.recipes.build import check_batch
from stdit.recipes.planned_steps import StepKind

GIB = 2**30
RESERVED = 1.5 * GIB  # of the CUDA context, kernels' workspaces and fragmentation
EIGHT_BITS = "adamw8bit"  # the optimizer whose moments take 8 bits
LAUNCH_SECONDS = 0.01  # of a training step of a small model on a GPU: some thousand kernels of a few microseconds
CHECKPOINTING_NAMES: dict[bool | str, str] = {False: "without", "selective": "with selective", True: "with full"}
_CHECKPOINTING_TIME = {False: 1.0, "selective": 1.05, True: 4 / 3}  # a backward pass takes two forward passes


class Choice(NamedTuple):
    """How a step is computed.

    checkpointing: as `model.gradient_checkpointing`; micro: `train.micro_batch`; sharded: FSDP2. coarse: AdamW with moments of 8
    bits. offload: blocks wait in the host's memory. context, ring: as in `train.parallel`.
    """

    checkpointing: bool | str
    micro: int
    sharded: bool = False
    gather_bf16: bool = False
    context: int = 1
    coarse: bool = False
    offload: bool = False
    ring: int = 1

    @property
    def last_resort(self) -> int:
        """How late it is proposed, whatever time it takes: moments of 8 bits, the host's memory, gathers in bfloat16, in turn."""
        return 3 if self.gather_bf16 else 2 if self.offload else int(self.coarse)

    def overrides(self, current: "Choice") -> list[str]:
        """The overrides of a config that has the `current` settings."""
        values = {
            "model.gradient_checkpointing": self.checkpointing,
            "train.micro_batch": self.micro,
            "train.parallel.shard": "fsdp" if self.sharded else "none",
            "train.parallel.gather_bf16": self.gather_bf16,
            "train.parallel.context": self.context,
            "train.optimizer": EIGHT_BITS if self.coarse else "adamw",
            "train.parallel.offload": self.offload,
            "train.parallel.ring": self.ring,
        }
        changed = [mine != other for mine, other in zip(self, current, strict=True)]
        return [f"{key}={value}".lower() for (key, value), new in zip(values.items(), changed, strict=True) if new]


class Traffic(NamedTuple):
    """Bytes that a device sends in a step: of weights and gradients, and of tokens to those that share its frames.

    host: what it takes from the host's memory and brings back.
    """

    weights: float
    tokens: float
    host: float = 0.0


@dataclass(frozen=True)
class PlannedRun:
    """A training of a config on `count` devices.

    arguments: of the model. latent: (T, h, w) of a clip. peak: Tflops of a device, 0 if unknown; utilisation: the fraction of
    it that is reached. bandwidth: between devices, in GB/s; host_bandwidth: between each and the host. adapted: the
    parameters of a LoRA, if only these are trained. clips: of a step, if others than `train.batch_size`.
    kinds: of steps, if there are several, of which this is the one with the most tokens.
    """

    config: Config
    arguments: dict[str, Any]
    latent: Shape
    count: int
    bf16: bool
    fused: bool
    on_cpu: bool
    peak: float
    utilisation: float
    bandwidth: float
    adapted: int | None = None
    host_bandwidth: float = 25.0
    clips: int | None = None
    kinds: tuple[StepKind, ...] = ()
    _linear: dict[bool | str, tuple[Memory, Memory]] = field(default_factory=dict, init=False, compare=False)
    _moments: dict[str, float] = field(default_factory=dict, init=False, compare=False)

    @property
    def batch_size(self) -> int:
        """The clips of a step, on all devices."""
        return self.clips or self.config.train.batch_size

    @property
    def clips_of_steps(self) -> float:
        """The mean clips of a step, on all devices, over all kinds of steps."""
        return sum(kind.share * kind.clips for kind in self.kinds) if self.kinds else self.batch_size

    @property
    def trained(self) -> int:
        """The number of parameters that are trained."""
        return forward_cost(self.arguments, self.latent).parameters if self.adapted is None else self.adapted

    @property
    def configured(self) -> Choice:
        """The settings of the config, also those that have no effect on these devices."""
        train, parallel = self.config.train, self.config.train.parallel
        return Choice(
            self.config.model.gradient_checkpointing, train.micro_batch or self._clips(parallel.context),
            sharded=parallel.shard == "fsdp", gather_bf16=parallel.gather_bf16, context=parallel.context,
            coarse=train.optimizer == EIGHT_BITS, offload=parallel.offload, ring=parallel.ring,
        )  # fmt: skip

    def overrides(self, choice: Choice) -> list[str]:
        """The overrides that give the config the settings of a choice."""
        configured = self.configured
        if self.config.train.micro_batch is None:
            configured = configured._replace(micro=self._clips(choice.context))  # all clips of a process
        return choice.overrides(configured)

    def memory(self, choice: Choice, latent: Shape | None = None) -> Memory:
        """The memory of one device, counted."""
        return self._share(self._whole(choice.checkpointing, choice.micro, latent or self.latent), choice)

    def estimate(self, choice: Choice) -> Memory:
        """The memory of one device, from those of one clip and of two: it grows linearly with the clips."""
        return self._share(self._linearly(choice), choice)

    def _linearly(self, choice: Choice) -> Memory:
        kind = choice.checkpointing
        if kind not in self._linear:
            self._linear[kind] = self._whole(kind, 1, self.latent), self._whole(kind, 2, self.latent)
        one, two = self._linear[kind]
        parts = {part.name: (getattr(one, part.name), getattr(two, part.name)) for part in fields(Memory)}
        return Memory(**{name: a + (choice.micro - 1) * (b - a) for name, (a, b) in parts.items()})

    def other(self, choice: Choice) -> float:
        """Bytes that are reserved by the device's libraries, and of a second, whole copy of gradients.

        DDP has it for what it sends. FSDP2 has it while it adds up micro-batches, which it shares out after the last one.
        """
        adds_up = self._micro_batches(choice) > 1 and not choice.offload
        twice = 4 * self.trained if self.count > 1 and (adds_up or not choice.sharded) else 0
        return twice + (0 if self.on_cpu else RESERVED)

    def need(self, choice: Choice, memory: Memory) -> float:
        """The largest use of memory of a device."""
        return max(sum(parts.values()) for parts in self.times(choice, memory).values())

    def times(self, choice: Choice, memory: Memory) -> dict[str, dict[str, float]]:
        """What is on a device at each of the times when its memory may be fullest, in bytes: the time -> part -> bytes.

        On a CPU, saving a checkpoint copies its largest file in memory. What samples from a model in shards has it whole, beside
        what stays on the device; blocks that wait in the host's memory are not there between steps.
        """
        stays = {"weights": memory.weights, "optimizer": memory.optimizer, "ema": memory.ema}
        passing, reserved = {"working": memory.working}, {"reserved": self.other(choice)}
        computed = {"activations": memory.activations + memory.recomputed}
        reduced = {"gradients": memory.gradients, "recomputed": memory.recomputed}
        found = {
            "when the backward pass begins": {**stays, **computed, **passing, **reserved},
            "when the backward pass ends": {**stays, **reduced, **passing, **reserved},
        }
        if choice.sharded:
            beside = {} if choice.offload else stays
            found["while it samples"] = {**beside, "whole model": self._sampled(), **reserved}
        if self.on_cpu:
            found["while it saves a checkpoint"] = {**stays, "copy": memory.optimizer}
        return found

    def left_for_step(self, choice: Choice, room: float) -> float:
        """The bytes of `room` that a step may take; 0 if what the run needs beside its steps does not fit."""
        empty = dict.fromkeys(("gradients", "activations", "recomputed", "working"), 0.0)
        beside = self.need(choice, replace(self.estimate(choice), **empty))
        return room - self.other(choice) if beside <= room else 0.0

    def _sampled(self) -> float:
        """Bytes of the whole model from which previews and the samples at the end are made; these also have its guide.

        0 for a run that samples nothing, whose model is exported from the host.
        """
        train = self.config.train
        shown = bool(train.previews) or train.preview_every < train.steps
        copies = 1 + (train.guide_step is not None) if train.samples else int(shown)
        return copies * 4.0 * forward_cost(self.arguments, self.latent).parameters

    def computation(self, choice: Choice) -> float:
        """Seconds of arithmetic in a step, the mean of all kinds of steps."""
        if self.kinds:
            return sum(kind.share * self._of(kind).computation(choice) for kind in self.kinds)
        flops = forward_cost(self.arguments, self.latent, self.config.objective.route_ratio).total
        work = 2 * 3 * _CHECKPOINTING_TIME[choice.checkpointing] * flops * self.batch_size
        return work / ((self.peak or 1.0) * 1e12 * self.utilisation * self.count)

    def _of(self, kind: StepKind) -> "PlannedRun":
        return replace(self, latent=kind.latent, clips=kind.clips, kinds=())

    def traffic(self, choice: Choice) -> Traffic:
        """What a device sends in a step."""
        cost = forward_cost(self.arguments, self.latent)
        # Every micro-batch takes the weights for each pass, and its gradients are summed on the host.
        micro_batches = self._micro_batches(choice)
        host = choice.offload * micro_batches * (2 * 4 * cost.parameters + 4 * self.trained) / self._shards(choice)
        if self.count == 1:
            return Traffic(0.0, 0.0, host)
        # DDP: gradients of the step, summed and sent back. FSDP2: weights for each pass of every micro-batch (one of the two
        # passes if they are kept for the other), and gradients in float32, once if the device has room to add them up.
        weights = 2.0 * 4 * self.trained
        if choice.sharded:
            gathered = (2 if self.config.train.parallel.reshard else 1) * (2 if choice.gather_bf16 else 4)
            reduced = micro_batches if choice.offload else 1
            weights = micro_batches * gathered * cost.parameters + 4 * reduced * self.trained
        forwards = 2 if choice.checkpointing else 1  # exchanged tokens are computed again
        sent = sent_by_attention(choice.context, choice.ring, forwards=forwards, size=2 if self.bf16 else 4)
        depth, axes = self.arguments["depth"], self.arguments.get("axes", ("joint",))
        # Attention within a frame exchanges nothing.
        blocks = sum(axes[i % len(axes)] != "spatial" for i in range(depth))
        tokens = self._clips(choice.context) * cost.tokens / choice.context  # of all micro-batches
        return Traffic(weights, sent * blocks * self.arguments["hidden_size"] * tokens, host)

    def seconds(self, choice: Choice) -> float:
        """Seconds of a step: arithmetic, traffic, and the launching of kernels for each micro-batch, one after another."""
        launches = LAUNCH_SECONDS * _CHECKPOINTING_TIME[choice.checkpointing] * self._micro_batches(choice)
        return self.computation(choice) + self.travel(choice) + launches

    def travel(self, choice: Choice) -> float:
        """Seconds in which what a step sends is on its way."""
        sent = self.traffic(choice)
        return (sent.weights + sent.tokens) / (self.bandwidth * 1e9) + sent.host / (self.host_bandwidth * 1e9)

    def optimizer(self, choice: Choice) -> str:
        """The `train.optimizer` of a choice."""
        named = self.config.train.optimizer
        return EIGHT_BITS if choice.coarse else "adamw" if named == EIGHT_BITS else named

    def moments(self, choice: Choice) -> float:
        """Bytes of the optimizer's moments, of all devices that share them."""
        name = self.optimizer(choice)
        if name not in self._moments:
            self._moments[name] = optimizer_memory(self.arguments, name, self.adapted)
        return self._moments[name]

    def on_host(self, choice: Choice) -> float:
        """Bytes of the host's memory for each device with `offload`: weights, gradients, averages and moments.

        A checkpoint copies all of these but gradients, and holds them while it is written.
        """
        whole = self._linearly(choice)
        saved = whole.weights + whole.ema + self.moments(choice)
        return (2 * saved + whole.gradients) / self._shards(choice)

    def _clips(self, context: int) -> int:
        """The clips of a process in a step."""
        return -(-self.batch_size // (self.count // context))

    def _micro_batches(self, choice: Choice) -> int:
        return -(-self._clips(choice.context) // choice.micro)

    def _shards(self, choice: Choice) -> int:
        return self.count // self.config.train.parallel.replicas if choice.sharded else 1

    def _whole(self, checkpointing: bool | str, micro: int, latent: Shape) -> Memory:
        train = self.config.train
        return training_memory(
            self.arguments, latent, micro, optimizer=train.optimizer, bf16=self.bf16, checkpointing=checkpointing,
            fused=self.fused, copies=len(train.average_lengths) + (train.guide_step is not None), trained=self.adapted,
            route_ratio=self.config.objective.route_ratio,
        )  # fmt: skip

    def _share(self, memory: Memory, choice: Choice) -> Memory:
        depth, shards = self.arguments["depth"], self._shards(choice)
        memory = replace(memory, optimizer=self.moments(choice))
        if choice.offload:
            outside = 4.0 * forward_cost(self.arguments, self.latent).outside
            memory, shards = waiting_on_host(memory, outside=outside, depth=depth), 1
        return over_processes(memory, shards=shards, context=choice.context, depth=depth, half=choice.gather_bf16)


def parse_memory(text: str) -> float:
    """Bytes of "24GB", "24GiB" or "24", as on the label of a card, whose GB are 2^30 bytes; ValueError for other texts."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:G|GB|GiB)?\s*", text, re.IGNORECASE)
    if found is None or not 0 < float(found[1]) < 1e6:
        raise ValueError(f"--fit {text!r} is no amount of memory; give one such as 24GB.")
    return float(found[1]) * GIB


def find_fit(run: PlannedRun, current: Choice, room: float, *, path: str, overrides: Sequence[str]) -> Choice | None:
    """The choice that takes the least time of those that fit into `room` bytes and that training accepts; None if none does.

    The `current` one if it fits and no other takes 2 % less time. A last resort, which changes a step or needs the host's memory,
    is proposed only if nothing before it fits. path and overrides: of the config.
    """
    fits = run.need(current, run.memory(current)) <= room
    enough, latest = (run.seconds(current) / 1.02, current.last_resort) if fits else (float("inf"), 3)
    checks = _Checks(run, current, path=path, overrides=overrides)
    fitting = [choice for choice in _choices(run, current) if run.need(choice, run.estimate(choice)) <= room]
    for choice in sorted(fitting, key=lambda choice: (choice.last_resort, run.seconds(choice))):
        if run.seconds(choice) > enough or choice.last_resort > latest:
            continue
        # Counted, since memory is not quite linear on CPUs.
        if checks.accept(choice) and run.need(choice, run.memory(choice)) <= room:
            return choice
    return current if fits else None


def smallest(run: PlannedRun, current: Choice, *, path: str, overrides: Sequence[str]) -> Choice:
    """The choice that takes the least memory."""
    by_need = sorted(_choices(run, current), key=lambda choice: run.need(choice, run.estimate(choice)))
    checks = _Checks(run, current, path=path, overrides=overrides)
    return next(filter(checks.accept, by_need), current)


def _choices(run: PlannedRun, current: Choice) -> Iterator[Choice]:
    """All choices that the devices and the batch allow."""
    contexts = [c for c in range(1, run.count + 1) if run.count % c == 0 and run.latent[0] % c == 0]
    heads, model = run.arguments["num_heads"], run.config.model
    for context in contexts:
        # Heads are shared by as many as can; a ring joins the rest (`check_shared_heads`).
        ring = context // math.gcd(heads, context) if "joint" in model.axes and not model.causal else 1
        clips = -(-run.batch_size // (run.count // context))
        micros = [n for n in range(clips, 0, -1) if clips % n == 0]
        for micro in [clips] if run.config.data.sizes else micros:
            for way in _ways(run, current):
                for kind in CHECKPOINTING_NAMES:
                    yield Choice(kind, micro, context=context, ring=ring, **way)


def _ways(run: PlannedRun, current: Choice) -> list[dict[str, bool]]:
    """How weights and moments may be kept: whole, in shards, with moments of 8 bits, in the host's memory."""
    ways = [{"coarse": current.coarse}]
    if run.count > 1:
        ways += [{"sharded": True}, {"sharded": True, "gather_bf16": True}]
    if not run.on_cpu:
        if run.config.train.optimizer == "adamw":
            ways.append({"coarse": True})
        ways.append({"sharded": True, "offload": True})
    return ways


class _Checks:
    """Whether training accepts a choice, by its own checks of the config, which are made once for all micro-batches."""

    def __init__(self, run: PlannedRun, current: Choice, *, path: str, overrides: Sequence[str]):
        self.run, self.current, self.path, self.overrides = run, current, path, overrides
        self._configs: dict[Choice, Config | None] = {}

    def accept(self, choice: Choice) -> bool:
        """Whether a run with this choice would start."""
        key = choice._replace(micro=self.current.micro)
        if key not in self._configs:
            self._configs[key] = self._config(key)
        config = self._configs[key]
        if config is None:
            return False
        if choice.micro != self.current.micro:
            config = replace(config, train=replace(config.train, micro_batch=choice.micro))
        try:
            check_batch(config, self.run.count // choice.context)
        except ValueError:
            return False
        return True

    def _config(self, choice: Choice) -> Config | None:
        """The config with a choice, None if it is refused."""
        try:
            config = load_typed(Config, self.path, [*self.overrides, *self.run.overrides(choice)])
        except ValueError:
            return None
        model, arguments = config.model, self.run.arguments
        shares_frames = (
            model.network == "transformer"
            and model.trunk in ("stack", "long_skip")
            and model.conditioning != "in_context"
            and not (model.relative_position_bias or config.data.packing or arguments["patch_size"][0] > 1)
            and (choice.ring == 1 or (not model.causal and self._has_ring_kernels()))
            and (arguments["num_heads"] % (choice.context // choice.ring) == 0 or "joint" not in model.axes)
        )
        return config if choice.context == 1 or shares_frames else None

    def _has_ring_kernels(self) -> bool:
        run = self.run
        width = run.arguments["hidden_size"] // run.arguments["num_heads"]
        return has_ring_kernels("cpu" if run.on_cpu else "cuda", width, in_16_bits=run.bf16)

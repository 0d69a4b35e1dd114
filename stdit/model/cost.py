"""Estimates the cost of a model before it is built: operations by kind, and the memory of training."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from stdit.conditions import Conditions
from stdit.conditions.values import map_tensors
from stdit.model.stdit import STDiT
from stdit.nn.checkpointing import CHECKPOINTING, is_saved
from stdit.nn.config import BlockConfig
from stdit.nn.context import visible_frames
from stdit.nn.layout import visible_count
from stdit.nn.muon import muon_parameters

Shape = tuple[int, int, int]
_Counted = TypeVar("_Counted")


@dataclass(frozen=True)
class Cost:
    """Size of a model and operations of one forward pass.

    parameters: all parameters, without fixed position tables; outside: those of no block; table: numbers in DiT's position
    table, which DiT counts as parameters. tokens: of one clip. flops: multiply-adds of one forward pass, by kind.
    """

    parameters: int
    table: int
    tokens: int
    flops: dict[str, float]
    outside: int

    @property
    def total(self) -> float:
        """Multiply-adds of one forward pass, of all kinds."""
        return sum(self.flops.values())


def forward_cost(arguments: dict[str, Any], latent: Shape, route_ratio: float = 0.0) -> Cost:
    """Count one forward pass of a clip of `latent` (T, h, w) on the meta device, in multiply-adds as in DiT's paper.

    route_ratio: the share of patches that skip the middle blocks (`objective.route_ratio`).
    flops has the keys "attention spatial", "attention temporal", "attention joint" (with their projections),
    "attention to the condition", "mlp", "modulation" and "embedding and head".
    """
    return _once(_forward_cost, arguments, latent=latent, route_ratio=route_ratio)


_MAX_COUNTED = 128
_counted: dict[str, Any] = {}  # by what was counted, and of what: a plan asks for few of them many times


def _once(count: Callable[..., _Counted], arguments: dict[str, Any], **options: Any) -> _Counted:
    """What `count` returns for the arguments of a model, counted once in a process."""
    key = json.dumps([count.__name__, arguments, options], sort_keys=True, default=str)
    if key not in _counted:
        if len(_counted) >= _MAX_COUNTED:
            _counted.clear()
        _counted[key] = count(arguments, **options)
    return _counted[key]


def _forward_cost(arguments: dict[str, Any], latent: Shape, route_ratio: float) -> Cost:
    with torch.device("meta"):
        model = STDiT(**arguments)
        inputs = _inputs(model, latent, 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs, **_example_conditions(model), **_visible(model, latent, route_ratio))
    counts = {name: sum(ops.values()) / 2 for name, ops in counter.get_flop_counts().items()}
    flops: dict[str, float] = {}
    inside = 0.0
    for i, block in enumerate(model.blocks):
        kinds = {
            f"attention {block.attn.axis}": "attn", "attention to the condition": "cross_attn", "mlp": "mlp",
            "modulation": "adaLN_modulation",
        }  # fmt: skip
        for kind, part in kinds.items():
            count = counts.get(f"STDiT.blocks.{i}.{part}", 0.0)
            flops[kind] = flops.get(kind, 0.0) + count
            inside += count
    flops["embedding and head"] = counts.get("Global", 0.0) - inside
    patches = latent[1] // model.patch_size[1] * (latent[2] // model.patch_size[2])
    return Cost(
        sum(p.numel() for p in model.parameters()),
        patches * model.config.hidden_size,
        latent[0] // model.patch_size[0] * patches,
        flops=flops,
        outside=sum(p.numel() for name, p in model.named_parameters() if not name.startswith("blocks.")),
    )


@torch.no_grad()
def clip_flops(model: STDiT, latent: Shape, route_ratio: float = 0.0) -> float:
    """Multiply-adds of one forward pass of a clip of `latent` (T, h, w), counted by running the model.

    route_ratio: the share of patches that skip the middle blocks (`objective.route_ratio`).
    """
    with FlopCounterMode(display=False) as counter:
        model(*_inputs(model, latent, 1), **_example_conditions(model), **_visible(model, latent, route_ratio))
    return counter.get_total_flops() / 2


def _visible(model: STDiT, latent: Shape, route_ratio: float) -> dict[str, Tensor]:
    """The argument for as many patches (1, n) as the middle blocks see; none if these are all."""
    if not route_ratio:
        return {}
    patches = math.prod(latent[1:]) // math.prod(model.patch_size[1:])
    return {"visible": torch.arange(visible_count(patches, route_ratio), device="cpu")[None]}


def flops_of_config(config: Mapping[str, Any], latent: Shape, route_ratio: float = 0.0) -> float:
    """Multiply-adds of one forward pass of a clip of `latent` (T, h, w) by the model of a config, on the meta device.

    route_ratio: the share of patches that skip the middle blocks (`objective.route_ratio`).
    """
    with torch.device("meta"):
        model = STDiT.from_config(dict(config))
        return clip_flops(model, latent, route_ratio)


def _example_conditions(model: STDiT, batch: int = 1) -> dict[str, Conditions]:
    """An example of every condition that has no default."""
    given = {
        name: conditioner.example(batch)
        for name, conditioner in model.conditioners.items()
        if conditioner.joins == "tokens"
    }
    return {"conditions": map_tensors(given, lambda x: x.to(model.device))}


@dataclass(frozen=True)
class Memory:
    """Memory of training on one device in bytes, by part.

    ema: the averaged weights. activations: what the forward pass of one micro-batch saves for the backward pass.
    recomputed: activations that checkpointing computes again, one block at a time. working: temporary tensors.
    """

    weights: float
    gradients: float
    optimizer: float
    ema: float
    activations: float
    recomputed: float
    working: float

    @property
    def persistent(self) -> float:
        """Bytes that are allocated throughout training."""
        return self.weights + self.optimizer + self.ema

    @property
    def peak(self) -> float:
        """Largest use of memory: when the backward pass begins, or when it ends and all gradients exist."""
        return self.persistent + max(self.activations, self.gradients) + self.recomputed + self.working


def over_processes(memory: Memory, *, shards: int, context: int, depth: int, half: bool = False) -> Memory:
    """The memory of one of several processes.

    shards: that share weights, gradients, averages and optimizer; each gathers two blocks of `depth` at a time, with `half` in
    16 bits. context: processes that share the frames of a clip.
    """
    gathered = (1 if half else 2) * memory.weights / depth if shards > 1 else 0.0
    return Memory(
        weights=memory.weights / shards,
        gradients=memory.gradients / shards,
        optimizer=memory.optimizer / shards,
        ema=memory.ema / shards,
        activations=memory.activations / context,
        recomputed=memory.recomputed / context,
        working=memory.working / context + gathered,
    )


def waiting_on_host(memory: Memory, *, outside: float, depth: int) -> Memory:
    """The memory of a device whose weights, gradients, averages and moments wait in the host's memory.

    Two blocks of `depth` are on the device, the one that computes and the one that is copied, with their gradients; beside them
    are the `outside` bytes of weights that no block has.
    """
    two = 2 * (memory.weights - outside) / depth
    return replace(
        memory,
        weights=outside + two,
        gradients=outside + two,
        optimizer=0.0,
        ema=0.0,
        # Gradients of blocks leave while most activations are still there.
        working=memory.working + two,
    )


def frame_growth(dim: int, grid: tuple[int, int, int], window: int = 4) -> dict[str, float]:
    """Multiply-adds of a block over a clip's tokens, for joint, factorized, causal and windowed causal attention.

    grid: (T, rows, columns) in patches. A factorized block attends within frames or along time, the mean of which is
    given. window: latent frames that a frame attends to.
    """
    frames, patches = grid[0], grid[1] * grid[2]

    def keys_of_causal(last: int | None) -> float:
        """Keys that a query is multiplied by, on average."""
        at = np.arange(frames)[:, None].repeat(3, 1)
        config = BlockConfig(dim, 1, causal=True, window=last)
        found = visible_frames(config, "joint", at, at, noisy=np.zeros(frames, dtype=bool))
        if found is None:
            return frames * patches
        lengths = np.full(frames, patches)
        return found._replace(queries=lengths, keys=lengths).products() / (frames * patches)

    keys = {
        "joint": frames * patches, "factorized": (patches + frames) / 2, "causal": keys_of_causal(None),
        f"window of {window}": keys_of_causal(window),
    }  # fmt: skip
    return {name: frames * patches * (12 * dim**2 + 2 * dim * count) for name, count in keys.items()}


def training_memory(
    arguments: dict[str, Any],
    latent: Shape,
    micro_batch: int,
    *,
    optimizer: str,
    bf16: bool,
    checkpointing: bool | str,
    fused: bool,
    copies: int = 0,
    trained: int | None = None,
    route_ratio: float = 0.0,
) -> Memory:
    """Estimate the memory of a training step of `micro_batch` clips, from a forward pass over fake tensors.

    checkpointing: as `model.gradient_checkpointing`. fused: attention does not save its matrix (GPUs; CPUs in float32).
    copies: of the weights, besides their average. trained: the parameters of a LoRA, if only these are trained.
    route_ratio: the share of patches that skip the middle blocks. Weights, gradients and EMA are float32.
    """
    cost = forward_cost(arguments, latent)  # which also fills the caches of position tables with real ones
    size = 4.0 * cost.parameters
    how: dict[str, Any] = {"latent": latent, "batch": micro_batch, "bf16": bf16, "route_ratio": route_ratio}
    saved = partial(_once, _activations, arguments, fused=fused)
    activations, recomputed = saved(checkpointing=False, **how), 0.0
    if checkpointing:
        every, activations = activations, saved(checkpointing=checkpointing, **how)
        kept = activations
        if route_ratio:  # the largest blocks are those that all patches run through
            whole = {**how, "route_ratio": 0.0}
            every, kept = (saved(checkpointing=c, **whole) for c in (False, checkpointing))
        recomputed = (every - kept) / arguments["depth"]
    learnt = size if trained is None else 4.0 * trained
    widest = (
        micro_batch
        * cost.tokens
        * arguments["hidden_size"]
        * max(4.0, arguments.get("mlp_ratio", 4.0))
        * (2 if bf16 else 4)
    )
    return Memory(
        weights=size + (0.0 if trained is None else learnt),
        gradients=learnt,
        optimizer=optimizer_memory(arguments, optimizer, trained),
        ema=learnt * (1 + copies),
        activations=activations,
        recomputed=recomputed,
        working=2 * widest,
    )


def optimizer_memory(arguments: dict[str, Any], optimizer: str, trained: int | None = None) -> float:
    """Bytes of the moments that `train.optimizer` keeps. trained: the parameters of a LoRA, if only these are trained."""
    if trained is not None:  # its matrices are counted as one
        with torch.device("meta"):
            return moments_of([torch.empty(trained)], optimizer)
    with torch.device("meta"):
        model = STDiT(**arguments)
    matrices = 4.0 * sum(p.numel() for p in muon_parameters(model).values()) if optimizer == "muon" else 0.0
    return moments_of(model.parameters(), optimizer) - matrices


def moments_of(parameters: Iterable[Tensor], optimizer: str) -> float:
    """Bytes of two moments of all parameters, of which Muon keeps one for matrices."""
    sizes = [p.numel() for p in parameters]
    if optimizer != "adamw8bit":
        return 8.0 * sum(sizes)
    # A code for each number, and a scale in float32 for every 256; those of small tensors are float32.
    return float(sum(2 * (n + 4 * -(-n // 256)) if n >= 4096 else 8 * n for n in sizes))


def _activations(arguments: dict[str, Any], *, checkpointing: bool | str, fused: bool, **how: Any) -> float:
    """Bytes that a forward pass saves. Of a stack of like blocks two periods are run: they grow linearly with the depth."""
    depth, period = arguments["depth"], len(arguments.get("axes", ("joint",)))
    alike = arguments.get("trunk", "stack") == "stack" and not arguments.get("block_sources") and not how["route_ratio"]
    depths = (period, 2 * period) if alike and depth % period == 0 and depth > 2 * period else (depth,)
    found = []
    for number in depths:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = STDiT(**{**arguments, "depth": number})
            if fused:
                for block in model.blocks:
                    block.attn.processor._attention_backend = "native"
            found.append(_saved_bytes(model, checkpointing=checkpointing, **how))
    return found[0] if len(found) == 1 else found[0] + (depth / period - 1) * (found[1] - found[0])


class _Saved(TorchDispatchMode):
    """Passes to `record` the results that selective checkpointing keeps, which no hook of saved tensors sees."""

    def __init__(self, record: Callable[[Tensor], Tensor]):
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if is_saved(func):
            tree_map_only(Tensor, self.record, found)
        return found


def _inputs(model: STDiT, latent: Shape, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.zeros(batch, dtype=torch.long)
    return torch.empty(batch, model.in_channels, *latent), torch.empty(batch), labels


def _saved_bytes(
    model: STDiT, *, checkpointing: bool | str, latent: Shape, batch: int, bf16: bool, route_ratio: float
) -> float:
    """Bytes that the forward pass saves for the backward pass, without parameters; each storage counts once."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def record(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage
        return x

    if checkpointing:
        model.enable_gradient_checkpointing(CHECKPOINTING[checkpointing])
    if checkpointing == "selective":
        run = model._gradient_checkpointing_func

        def watched(block: nn.Module, *inputs: Any) -> Any:
            with _Saved(record):
                return run(block, *inputs)

        model._gradient_checkpointing_func = watched
    with saved_tensors_hooks(record, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        inputs = {**_example_conditions(model, batch), **_visible(model, latent, route_ratio)}
        model(*_inputs(model, latent, batch), **inputs).float().square().mean()
    return float(sum(storage.nbytes() for storage in storages.values()))

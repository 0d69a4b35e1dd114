"""A model spread over processes: FSDP2 shards every block, and what a process holds of a sharded tensor.

torch does the sharding (`torch.distributed.fsdp.fully_shard`); the code of the model does not know of it. Every parameter is
split along its first dimension.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NoReturn
from uuid import uuid4

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from stdit.training.compiled import compile_blocks
from stdit.training.config import ParallelConfig
from stdit.warn import warn_user


def effective(config: ParallelConfig, device: str, processes: int) -> ParallelConfig:
    """The settings that have an effect on a type of device and with so many processes; a warning for those that have none.

    A CPU's memory is the host's, and one process has nothing to share with, unless its shards wait in the host's memory.
    """
    if config.offload and device == "cpu":
        warn_user("train.parallel.offload=true has no effect on a CPU, whose memory is the host's; leave it out.")
        config = replace(config, offload=False)
        if processes == 1:
            return replace(config, shard="none", replicas=1)
    if config.shard == "fsdp" and processes == 1 and not config.offload:
        warn_user(
            "train.parallel.shard=fsdp has no effect with one process; start several: torchrun --nproc-per-node N -m stdit train ..."
        )
        return replace(config, shard="none", replicas=1)
    return config


def backend_of(device: str, *, offload: bool) -> str | None:
    """The communication of a process group; None: what accelerate chooses for the device.

    Shards in the host's memory need one for the CPU as well, by which the norm of their gradients is added up.
    """
    return f"cpu:gloo,{device}:{dist.get_default_backend_for_device(device)}" if offload and device != "cpu" else None


@contextmanager
def group_of_one(device: str, *, needed: bool = True) -> Iterator[None]:
    """A context manager in which this process, which is alone, is a process group, if it is `needed` and is not one yet."""
    if not needed or dist.is_initialized():
        yield
        return
    dist.init_process_group(backend_of(device, offload=True) or "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process of several with an exit code, after its output is written, and without destructors.

    Threads of gloo may still run when C++ destroys their group at exit, which aborts a process that has done all its work
    ("terminate called without an active exception", in one of some thirty runs) and ends the others with it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def make_mesh(config: ParallelConfig, device: str, processes: int) -> DeviceMesh | None:
    """The mesh of processes over which a model is sharded; None without sharding.

    With replicas, every group of processes / replicas holds the whole model between them (HSDP). ValueError if the processes
    cannot be divided so. config: of `effective`.
    """
    if config.shard == "none":
        return None
    if processes % config.replicas:
        fits = [n for n in range(1, processes + 1) if processes % n == 0]
        raise ValueError(
            f"train.parallel.replicas={config.replicas} does not divide {processes} processes; use one of "
            f"{', '.join(map(str, fits))}."
        )
    if config.replicas == 1:
        return init_device_mesh(device, (processes,), mesh_dim_names=("shard",))
    ranks = torch.arange(processes).reshape(config.replicas, -1)
    # init_device_mesh would give its groups torch's own timeout.
    timeout = timedelta(seconds=config.timeout)
    groups = [dist.new_subgroups_by_enumeration(one.tolist(), timeout=timeout)[0] for one in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, device, mesh=ranks, mesh_dim_names=("replicate", "shard"))


def parallelize(model: Any, config: ParallelConfig, mesh: DeviceMesh | None) -> None:
    """Shard a model in place, a unit for each block and one for the rest; nothing without a mesh.

    Gradients are reduced in float32, and inputs stay as they are: autocast chooses the precision of operations, as for a
    model that is not sharded. With `config.offload` the shards stay on the host, where the model may be: units are moved to
    the device one by one.
    """
    if mesh is None:
        return
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if config.gather_bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    # Pages of memory that are pinned can be copied while the device computes; there are none without a device.
    place = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if config.offload else OffloadPolicy()
    for part in [*model.blocks, model]:
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard, offload_policy=place)
    model.is_offloaded = config.offload


def place(
    model: Any,
    config: ParallelConfig,
    mesh: DeviceMesh | None,
    *,
    device: torch.device,
    compiled: bool | Literal["auto"] = False,
) -> None:
    """Bring a model to its device and spread it over processes, in place.

    compiled: its blocks by torch.compile; "auto": as far as it can.
    """
    if not config.offload:  # a model that waits on the host may be too large for the device
        model.to(device)
    if compiled:
        compile_blocks(model, sharded=mesh is not None, required=compiled is True)
    share_frames(model, config)
    parallelize(model, config, mesh)


def share_frames(model: Any, config: ParallelConfig) -> None:
    """Let groups of `config.context` neighbouring processes share the frames of every clip; ValueError for a model that cannot."""
    if config.context > 1:
        timeout = timedelta(seconds=config.timeout)
        model.enable_context_parallel(config.context, ring=config.ring, timeout=timeout)


def is_sharded(model: nn.Module) -> bool:
    """Whether `parallelize` has sharded a model."""
    return isinstance(model, FSDPModule)


def is_offloaded(model: nn.Module) -> bool:
    """Whether the shards of a model wait in the host's memory."""
    return is_sharded(model) and bool(model.is_offloaded)


def reshard(model: nn.Module) -> None:
    """Give back weights of a sharded model that a forward pass has gathered and that are still whole."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory; the tensor itself if it is not sharded."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def computing_device(tensor: Tensor) -> torch.device:
    """The device that computes with a tensor; that of a shard may wait elsewhere."""
    if not isinstance(tensor, DTensor) or tensor.device_mesh.device_type == tensor.device.type:
        return tensor.device
    return torch.device(tensor.device_mesh.device_type)


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def local_parameters(model: nn.Module) -> list[Tensor]:
    """What this process holds of the parameters that training changes, sharing their memory."""
    trained = trained_parameters(model).values()
    return [p if not isinstance(p, DTensor) else local(p).requires_grad_(True) for p in trained]


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered if it is sharded, which all processes must ask for; it is where its parts are."""
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.device_mesh.size() == 1 and all(placement.is_shard() for placement in tensor.placements):
        return local(tensor).clone()  # one process holds all of it
    with torch.no_grad():
        return tensor.full_tensor()


def rows_of(tensor: Tensor) -> tuple[int, int] | None:
    """The rows [first, end) of a sharded tensor that this process holds; None if the tensor is not sharded."""
    if not isinstance(tensor, DTensor):
        return None
    mesh = tensor.device_mesh
    name = mesh.mesh_dim_names[-1] if mesh.mesh_dim_names else None
    count, position = mesh.size(mesh.ndim - 1), mesh.get_local_rank(name)
    size = -(-tensor.shape[0] // count)
    first = min(size * position, tensor.shape[0])
    return first, min(first + size, tensor.shape[0])


def like(part: Tensor, tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, on any device, as a tensor that is sharded as another one of its shape is.

    It shares the memory of `part` and takes no gradients.
    """
    if not isinstance(tensor, DTensor):
        return part
    # `DTensor.from_local` would move a part that is elsewhere to the device of the mesh.
    spec = tensor._spec
    assert spec.tensor_meta is not None
    described = replace(spec, tensor_meta=spec.tensor_meta._replace(dtype=part.dtype))
    return DTensor(part, described, requires_grad=False)


def is_writer(tensor: Tensor, main: bool) -> bool:
    """Whether this process writes its part of a tensor: of replicas the first does, of unsharded tensors the main process."""
    if not isinstance(tensor, DTensor):
        return main
    mesh = tensor.device_mesh
    return mesh.ndim == 1 or mesh.get_local_rank(0) == 0


@contextmanager
def accumulating(model: nn.Module, last: bool) -> Iterator[None]:
    """A context manager in which gradients of a sharded model are summed here, and over processes in the last micro-batch.

    Those of shards that wait in the host's memory are summed there, since their device has no room for all of them.
    """
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(last or is_offloaded(model))
    yield


def gathered(named: Iterable[tuple[str, Tensor]], keep: bool) -> Mapping[str, Tensor]:
    """The whole tensors on the CPU if `keep`; all processes must call it, one tensor is gathered at a time."""
    found = {}
    for name, tensor in named:
        full = whole(tensor)
        if keep:
            found[name] = full.cpu()
    return found


def check_shared_folder(accelerator: Accelerator, folder: Path) -> None:
    """Raise ValueError, in every process, if one of them does not see what the main process writes to a folder."""
    mark = folder / f".probe-{uuid4().hex}"
    name = gather_object([mark.name])[0]
    if accelerator.is_main_process:
        mark.touch()
    accelerator.wait_for_everyone()
    seen = gather_object([(folder / name).is_file()])
    if accelerator.is_main_process:
        mark.unlink()
    if not all(seen):
        raise ValueError(
            f"process {seen.index(False)} does not see {folder}, where every process writes its part of a checkpoint: all nodes need "
            "one folder of checkpoints; start the run in a folder that they share."
        )


def check_agreement(accelerator: Accelerator, found: Mapping[str, Any]) -> None:
    """Raise ValueError, in every process, if the processes of a run have found different values.

    A node that has another config, or that does not see the folder of checkpoints, would otherwise wait for ever.
    """
    if accelerator.num_processes == 1:
        return
    first, *others = gather_object([dict(found)])
    for process, other in enumerate(others, 1):
        for name, value in first.items():
            if other[name] != value:
                raise ValueError(
                    f"process {process} has {name} {other[name]}, but process 0 has {value}; start all nodes with one command, in "
                    "a folder that they share (checkpoints, data, output)."
                )

"""Runs whose weights, gradients, averages and moments wait in the host's memory.

On a CPU that is the same memory, and training leaves the setting out; here torch's engine is used all the same. Two processes
do so in test_sharded.py.
"""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from other_device import other_device
from run_files import largest_difference, losses, state
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from stdit.recipes import export, train
from stdit.training import loop, muon, parallel
from stdit.training.config import ParallelConfig, TrainConfig
from stdit.training.muon import Muon
from stdit.training.parallel import (
    backend_of,
    computing_device,
    effective,
    group_of_one,
    like,
    local,
    parallelize,
    whole,
)
from stdit.training.state import damage

CONFIG = """
name: t
data: {source: shapes, num_frames: 5, height: 32, width: 32, num_shapes: 40, workers: 0}
model: {size: S/2, depth: 2, hidden_size: 32, num_heads: 2, patch_size: [1, 2, 2]}
train: {steps: 4, decay_steps: 20, batch_size: 4, micro_batch: 2, optimizer: muon, lr: 1.0e-3, ema_decay: 0.9,
        checkpoint_every: 2, log_every: 1, preview_every: 3, samples: 2, sample_steps: 2, precision: fp32,
        holdout: 0.2, guide_step: 2, average_lengths: [0.05, 0.1], trackers: []}
"""
OFFLOAD = ["train.parallel.shard=fsdp", "train.parallel.offload=true"]
WEIGHTS = "models/{}/transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder in which a run was made as usual, and with shards of one process in the host's memory."""
    folder = tmp_path_factory.mktemp("offload")
    (folder / "t.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.run(["t.yaml", "name=one"]) == 0
        patch.setattr(train, "effective", lambda config, device, processes: config)
        assert train.run(["t.yaml", "name=host", *OFFLOAD]) == 0
        yield folder


def test_a_run_in_the_hosts_memory_has_the_losses_weights_averages_and_moments_of_one_without(home):
    assert losses("host") == pytest.approx(losses("one"), rel=1e-6)
    assert losses("host", "held_out_loss") == pytest.approx(losses("one", "held_out_loss"), rel=1e-5)
    assert damage(Path("checkpoints/host/step-4")) is None
    assert {key.split("/")[0] for key in state("host", 4)} >= {"model", "ema", "optimizer_0", "average_0", "guide"}
    assert largest_difference(state("one", 4), state("host", 4)) < 1e-3


def test_a_run_in_the_hosts_memory_exports_and_previews_a_whole_model(home):
    for file in (WEIGHTS, "models/{}/guide/diffusion_pytorch_model.safetensors"):
        assert largest_difference(*(load_file(file.format(name)) for name in ("one", "host"))) < 1e-3
    assert Path("output/host/samples/step-0000003.png").is_file()
    assert Path("output/host/samples/contact_sheet.png").is_file()
    shutil.move("models/host", "exported")
    assert export.main(["host"]) == 0
    again = load_file(WEIGHTS.format("host"))
    assert all(
        torch.equal(value, again[key])
        for key, value in load_file("exported/transformer/diffusion_pytorch_model.safetensors").items()
    )


@pytest.mark.parametrize("how", [[], OFFLOAD])
def test_a_run_goes_on_from_a_checkpoint_of_the_hosts_memory_with_and_without_it(home, how):
    name = f"again{len(how)}"
    shutil.copytree("checkpoints/host/step-2", f"checkpoints/{name}/step-2")
    assert train.run(["t.yaml", f"name={name}", *how]) == 0
    found = largest_difference(state("host", 4), state(name, 4))
    assert found == 0 if how else found < 1e-3


def test_gradients_of_a_micro_batch_are_summed_in_the_hosts_memory(home, monkeypatch):
    synced = []
    real = parallel.accumulating

    def watched(model, last):
        monkeypatch.setattr(model, "set_requires_gradient_sync", synced.append)
        return real(model, last)

    monkeypatch.setattr(loop, "accumulating", watched)
    assert train.run(["t.yaml", "name=summed", *OFFLOAD, "train.steps=1", "train.samples=0"]) == 0
    assert synced == [True, True]


class Stack(nn.Module):
    """Two blocks and a head."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_every_block_is_a_unit_that_torch_keeps_on_the_host_and_gives_back(monkeypatch):
    units = []
    monkeypatch.setattr(parallel, "fully_shard", lambda part, **how: units.append((part, how)))
    model = Stack()
    with group_of_one("cpu"):
        for offload in (False, True):
            parallelize(model, ParallelConfig(shard="fsdp", offload=offload), init_device_mesh("cpu", (1,)))
    assert [part for part, _ in units] == 2 * [*model.blocks, model]
    assert all(how["reshard_after_forward"] for _, how in units)
    assert [isinstance(how["offload_policy"], CPUOffloadPolicy) for _, how in units] == 3 * [False] + 3 * [True]
    assert not dist.is_initialized()


def shard(x: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    spec = DTensorSpec(mesh, (Shard(0),), tensor_meta=TensorMeta(x.shape, x.stride(), x.dtype))
    return DTensor(x, spec, requires_grad=False)


@pytest.fixture
def elsewhere(monkeypatch):
    """A mesh of one process whose device is not the CPU (tests/other_device.py)."""
    with group_of_one("cpu"):
        mesh = init_device_mesh("cpu", (1,))
        monkeypatch.setattr(mesh, "_device_type", "meta")
        yield mesh


def test_what_waits_on_the_host_stays_there_and_is_computed_on_its_device(elsewhere):
    part = torch.arange(6.0).reshape(3, 2)
    tensor = shard(part, elsewhere)
    assert computing_device(tensor).type == "meta" and tensor.device.type == computing_device(part).type == "cpu"
    copied, found = like(part + 1, tensor), whole(tensor)
    assert copied.device.type == "cpu" and torch.equal(local(copied), part + 1)
    assert copied.placements == tensor.placements and copied.shape == tensor.shape
    assert torch.equal(found, part) and found.data_ptr() != part.data_ptr()


def test_muon_iterates_on_the_device_with_matrices_that_wait_on_the_host(elsewhere, monkeypatch):
    devices = []
    real = muon.orthogonalize
    monkeypatch.setattr(muon, "orthogonalize", lambda x: devices.append(x.device.type) or real(x))
    monkeypatch.setattr(muon, "native_bf16", lambda device: False)
    torch.manual_seed(0)
    matrices, gradients = ([torch.randn(6, 4), torch.randn(3, 8)] for _ in range(2))
    steps = {}
    for name, placed in (("here", torch.clone), ("elsewhere", lambda x: shard(x.clone(), elsewhere))):
        steps[name] = [nn.Parameter(placed(x)) for x in matrices]
        for p, gradient in zip(steps[name], gradients, strict=True):
            p.grad = placed(gradient)
        with other_device():
            Muon(steps[name], lr=0.1, weight_decay=0.1).step()
    assert devices == ["cpu", "cpu", "meta", "meta"]
    for one, two in zip(*steps.values(), strict=True):
        assert local(two).device.type == "cpu" and torch.allclose(one, local(two), atol=1e-6)


def test_the_hosts_memory_has_no_effect_on_a_cpu_which_is_said_in_one_line():
    wanted = ParallelConfig(shard="fsdp", offload=True)
    with pytest.warns(UserWarning, match="offload=true has no effect on a CPU") as said:
        assert effective(wanted, "cpu", 1) == ParallelConfig()
    assert len(said) == 1 and "\n" not in str(said[0].message)
    with pytest.warns(UserWarning, match="offload=true has no effect on a CPU"):
        assert effective(wanted, "cpu", 2) == ParallelConfig(shard="fsdp")
    assert effective(wanted, "cuda", 1) == effective(wanted, "cuda", 2) == wanted


def test_settings_that_contradict_the_hosts_memory_are_refused_in_one_line():
    with pytest.raises(ValueError, match="offload=true has no effect without train.parallel.shard=fsdp"):
        ParallelConfig(offload=True)
    with pytest.raises(ValueError, match="reshard=false keeps all weights on the device"):
        ParallelConfig(shard="fsdp", offload=True, reshard=False)
    with pytest.raises(ValueError, match="adamw8bit is not there for shards"):
        TrainConfig(optimizer="adamw8bit", parallel=ParallelConfig(shard="fsdp"))


def test_processes_whose_shards_wait_on_the_host_talk_there_too():
    assert backend_of("cuda", offload=True) == "cpu:gloo,cuda:nccl"
    assert backend_of("cuda", offload=False) is backend_of("cpu", offload=True) is None

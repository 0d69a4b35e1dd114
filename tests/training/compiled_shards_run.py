"""Run by two processes: compare a model that is compiled and sharded with the same model alone, and print the differences."""

import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend

from stdit.model.stdit import STDiT
from stdit.training.compiled import compile_blocks
from stdit.training.config import ParallelConfig
from stdit.training.parallel import leave, make_mesh, parallelize, whole


def made():
    torch.manual_seed(0)
    model = STDiT(depth=4, hidden_size=32, num_heads=2, in_channels=4, num_classes=2, sample_size=(2, 8, 8))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def run(model):
    torch.manual_seed(1)
    output = model(torch.randn(2, 4, 2, 8, 8), 1000 * torch.rand(2), torch.tensor([0, 1]))
    output.square().mean().backward()
    return output.detach(), {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def apart(found, expected):
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def main():
    dist.init_process_group("gloo")
    output, gradients = run(made())
    model, counter = made(), CompileCounterWithBackend("aot_eager")
    config = ParallelConfig(shard="fsdp")
    compile_blocks(model, backend=counter, sharded=True)
    parallelize(model, config, make_mesh(config, "cpu", 2))
    names = set(dict(model.named_parameters()))
    assert names == set(dict(made().named_parameters()))
    sharded, parts = run(model)
    worst = max(apart(parts[name], gradients[name]) for name in gradients)
    if dist.get_rank() == 0:
        print(f"output: {apart(sharded, output)}\ngradients: {worst}\ngraphs: {counter.frame_count}", flush=True)
    leave(0)


if __name__ == "__main__":
    main()

"""Run by one process, which forks four: rings whose processes share heads in pairs against one process, and what is sent."""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.multiprocessing as mp
from context_parallel_run import arguments, gradients_differ, leave, made, run, say

SIX_HEADS = {"num_heads": 6, "hidden_size": 48, "position_encoding": "rope_3d"}


def counted(send, tensor, kept):
    """`send`, and a list to which it adds the bytes of its argument `tensor`, without the share that `kept` says stays here."""
    sizes = []

    def sending(*args, **keywords):
        sizes.append(args[tensor].numel() * args[tensor].element_size() * (1 - kept(keywords)))
        return send(*args, **keywords)

    return sending, sizes


def compare(rank: int, store: str) -> None:
    """Print what differs between the model of this process and that of all four."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
    model, given = made(depth=2, **SIX_HEADS), arguments()
    output, gradients = run(model, given)
    model.enable_context_parallel(ring=2)
    own_part = lambda keywords: 1 / dist.get_world_size(keywords["group"])  # noqa: E731
    dist.all_to_all_single, by_heads = counted(dist.all_to_all_single, tensor=1, kept=own_part)
    functional.permute_tensor, around = counted(functional.permute_tensor, tensor=0, kept=lambda _: 0)
    shared, parts = run(model, given)
    say("pairs", f"{float((output - shared).abs().max() / output.abs().max())} {gradients_differ(parts, gradients)}")
    parallel = model.context_parallel
    groups = [dist.get_process_group_ranks(group) for group in (parallel.ring, parallel.head_group)]
    said = [None] * 4
    dist.all_gather_object(said, groups)
    say("groups", said)
    tokens = 2 * 4 * 16 // 4  # clips, frames and patches, of which each process holds a quarter
    say("sent", sum(by_heads + around) / (2 * SIX_HEADS["hidden_size"] * tokens))
    leave(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(compare, (os.path.join(folder, "store"),), nprocs=4, start_method="fork")

"""Run by two processes: compare a context-parallel model with the same model alone, and print the differences."""

import torch
import torch.distributed as dist

from stdit.model.stdit import STDiT
from stdit.nn.checkpointing import CHECKPOINTING
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.training.parallel import leave
from stdit.vae import load_vae

SMALL = {"depth": 4, "hidden_size": 32, "num_heads": 4, "in_channels": 4, "num_classes": 3, "sample_size": (4, 8, 8)}
FACTORIZED = {"axes": ["spatial", "temporal"]}
CASES = {
    "joint": ({}, {}),
    "factorized": (FACTORIZED, {}),
    "factorized of three heads": ({**FACTORIZED, "num_heads": 1, "hidden_size": 24}, {}),
    "rope": ({"position_encoding": "rope_3d", "qk_norm": True}, {}),
    "causal": ({"causal": True, "position_encoding": "rope_3d"}, {"per_frame": True}),
    "window": ({"causal": True, "window": 2, "sink": 1, "position_encoding": "rope_3d", **FACTORIZED}, {"per_frame": True}),
    "teacher forcing": ({"causal": True, "window": 2, "position_encoding": "rope_3d"}, {"per_frame": True, "history": True}),
    "levels per patch": ({}, {"per_patch": True}),
    "captions": ({"conditioning": "cross_attention", "caption_channels": 8}, {"captions": True}),
    "checkpointing": ({"position_encoding": "rope_3d"}, {"checkpointing": True}),
    "selective checkpointing": (FACTORIZED, {"checkpointing": "selective"}),
    "ring": ({}, {"ring": 2}),
    "ring of three heads": ({"num_heads": 3, "hidden_size": 24, "position_encoding": "rope_3d", "qk_norm": True}, {"ring": 2}),
    "ring, factorized": (FACTORIZED, {"ring": 2, "per_frame": True}),
    "ring, levels per patch": ({}, {"ring": 2, "per_patch": True}),
    "ring, captions": ({"conditioning": "cross_attention", "caption_channels": 8}, {"ring": 2, "captions": True}),
    "ring, checkpointing": ({}, {"ring": 2, "checkpointing": True}),
    "ring, selective checkpointing": ({"position_encoding": "rope_3d"}, {"ring": 2, "checkpointing": "selective"}),
}  # fmt: skip


def made(**settings):
    torch.manual_seed(0)
    model = STDiT(**{**SMALL, "learn_sigma": False, **settings})
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def arguments(per_frame=False, per_patch=False, history=False, captions=False):
    torch.manual_seed(1)
    x = torch.randn(2, 4, 4, 8, 8)
    shape = (2, 4, 16) if per_patch else (2, 4) if per_frame else (2,)
    found = {"hidden_states": x, "timestep": 1000 * torch.rand(shape), "class_labels": torch.tensor([0, 2])}
    if history:
        found["history"] = (torch.randn_like(x), 1000 * torch.rand(2, 4))
    if captions:
        found["captions"] = torch.randn(2, 5, 8)
    return found


def run(model, given):
    model.zero_grad()
    output = model(**given)
    torch.manual_seed(2)
    (output * torch.randn_like(output)).sum().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gradients_differ(parts, gradients):
    """The largest difference of the mean of the processes' gradients, relative to the largest gradient of a tensor."""
    worst = 0.0
    for key, expected in gradients.items():
        mean = parts[key].clone()
        dist.all_reduce(mean)
        difference = (mean / dist.get_world_size() - expected).abs().max()
        worst = max(worst, float(difference / expected.abs().max().clamp(min=1e-3)))
    return worst


def say(name, text):
    if dist.get_rank() == 0:
        print(f"{name}: {text}", flush=True)


def refusal(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def main():
    dist.init_process_group("gloo")
    for name, (settings, how) in CASES.items():
        how = dict(how)
        model = made(**settings)
        if checkpointing := how.pop("checkpointing", False):
            model.enable_gradient_checkpointing(CHECKPOINTING[checkpointing])
        ring = how.pop("ring", 1)
        given = arguments(**how)
        output, gradients = run(model, given)
        model.enable_context_parallel(ring=ring)
        shared, parts = run(model, given)
        say(name, f"{float((output - shared).abs().max() / output.abs().max())} {gradients_differ(parts, gradients)}")
    model = made()
    vae = load_vae("tiny")
    pipeline = STDiTPipeline(made(in_channels=16), vae, STDiTScheduler("flow"), num_frames=13, height=64, width=64)
    options = {"class_labels": [1, 2], "num_inference_steps": 3, "precision": "fp32", "progress": False}
    alone = pipeline(**options)
    pipeline.transformer.enable_context_parallel()
    say("sample", float((pipeline(**options) - alone).abs().max()))
    pipeline.transformer.enable_context_parallel(ring=2)
    say("ring, sample", float((pipeline(**options) - alone).abs().max()))
    model.enable_context_parallel()
    say("frames", refusal(lambda: model(torch.randn(1, 4, 5, 8, 8), torch.ones(1), torch.tensor([0]))))
    three = made(num_heads=3, hidden_size=24)
    say("heads", refusal(three.enable_context_parallel))
    say("ring, division", refusal(lambda: model.enable_context_parallel(ring=3)))
    say("ring, causal", refusal(lambda: made(causal=True, position_encoding="rope_3d").enable_context_parallel(ring=2)))
    say("in-context", refusal(lambda: made(conditioning="in_context").enable_context_parallel()))
    from stdit.nn.cache import FrameCache

    causal = made(causal=True, position_encoding="rope_3d")
    causal.enable_context_parallel()
    say("stream", refusal(lambda: causal(torch.randn(1, 4, 2, 8, 8), torch.ones(1), torch.tensor([0]), FrameCache())))
    leave(0)


if __name__ == "__main__":
    main()

"""Checks of `stdit gpu-check --section core`: numbers against the CPU, kernels, exact resume, shards, packing, Muon."""

import contextlib
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from stdit.checkpoint.convert import to_stdit
from stdit.checkpoint.files import Weights
from stdit.diffusion.objective import ObjectiveConfig, build_objective
from stdit.model.cost import training_memory
from stdit.model.stdit import STDiT
from stdit.nn.attention import explicit_attention
from stdit.nn.cache import FrameCache
from stdit.nn.checkpointing import CHECKPOINTING
from stdit.nn.layout import Kernel
from stdit.nn.ring_attention import attend_in_ring
from stdit.precision import autocast
from stdit.recipes import train
from stdit.recipes.gpu_models import deterministic, inputs, relative, small_model, train_steps
from stdit.recipes.machine import Machine
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.training.averages import PowerAverages
from stdit.training.config import ParallelConfig
from stdit.training.loop_state import LoopState
from stdit.training.muon import orthogonalize
from stdit.training.optim import build_optimizers
from stdit.training.parallel import group_of_one, is_sharded, local_parameters, parallelize
from stdit.training.shards import ShardWriter
from stdit.training.state import load_checkpoint
from stdit.training.step import LatentBatch, diffusion_losses
from stdit.vae import load_vae


@torch.no_grad()
def forward_matches_cpu(machine: Machine) -> str:
    """Compare a forward pass on the device, in float32 and in bfloat16, with the CPU."""
    model, (x, t, y) = small_model(machine).eval(), inputs()
    expected = model(x, t, y)
    given = [part.to(machine.device) for part in (x, t, y)]
    model.to(machine.device)
    exact = relative(model(*given), expected)
    with autocast("bf16", machine.device):
        half = relative(model(*given), expected)
    assert exact < 1e-5, f"float32 differs by {exact:.1e}"
    assert half < 2e-2, f"bfloat16 differs by {half:.1e}"
    return f"float32 {exact:.1e}, bfloat16 {half:.1e} from the CPU"


@torch.no_grad()
def attention_backends_agree(machine: Machine) -> str:
    """Compare every attention back end that is available here with the native one, in bfloat16."""
    model, (x, t, y) = small_model(machine).eval().to(machine.device).bfloat16(), inputs()
    given = x.to(machine.device).bfloat16(), t.to(machine.device), y.to(machine.device)
    expected, results = model(*given), []
    for name in ("_native_math", "_native_flash", "_native_efficient", "_native_cudnn", "flash"):
        try:
            model.set_attention_backend(name)
            difference = relative(model(*given), expected)
        except (RuntimeError, ValueError, ImportError) as error:
            results.append(f"{name} not here ({str(error).splitlines()[0][:50]})")
            continue
        finally:
            model.set_attention_backend("native")
        assert difference < 2e-2, f"{name} differs by {difference:.1e}"
        results.append(f"{name} {difference:.1e}")
    return ", ".join(results)


@torch.no_grad()
def vae_matches_cpu(machine: Machine) -> str:
    """Compare encoding and decoding by the tiny VAE with the CPU, and an image with its clip's first latent frame."""
    vae, clip = load_vae("tiny"), torch.rand((1, 3, 9, 64, 64)) * 2 - 1
    latents = vae.encode(clip)
    pixels = vae.decode(latents)
    vae.to(machine.device)
    found = (
        relative(vae.encode(clip.to(machine.device)), latents),
        relative(vae.decode(latents.to(machine.device)), pixels),
    )
    assert max(found) < 1e-3, f"differs by {max(found):.1e}"
    image = vae.encode(clip[:, :, :1].to(machine.device))
    assert torch.equal(image, vae.encode(clip.to(machine.device))[:, :, :1]), "an image is not its clip's first frame"
    return f"encode {found[0]:.1e}, decode {found[1]:.1e} from the CPU; image = first frame exactly"


@torch.no_grad()
def originals_numbers_come_out(machine: Machine) -> str:
    """Compare DiT, SiT and Latte with the outputs of their original code (tests/checkpoint/reference)."""
    folder, results = Path(__file__).resolve().parents[2] / "tests/checkpoint/reference", []
    assert folder.is_dir(), f"{folder} is missing; run this from a checkout of the repository"
    for name in ("dit", "sit", "latte"):
        tensors = load_file(folder / f"{name}.safetensors")
        weights = {key.removeprefix("weights."): v for key, v in tensors.items() if key.startswith("weights.")}
        model = to_stdit(Weights(weights, {}, name), name, {"num_heads": 4}).model.to(machine.device)
        x = tensors["x"].transpose(1, 2) if name == "latte" else tensors["x"][:, :, None]
        t = 1000 * (1 - tensors["t"]) if name == "sit" else tensors["t"].float()
        out = model(*(part.to(machine.device) for part in (x, t, tensors["y"])))
        out = out.transpose(1, 2) if name == "latte" else out[:, :, 0]
        difference = relative(-out if name == "sit" else out, tensors["out"])
        assert difference < 1e-5, f"{name} differs by {difference:.1e}"
        results.append(f"{name} {difference:.1e}")
    return ", ".join(results)


def sampling_works(machine: Machine) -> str:
    """Sample two clips, and check their shape and that they are finite."""
    pipe = STDiTPipeline(small_model(machine), load_vae("tiny"), STDiTScheduler("flow")).to(machine.device)
    clips = pipe([0, 5], num_inference_steps=4, progress=False)
    assert clips.shape == (2, 3, 17, 64, 64), f"clips have shape {tuple(clips.shape)}"
    assert torch.isfinite(clips).all(), "clips are not finite"
    return "two clips of 17 frames"


def packed_equals_unpacked(machine: Machine) -> str:
    """Compare outputs and gradients of packed sequences, in variable-length attention, with each clip alone."""
    model = small_model(machine, axes=["spatial", "temporal", "joint"], depth=3).to(machine.device)
    shapes = [(3, 4, 6), (1, 8, 4), (5, 4, 4), (2, 2, 2)]
    clips = [torch.randn(model.in_channels, *shape, device=machine.device) for shape in shapes]
    steps = [torch.tensor(300.0, device=machine.device) for _ in shapes]
    labels = torch.zeros(len(shapes), dtype=torch.long, device=machine.device)

    def run(packed: bool, enabled: bool) -> list[torch.Tensor]:
        """Outputs of all clips, and the gradient of all weights."""
        model.zero_grad()
        with torch.autocast(machine.device.type, torch.bfloat16, enabled=enabled):
            outputs = (
                model.packed(clips, steps, labels)
                if packed
                else [model(x[None], t[None], labels[:1])[0] for x, t in zip(clips, steps, strict=True)]
            )
        sum(out.float().square().sum() for out in outputs).backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return [*(out.detach() for out in outputs), torch.cat(gradients)]

    worst = {}
    for name, enabled, limit in (("float32", False, 1e-4), ("bfloat16", True, 3e-2)):
        pairs = zip(run(True, enabled), run(False, enabled), strict=True)
        worst[name] = max(relative(a, b) for a, b in pairs)
        assert worst[name] < limit, f"{name}: {worst[name]}"
    return ", ".join(f"{name} {value:.1e}" for name, value in worst.items()) + ", with gradients"


def cached_rollout_equals_uncached(machine: Machine) -> str:
    """Compare a causal model frame by frame, with a cache, with all frames at once."""
    sunk = {"window": 3, "sink": 1, "sample_size": (6, 8, 8)}
    model = small_model(machine, axes=["joint"], causal=True, position_encoding="rope_3d", **sunk)
    model.to(machine.device).eval()
    x = torch.randn((2, model.in_channels, 6, 8, 8), device=machine.device)
    t = torch.rand(2, 6, device=machine.device) * 1000
    cache, parts = FrameCache(3, 1), []
    with torch.no_grad():
        whole = model(x, t)
        for i in range(6):
            cache.writing = True
            parts.append(model(x[:, :, i : i + 1], t[:, i : i + 1], cache=cache))
    error = relative(torch.cat(parts, 2), whole)
    assert error < 1e-4, error
    return f"{error:.1e}"


def muon_is_orthogonal(machine: Machine) -> str:
    """Compare Muon's iteration on the device with the CPU; its directions have singular values near one."""
    torch.manual_seed(0)
    matrices, found = torch.randn(3, 96, 256), {}
    expected = orthogonalize(matrices)
    for name, dtype, limit in (("float32", torch.float32, 1e-4), ("bfloat16", torch.bfloat16, 0.1)):
        directions = orthogonalize(matrices.to(machine.device, dtype))
        found[name] = relative(directions, expected)
        values = torch.linalg.svdvals(directions.float())
        assert found[name] < limit, f"{name} differs by {found[name]:.1e}"
        assert values.min() > 0.5 and values.max() < 1.35, f"{name}: singular values {values.min()} to {values.max()}"
    return ", ".join(f"{name} {value:.1e}" for name, value in found.items()) + " from the CPU"


def _training(machine: Machine, config: ParallelConfig) -> LoopState:
    """A model with Muon and AdamW and its average, in shards over a group of one or not."""
    model = small_model(machine)
    if not config.offload:
        model.to(machine.device)
    if config.shard == "fsdp":
        parallelize(model, config, init_device_mesh(machine.device.type, (1,)))
        assert is_sharded(model)
    ema = EMAModel(local_parameters(model), decay=0.9, foreach=True)
    return LoopState(model, ema, PowerAverages(model, []), build_optimizers(model, "muon", 1e-3))


def shards_of_one_process_equal_the_whole(machine: Machine) -> str:
    """FSDP2 in a group of one: losses of an unsharded model, and a checkpoint of shards resumes to the bit."""
    return _shards_equal_the_whole(machine, ParallelConfig(shard="fsdp"))


def shards_in_the_hosts_memory_equal_the_whole(machine: Machine) -> str:
    """The same with weights, gradients, averages and moments in the host's memory."""
    return _shards_equal_the_whole(machine, ParallelConfig(shard="fsdp", offload=True))


def _shards_equal_the_whole(machine: Machine, config: ParallelConfig) -> str:
    steps, half = machine.pick((20, 10), (4, 2))
    with deterministic(), tempfile.TemporaryDirectory() as name, group_of_one(machine.device.type):
        folder = Path(name)
        plain, state = _training(machine, ParallelConfig()), _training(machine, config)
        if config.offload:
            assert all(p.device.type == "cpu" for p in state.model.parameters()), "weights are not on the host"
        expected = train_steps(machine, plain.model, plain.optimizers, steps=range(steps))
        losses = train_steps(machine, state.model, state.optimizers, steps=range(half))
        state.ema.step(local_parameters(state.model))
        writer = ShardWriter(folder, 0, 1, keep=2, timeout=60.0)
        writer.write(half, state.tensors(), {**state.info(), "skipped": 0, "seconds": 0.0})
        # Training goes on while the checkpoint is written.
        losses += train_steps(machine, state.model, state.optimizers, steps=range(half, steps))
        writer.finish()
        again, checkpoint = _training(machine, config), load_checkpoint(folder)
        assert checkpoint is not None and checkpoint.step == half
        again.restore(checkpoint)
        resumed = train_steps(machine, again.model, again.optimizers, steps=range(half, steps))
    worst = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
    assert worst < 1e-5, f"losses differ by {worst:.1e}"
    assert resumed == losses[half:], f"losses after the resume differ: {resumed[-1]} and {losses[-1]}"
    return f"losses within {worst:.0e} of an unsharded model; resumed from shards to the bit"


def a_ring_of_one_equals_plain_attention(machine: Machine) -> str:
    """torch's ring attention in a group of one, in bfloat16: outputs and gradients are those of plain products."""
    shape = machine.pick((2, 4096, 16, 72), (2, 64, 2, 24))
    given = torch.randn(4, *shape, device=machine.device, dtype=torch.bfloat16)
    with group_of_one(machine.device.type):
        ring = _with_gradients(partial(attend_in_ring, group=dist.group.WORLD), given)
    plain = _with_gradients(explicit_attention, given.float())
    output, gradient = relative(ring[0], plain[0]), max(map(relative, ring[1:], plain[1:]))
    assert output < 2e-2 and gradient < 3e-2, f"outputs differ by {output:.1e}, gradients by {gradient:.1e}"
    return f"outputs {output:.1e}, gradients {gradient:.1e} from plain products in float32"


def _with_gradients(attend: Kernel, given: torch.Tensor) -> list[torch.Tensor]:
    """The output of attention for queries, keys and values, and the gradients of these by that of the output, all in `given`."""
    query, key, value, gradient = (x.clone().requires_grad_() for x in given)
    output = attend(query, key, value)
    return [output, *torch.autograd.grad(output, (query, key, value), gradient)]


# A run of Muon and AdamW on drawn shapes.
RUN = """
name: own
data: {{source: shapes, num_frames: 5, height: 32, width: 32, num_shapes: 64, workers: 0}}
model: {{size: S/2, depth: {depth}, hidden_size: {width}, num_heads: 2, axes: [spatial, temporal], qk_norm: true}}
objective: {{mask_strategy: mixed}}
train: {{steps: 4, decay_steps: 40, batch_size: 8, optimizer: muon, lr: 1.0e-3, ema_decay: 0.9, samples: 0,
        checkpoint_every: 1000, preview_every: 1000, trackers: []}}
"""


def run_resumes_to_the_bit(machine: Machine) -> str:
    """`stdit train` in one go, and in two: the exported weights are equal bit for bit."""
    steps, (depth, width) = machine.pick(12, 4), machine.pick((6, 384), (2, 32))
    with deterministic(), tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("own.yaml").write_text(RUN.format(depth=depth, width=width))
        for name, until in (("whole", steps), ("halves", steps // 2), ("halves", steps)):
            assert train.run(["own.yaml", f"name={name}", f"train.steps={until}"]) == 0, f"the run {name!r} failed"
        weights = [
            load_file(f"models/{name}/transformer/diffusion_pytorch_model.safetensors") for name in ("whole", "halves")
        ]
    different = [key for key, value in weights[0].items() if not torch.equal(value, weights[1][key])]
    assert not different, f"{len(different)} of {len(weights[0])} tensors differ, such as {different[:2]}"
    return f"{steps} steps, stopped at {steps // 2}: {len(weights[0])} tensors equal to the bit"


def planned_memory_is_right(machine: Machine) -> str:
    """Compare the planned peak of memory with the device's own count, with and without gradient checkpointing."""
    sizes = {"depth": 12, "hidden_size": 768, "num_heads": 12}
    arguments = {**machine.pick(sizes, {"depth": 2, "hidden_size": 32, "num_heads": 2}), "patch_size": (1, 2, 2),
                 "in_channels": 16, "num_classes": 12, "axes": ["spatial", "temporal"], "learn_sigma": False}  # fmt: skip
    batch, latent, results = machine.pick(16, 2), machine.pick((5, 32, 32), (2, 8, 8)), []
    for checkpointing in (False, "selective", True):
        measured = machine.peak(partial(_some_steps, machine, arguments, checkpointing, clips=(batch, latent)))
        planned = training_memory(
            arguments, latent, batch, optimizer="adamw", bf16=True, checkpointing=checkpointing, fused=True
        ).peak
        said = f"{checkpointing}: planned {planned / 2**30:.2f} GiB"
        if measured is not None:
            said += f", {planned / measured - 1:+.1%} of the measured"
            assert abs(planned / measured - 1) < 0.2, said
        results.append(said)
    return "checkpointing " + "; ".join(results)


def _some_steps(machine: Machine, arguments: dict, checkpointing: bool | str, *, clips: tuple[int, tuple]) -> None:
    """Three training steps with an average of the weights."""
    batch, latent = clips
    model = STDiT(**arguments).to(machine.device)
    if checkpointing:
        model.enable_gradient_checkpointing(CHECKPOINTING[checkpointing])
    average = [p.detach().clone() for p in model.parameters()]
    optimizer, objective = build_optimizers(model, "adamw", 1e-4)[0], build_objective(ObjectiveConfig())
    x = torch.randn((batch, 16, *latent), device=machine.device)
    y = torch.zeros(batch, 1, dtype=torch.long, device=machine.device)
    for step in range(3):
        keys = [(0, step, slot) for slot in range(batch)]
        with autocast("bf16", machine.device):
            losses = diffusion_losses(model, objective, [LatentBatch(x)], {"label": y}, keys=keys)
        losses.clips.mean().backward()
        optimizer.step()
        model.zero_grad()
    assert len(average) == len(list(model.parameters()))


CHECKS: list[Callable[[Machine], str]] = [
    forward_matches_cpu, attention_backends_agree, vae_matches_cpu, originals_numbers_come_out, sampling_works,
    packed_equals_unpacked, cached_rollout_equals_uncached, muon_is_orthogonal, shards_of_one_process_equal_the_whole,
    shards_in_the_hosts_memory_equal_the_whole, a_ring_of_one_equals_plain_attention, run_resumes_to_the_bit,
    planned_memory_is_right,
]  # fmt: skip

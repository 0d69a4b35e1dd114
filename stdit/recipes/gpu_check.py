"""Check the CUDA paths on this machine: outputs against the CPU, attention back ends, training, exact resume, sampling.

stdit gpu-check            prints one line per check; the exit code is 1 if any fails
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from stdit.checkpoint.convert import to_stdit
from stdit.checkpoint.files import Weights
from stdit.diffusion.config import DEFAULT_MASK_PROBS
from stdit.diffusion.objective import ObjectiveConfig, build_objective
from stdit.model.config import size_arguments
from stdit.model.cost import training_memory
from stdit.model.stdit import STDiT
from stdit.nn.cache import FrameCache
from stdit.precision import autocast
from stdit.recipes.entry import command, command_parser
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.training.optim import build_optimizers
from stdit.training.state import flatten_optimizer, load_checkpoint, restore_optimizer, save_checkpoint
from stdit.training.step import LatentBatch, diffusion_losses
from stdit.vae import load_vae


def small_model(**changes) -> STDiT:
    """A small model with random weights everywhere, on the CPU; changes: arguments of `STDiT`."""
    torch.manual_seed(0)
    arguments = {"depth": 4, "hidden_size": 256, "num_heads": 4, "in_channels": 16, "num_classes": 12, "learn_sigma": False,
                 "axes": ["spatial", "temporal"], "qk_norm": True, **changes}  # fmt: skip
    model = STDiT(**arguments)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.02 * torch.randn_like(value))
    return model


def inputs(batch: int = 4):
    """Latents (B, 16, 5, 16, 16), timesteps (B, 5) and labels (B,) for `small_model`, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((batch, 16, 5, 16, 16), generator=generator)
    return x, torch.rand(batch, 5, generator=generator) * 1000, torch.arange(batch)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """The relative error of `a` against `b`, in the L2 norm."""
    return ((a.float().cpu() - b.float().cpu()).norm() / b.float().cpu().norm()).item()


@torch.no_grad()
def forward_matches_cpu() -> str:
    """Compare a forward pass on the GPU, in float32 and in bfloat16, with the CPU."""
    model, (x, t, y) = small_model().eval(), inputs()
    expected = model(x, t, y)
    torch.backends.cuda.matmul.allow_tf32 = False
    model.cuda()
    exact = relative(model(x.cuda(), t.cuda(), y.cuda()), expected)
    with autocast("bf16", "cuda"):
        half = relative(model(x.cuda(), t.cuda(), y.cuda()), expected)
    assert exact < 1e-5, f"float32 differs by {exact:.1e}"
    assert half < 2e-2, f"bfloat16 differs by {half:.1e}"
    return f"float32 {exact:.1e}, bfloat16 {half:.1e} from the CPU"


@torch.no_grad()
def attention_backends_agree() -> str:
    """Compare every attention back end that is available here with the native one, in bfloat16."""
    model, (x, t, y) = small_model().eval().cuda().bfloat16(), inputs()
    x, t, y = x.cuda().bfloat16(), t.cuda(), y.cuda()
    expected, results = model(x, t, y), []
    for name in ("_native_flash", "_native_efficient", "_native_cudnn", "flash"):
        try:
            model.set_attention_backend(name)
            difference = relative(model(x, t, y), expected)
        except (RuntimeError, ValueError, ImportError) as error:
            results.append(f"{name} not here ({str(error).splitlines()[0][:50]})")
            continue
        finally:
            model.set_attention_backend("native")
        assert difference < 2e-2, f"{name} differs by {difference:.1e}"
        results.append(f"{name} {difference:.1e}")
    return ", ".join(results)


@torch.no_grad()
def vae_matches_cpu() -> str:
    """Compare encoding and decoding by the tiny VAE with the CPU, and an image with its clip's first latent frame."""
    vae, clip = load_vae("tiny"), torch.rand((1, 3, 9, 64, 64)) * 2 - 1
    latents = vae.encode(clip)
    pixels = vae.decode(latents)
    vae.cuda()
    found = relative(vae.encode(clip.cuda()), latents), relative(vae.decode(latents.cuda()), pixels)
    assert max(found) < 1e-3, f"differs by {max(found):.1e}"
    image = vae.encode(clip[:, :, :1].cuda())
    assert torch.equal(image, vae.encode(clip.cuda())[:, :, :1]), "an image is not its clip's first latent frame"
    return f"encode {found[0]:.1e}, decode {found[1]:.1e} from the CPU; image = first frame exactly"


@torch.no_grad()
def originals_numbers_come_out() -> str:
    """Compare DiT, SiT and Latte with the outputs of their original code (tests/checkpoint/reference)."""
    torch.backends.cuda.matmul.allow_tf32 = False
    folder, results = Path(__file__).resolve().parents[2] / "tests/checkpoint/reference", []
    assert folder.is_dir(), f"{folder} is missing; run this from a checkout of the repository"
    for name in ("dit", "sit", "latte"):
        tensors = load_file(folder / f"{name}.safetensors")
        weights = {key.removeprefix("weights."): v for key, v in tensors.items() if key.startswith("weights.")}
        model = to_stdit(Weights(weights, {}, name), name, {"num_heads": 4}).model.cuda()
        x = tensors["x"].transpose(1, 2) if name == "latte" else tensors["x"][:, :, None]
        t = 1000 * (1 - tensors["t"]) if name == "sit" else tensors["t"].float()
        out = model(x.cuda(), t.cuda(), tensors["y"].cuda())
        out = out.transpose(1, 2) if name == "latte" else out[:, :, 0]
        difference = relative(-out if name == "sit" else out, tensors["out"])
        assert difference < 1e-5, f"{name} differs by {difference:.1e}"
        results.append(f"{name} {difference:.1e}")
    return ", ".join(results)


def planned_memory_is_right() -> str:
    """Compare the planned peak of memory with CUDA's own count, with and without gradient checkpointing."""
    arguments = {**size_arguments("B/2"), "in_channels": 16, "num_classes": 12, "axes": ["spatial", "temporal"], "learn_sigma": False}  # fmt: skip
    results = []
    for checkpointing in (False, True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model = STDiT(**arguments).cuda()
        if checkpointing:
            model.enable_gradient_checkpointing()
        average = [p.detach().clone() for p in model.parameters()]
        optimizer, objective = build_optimizers(model, "adamw", 1e-4)[0], build_objective(ObjectiveConfig())
        x, y = torch.randn((16, 16, 5, 32, 32), device="cuda"), torch.zeros(16, dtype=torch.long, device="cuda")
        for step in range(3):
            with autocast("bf16", "cuda"):
                losses = diffusion_losses(
                    model,
                    objective,
                    [LatentBatch(x)],
                    {"label": y[:, None]},
                    keys=[(0, step, slot) for slot in range(16)],
                )
            losses.clips.mean().backward()
            optimizer.step()
            model.zero_grad()
        measured = torch.cuda.max_memory_allocated() - before
        del model, average, optimizer, losses
        planned = training_memory(
            arguments, (5, 32, 32), 16, optimizer="adamw", bf16=True, checkpointing=checkpointing, fused=True
        ).peak
        assert abs(planned / measured - 1) < 0.2, f"planned {planned / 2**30:.2f} GiB, measured {measured / 2**30:.2f}"
        results.append(f"{'with' if checkpointing else 'without'} checkpointing {planned / measured - 1:+.1%}")
    return ", ".join(results)


def train_steps(model, optimizers, first: int, last: int) -> list[float]:
    """Train steps `first` to `last` - 1 with mixed mask strategies; returns their losses."""
    objective, losses = (
        build_objective(ObjectiveConfig(mask_strategy="mixed", mask_probs=dict.fromkeys(DEFAULT_MASK_PROBS, 1.0))),
        [],
    )
    x, _, y = (part.cuda() for part in inputs(8))
    clips = LatentBatch(x, lambda starts: x.transpose(1, 2)[starts])
    for step in range(first, last):
        with autocast("bf16", "cuda"):
            keys = [(0, step, slot) for slot in range(len(x))]
            result = diffusion_losses(
                model, objective, [clips], {"label": y[:, None]}, keys=keys, patch=model.patch_size
            )
        result.clips.mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        model.zero_grad()
        losses.append(result.clips.mean().item())
    return losses


def resume_is_exact() -> str:
    """Train 20 steps, and again with a checkpoint and a resume at step 10: the losses must be equal bit for bit."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    whole = small_model().cuda()
    expected = train_steps(whole, build_optimizers(whole, "adamw", 1e-3), 0, 20)
    with tempfile.TemporaryDirectory() as folder:
        half = small_model().cuda()
        optimizers = build_optimizers(half, "adamw", 1e-3)
        train_steps(half, optimizers, 0, 10)
        tensors, numbers = flatten_optimizer(optimizers[0])
        save_checkpoint(
            Path(folder), 10, {"model": dict(half.state_dict()), "optimizer": tensors}, {"numbers": numbers}
        )
        again, checkpoint = small_model().cuda(), load_checkpoint(Path(folder))
        assert checkpoint is not None
        again.load_state_dict(checkpoint.tensors["model"])
        optimizers = build_optimizers(again, "adamw", 1e-3)
        restore_optimizer(optimizers[0], checkpoint.tensors["optimizer"], checkpoint.info["numbers"])
        losses = train_steps(again, optimizers, 10, 20)
    torch.use_deterministic_algorithms(False)
    assert losses == expected[10:], f"losses differ: {losses[-1]} and {expected[-1]}"
    assert expected[-1] < expected[0], "the loss does not fall"
    return f"20 steps, stopped at 10: the same losses to the bit ({expected[0]:.3f} to {expected[-1]:.3f})"


def sampling_works() -> str:
    """Sample two clips, and check their shape and that they are finite."""
    pipe = STDiTPipeline(small_model(), load_vae("tiny"), STDiTScheduler("flow")).to("cuda")
    clips = pipe([0, 5], num_inference_steps=4, progress=False)
    assert clips.shape == (2, 3, 17, 64, 64), f"clips have shape {tuple(clips.shape)}"
    assert torch.isfinite(clips).all(), "clips are not finite"
    return "two clips of 17 frames"


def compiled_matches() -> str:
    """Compare the forward pass of compiled blocks with eager execution."""
    model, (x, t, y) = small_model().eval().cuda(), inputs()
    with torch.no_grad():
        expected = model(x.cuda(), t.cuda(), y.cuda())
        model.compile_repeated_blocks(fullgraph=True)
        difference = relative(model(x.cuda(), t.cuda(), y.cuda()), expected)
    assert difference < 1e-4, f"differs by {difference:.1e}"
    return f"{difference:.1e} from eager"


def xl_speed() -> str:
    """Measure the training step of DiT-XL/2 at 256 px with a batch of 32."""
    with torch.device("cuda"):
        model = STDiT.from_size("XL/2", num_classes=1000, in_channels=4, axes=["spatial"])
    objective, optimizers = build_objective(ObjectiveConfig(name="ddpm")), build_optimizers(model, "adamw", 1e-4)
    x, y = torch.randn((32, 4, 1, 32, 32), device="cuda"), torch.randint(0, 1000, (32,), device="cuda")
    for step in range(13):
        if step == 3:
            torch.cuda.synchronize()
            began = time.perf_counter()
        with autocast("bf16", "cuda"):
            losses = diffusion_losses(
                model, objective, [LatentBatch(x)], {"label": y[:, None]}, keys=[(0, step, slot) for slot in range(32)]
            )
        losses.clips.mean().backward()
        optimizers[0].step()
        model.zero_grad()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / 10
    flops = 3 * 2 * 118.64e9 * 32 / seconds
    return f"{1 / seconds:.2f} steps/s of 32, {flops / 1e12:.0f} TFLOP/s, peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"


def packed_equals_unpacked() -> str:
    """Compare packed sequences, in variable-length flash attention, with each clip alone."""
    model = small_model(axes=["spatial", "temporal", "joint"]).to("cuda")
    shapes = [(3, 4, 6), (1, 8, 4), (5, 4, 4), (2, 2, 2)]
    clips = [torch.randn(model.in_channels, *shape, device="cuda") for shape in shapes]
    steps = [torch.tensor(300.0, device="cuda") for _ in shapes]
    labels = torch.zeros(len(shapes), dtype=torch.long, device="cuda")
    worst = {}
    for name, dtype, limit in (("float32", torch.float32, 1e-4), ("bfloat16", torch.bfloat16, 3e-2)):
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            packed = model.packed(clips, steps, labels)
            alone = [model(x[None], t[None], labels[:1])[0] for x, t in zip(clips, steps, strict=True)]
        worst[name] = max(relative(a.float(), b.float()) for a, b in zip(packed, alone, strict=True))
        assert worst[name] < limit, f"{name}: {worst[name]}"
    return ", ".join(f"{name} {value:.1e}" for name, value in worst.items())


def cached_rollout_equals_uncached() -> str:
    """Compare a causal model frame by frame, with a cache, with all frames at once."""
    sunk = {"window": 3, "sink": 1, "sample_size": (6, 8, 8)}
    model = small_model(axes=["joint"], causal=True, position_encoding="rope_3d", **sunk).to("cuda").eval()
    x, t = torch.randn((2, model.in_channels, 6, 8, 8), device="cuda"), torch.rand(2, 6, device="cuda") * 1000
    cache, parts = FrameCache(3, 1), []
    with torch.no_grad():
        whole = model(x, t)
        for i in range(6):
            cache.writing = True
            parts.append(model(x[:, :, i : i + 1], t[:, i : i + 1], cache=cache))
    error = relative(torch.cat(parts, 2), whole)
    assert error < 1e-4, error
    return f"{error:.1e}"


CHECKS: list[Callable[[], str]] = [
    forward_matches_cpu, attention_backends_agree, vae_matches_cpu, originals_numbers_come_out, resume_is_exact,
    sampling_works, packed_equals_unpacked, cached_rollout_equals_uncached, compiled_matches, planned_memory_is_right, xl_speed,
]  # fmt: skip


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run all checks; returns 1 if any fails, and 2 without a CUDA device."""
    command_parser("gpu-check", __doc__).parse_args(argv)
    if not torch.cuda.is_available():
        print("this machine has no CUDA device; run the command on a machine with one.")
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    failed = 0
    for check in CHECKS:
        try:
            print(f"ok    {check.__name__}: {check()}", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAIL  {check.__name__}: {type(error).__name__}: {error}", flush=True)
    return 1 if failed else 0

"""Checks of `stdit gpu-check --section compile`: blocks as one graph each, their numbers, runs with them, their speed."""

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from stdit.nn.checkpointing import CHECKPOINTING
from stdit.recipes import train
from stdit.recipes.gpu_core import RUN
from stdit.recipes.gpu_models import deterministic, inputs, published_size, relative, small_model, train_steps
from stdit.recipes.gpu_speed import image_batch, step_report
from stdit.recipes.machine import Machine
from stdit.training.compiled import compile_blocks
from stdit.training.optim import build_optimizers

# Models whose blocks differ in what a graph could break at.
VARIANTS: dict[str, dict] = {
    "factorized": {},
    "joint": {"axes": ["joint"], "position_encoding": "rope_3d"},
    "causal window": {"axes": ["joint"], "causal": True, "window": 2, "position_encoding": "rope_3d"},
}


@torch.no_grad()
def outputs_match(machine: Machine) -> str:
    """Compare the forward pass of compiled blocks with eager execution, in float32."""
    found = {}
    for name, changes in VARIANTS.items():
        torch._dynamo.reset()
        model = small_model(machine, **changes).eval().to(machine.device)
        given = [part.to(machine.device) for part in inputs()]
        expected = model(*given)
        compile_blocks(model, backend=machine.compiler)
        found[name] = relative(model(*given), expected)
        assert found[name] < 1e-4, f"{name} differs by {found[name]:.1e}"
    return ", ".join(f"{name} {value:.1e}" for name, value in found.items()) + " from eager, each block one graph"


def steps_match(machine: Machine) -> str:
    """Compare the losses of training steps with compiled blocks with those of eager ones, in float32."""
    torch._dynamo.reset()
    losses = []
    for compiled in (False, True):
        model = small_model(machine).to(machine.device)
        if compiled:
            compile_blocks(model, backend=machine.compiler)
        optimizers = build_optimizers(model, "adamw", 1e-3)
        losses.append(train_steps(machine, model, optimizers, steps=range(machine.pick(8, 3)), precision="fp32"))
    worst = max(abs(a / b - 1) for a, b in zip(*losses, strict=True))
    assert worst < 1e-3, f"losses differ by {worst:.1e}"
    return f"{len(losses[0])} steps, losses within {worst:.0e} of eager ones"


def runs_compiled(machine: Machine) -> str:
    """`stdit train train.compile=true`, stopped and resumed, ends with finite weights."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("own.yaml").write_text(RUN.format(depth=2, width=machine.pick(384, 32)))
        # A machine without a compiler runs the same command without graphs.
        compiled = f"train.compile={machine.pick('true', 'false')}"
        for until in (2, 4):
            assert train.run(["own.yaml", compiled, f"train.steps={until}"]) == 0, "the run failed"
        assert Path("models/own/model_index.json").is_file(), "no model was exported"
    return "two runs of one command, exported"


def checkpointing_keeps_gradients(machine: Machine) -> str:
    """Gradients with selective and with full checkpointing are those without, to the bit where two passes agree to it."""
    with deterministic():
        plain, again, *others = (_gradient(machine, kind) for kind in (False, False, "selective", True))
    noise = relative(again, plain)  # kernels of attention may add in any order
    worst = max(relative(other, plain) for other in others)
    assert worst <= 2 * noise, f"gradients differ by {worst:.1e}, those of two equal passes by {noise:.1e}"
    return f"{plain.numel()} numbers " + (f"within {worst:.1e}, as two equal passes" if noise else "equal to the bit")


def _gradient(machine: Machine, checkpointing: bool | str) -> torch.Tensor:
    """The gradient of all weights of a small model, as one vector."""
    model = small_model(machine).to(machine.device)
    if checkpointing:
        model.enable_gradient_checkpointing(CHECKPOINTING[checkpointing])
    x, t, y = (part.to(machine.device) for part in inputs())
    model(x, t, y).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def image_speed(machine: Machine) -> str:
    """The training step of DiT-XL/2 at 256 px with compiled blocks, in bfloat16."""
    torch._dynamo.reset()
    arguments = published_size(machine, axes=["spatial"])
    return step_report(machine, arguments, image_batch(machine), compiled=True)


CHECKS: list[Callable[[Machine], str]] = [
    checkpointing_keeps_gradients, outputs_match, steps_match, image_speed, runs_compiled,
]  # fmt: skip

"""Blocks that torch compiles for training."""

import copy

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from functorch.compile import make_boxed_func
from safetensors.torch import load_file
from torch._dynamo.backends.common import aot_autograd

from stdit.config import Config, load_typed
from stdit.model.stdit import STDiT
from stdit.recipes import build, train
from stdit.training import compiled
from stdit.training.compiled import compile_blocks, compiler_error
from stdit.training.loop_state import swap_ema

INPUTS = (torch.zeros(2, 4, 3, 4, 4), torch.tensor([500.0, 500.0]), torch.tensor([0, 1]))
SHORT = ["train.steps=1999"]
LONG = ["train.steps=2000"]


def tiny(**settings):
    return STDiT(depth=1, hidden_size=16, num_heads=2, in_channels=4, num_classes=2, axes=["joint"], **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"axes": ["spatial", "temporal"], "qk_norm": True},
        {"causal": True, "window": 2, "position_encoding": "rope_3d"},
    ],
)
def test_blocks_compile_as_one_graph_with_equal_gradients(settings):
    torch.manual_seed(0)
    model = STDiT(depth=2, hidden_size=32, num_heads=2, in_channels=4, num_classes=2, **settings)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    inputs = (torch.randn(2, 4, 3, 8, 8), 1000 * torch.rand(2), torch.tensor([0, 1]))

    def gradients():
        model.zero_grad()
        model(*inputs).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before, names = gradients(), set(model.state_dict())
    torch._dynamo.reset()
    compile_blocks(model, backend="aot_eager")  # the graphs of torch.compile, without a compiler
    after = gradients()
    assert set(model.state_dict()) == names
    assert max(float((after[k] - before[k]).abs().max()) for k in before) < 1e-6


def test_compiled_blocks_take_more_kinds_of_batches_than_torchs_limit():
    model = STDiT(depth=1, hidden_size=16, num_heads=2, in_channels=4, num_classes=2, axes=["joint"])
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        compile_blocks(model, backend="eager")
        for shape in ((2,), (2, 3), (2, 3, 4)):  # levels of clips, of frames and of patches
            model(torch.randn(2, 4, 3, 4, 4), 1000 * torch.rand(shape), torch.tensor([0, 1]))


def fails(*_):
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize(
    "backend",
    [fails, aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=fails)],
    ids=["forward", "backward"],
)
def test_a_block_at_which_the_compiler_fails_runs_as_it_is_where_compiling_is_not_required(backend):
    model = tiny()
    plain = copy.deepcopy(model)
    torch._dynamo.reset()
    with (
        torch._dynamo.config.patch(suppress_errors=False),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=False),
    ):
        compile_blocks(model, backend=backend, required=False)
        for one in (model, plain):
            one(*INPUTS).square().sum().backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_averaged_weights_run_uncompiled_and_training_goes_on_with_its_graphs():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    model = tiny()
    plain = copy.deepcopy(model)
    torch._dynamo.reset()
    compile_blocks(model, backend=backend)
    ema = EMAModel(list(model.parameters()))
    model(*INPUTS)
    trained = len(graphs)
    assert trained
    with torch.no_grad(), swap_ema(model, ema):
        assert torch.equal(model(*INPUTS), plain.eval()(*INPUTS))
    assert len(graphs) == trained
    model(*INPUTS)
    assert len(graphs) == trained


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (LONG, "auto"),
        (SHORT, False),
        ([*LONG, "train.compile=false"], False),
        ([*SHORT, "train.compile=true"], True),
        ([*LONG, "model.gradient_checkpointing=selective"], False),
        ([*LONG, "train.parallel.context=2"], False),
    ],
)
def test_long_runs_are_compiled_where_a_compiler_works(settings, expected, monkeypatch, capsys):
    monkeypatch.setattr(build, "compiler_error", lambda device: None)
    assert (
        build.compiles_blocks(load_typed(Config, "configs/quickstart.yaml", settings), Accelerator(cpu=True))
        == expected
    )
    assert ("compiled in the first steps" in capsys.readouterr().out) == (expected == "auto")


def test_a_long_run_without_a_compiler_says_why_it_is_not_compiled(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("\nno g++ on this machine\nfurther lines")

    monkeypatch.setattr(compiled.torch, "compile", broken)
    assert compiler_error(torch.device("cpu")) == "no g++ on this machine"
    assert not build.compiles_blocks(load_typed(Config, "configs/quickstart.yaml", LONG), Accelerator(cpu=True))
    assert "no compiler works here: no g++ on this machine" in capsys.readouterr().out


@pytest.mark.slow
def test_a_compiled_run_that_is_resumed_equals_the_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch):
    if error := compiler_error(torch.device("cpu")):
        pytest.skip(f"torch.compile: {error}")
    monkeypatch.chdir(tmp_path)
    common = [
        "quickstart",
        "data.source=shapes",
        "data.num_frames=5",
        "data.height=32",
        "data.width=32",
        "model.depth=1",
    ]
    common += [
        "data.num_shapes=24",
        "train.samples=0",
        "train.guide_step=null",
        "train.compile=true",
        "train.batch_size=4",
    ]
    assert train.run([*common, "name=whole", "train.steps=12"]) == 0
    for steps in (5, 12):
        assert train.run([*common, "name=parts", f"train.steps={steps}"]) == 0
    whole, parts = (load_file(f"checkpoints/{name}/step-12/model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from stdit.model.config import size_arguments
from stdit.model.cost import forward_cost, training_memory
from stdit.model.stdit import STDiT
from stdit.nn.checkpointing import CHECKPOINTING
from stdit.nn.positions import spatial_pos_embed
from stdit.recipes import bench_memory, model_table, plan

IMAGE = {"num_classes": 1000, "in_channels": 4, "axes": ["spatial"]}


def parameters(depth: int, width: int, patch: int) -> int:
    """DiT's trainable parameters, counted by hand: 4 channels, 1000 classes and null, learned variance."""
    embedders = width * 4 * patch**2 + width + 257 * width + width**2 + width + 1001 * width
    block = 18 * width**2 + (6 + 3 + 1 + 5) * width
    final = 2 * width**2 + 2 * width + (width + 1) * 8 * patch**2
    return embedders + depth * block + final


@pytest.mark.parametrize("size", model_table.PAPER)
def test_gflops_and_parameters_equal_the_papers(size):
    arguments = {**size_arguments(size), **IMAGE}
    cost = forward_cost(arguments, (1, 32, 32))
    millions, gflops = model_table.PAPER[size]
    assert abs(cost.total / 1e9 / gflops - 1) < 0.01
    assert round(cost.parameters / 1e6) == millions  # the paper counts trained parameters only
    patch = arguments["patch_size"][1]
    assert cost.parameters == parameters(arguments["depth"], arguments["hidden_size"], patch)
    assert cost.table == (32 // patch) ** 2 * arguments["hidden_size"]


def test_parameters_with_the_position_table_equal_dits():
    for size, with_table in (("S/2", 32_963_360), ("XL/2", 675_129_632)):
        cost = forward_cost({**size_arguments(size), **IMAGE}, (1, 32, 32))
        assert cost.parameters + cost.table == with_table


def test_gflops_of_xl_at_512_pixels_equal_the_papers():
    cost = forward_cost({**size_arguments("XL/2"), **IMAGE}, (1, 64, 64))
    assert abs(cost.total / 1e9 / model_table.PAPER_512 - 1) < 0.01


def small(axes):
    return {"depth": 4, "hidden_size": 64, "num_heads": 4, "in_channels": 4, "num_classes": 0, "axes": axes}


def test_joint_attention_grows_with_the_square_of_the_frames_and_factorized_does_not():
    def attention(axes, frames):
        flops = forward_cost(small(axes), (frames, 16, 16)).flops
        return sum(value for kind, value in flops.items() if kind.startswith("attention"))

    assert attention(["spatial", "temporal"], 64) < 5.5 * attention(["spatial", "temporal"], 16)
    assert attention(["joint"], 64) > 12 * attention(["joint"], 16)


def memory(micro_batch=4, optimizer="adamw", bf16=False, checkpointing=False, fused=True, route_ratio=0.0):
    return training_memory(
        small(["joint"]),
        (3, 16, 16),
        micro_batch,
        optimizer=optimizer,
        bf16=bf16,
        checkpointing=checkpointing,
        fused=fused,
        route_ratio=route_ratio,
    )


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing_and_16_bits():
    assert memory(8).activations == pytest.approx(2 * memory(4).activations, rel=0.01)
    assert memory(checkpointing=True).activations < 0.5 * memory().activations
    some = memory(checkpointing="selective")
    assert memory(checkpointing=True).activations < some.activations < 0.7 * memory().activations
    assert memory(bf16=True).activations < 0.8 * memory().activations
    assert memory(fused=False, bf16=True).activations > memory(bf16=True).activations
    assert memory(optimizer="muon").optimizer < memory().optimizer == 2 * memory().weights


@pytest.mark.parametrize(("checkpointing", "routed"), [(False, 0.0), (False, 0.5), ("selective", 0.0), (True, 0.0)])
def test_planned_activations_are_what_a_real_forward_pass_leaves_allocated(checkpointing, routed):
    arguments = small(["joint"])
    model = STDiT(**arguments)
    if checkpointing:
        model.enable_gradient_checkpointing(CHECKPOINTING[checkpointing])
    assert (
        memory(8, checkpointing="selective", route_ratio=0.5).recomputed
        == memory(8, checkpointing="selective").recomputed
    )
    inputs = torch.randn(8, 4, 3, 16, 16), torch.rand(8)
    visible = {"visible": torch.arange(32)[None]} if routed else {}  # of 64 patches
    model(*inputs, **visible)  # fills caches
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as allocator:
        loss = model(*inputs, **visible).square().mean()
    real = sum(event.self_cpu_memory_usage for event in allocator.key_averages())
    planned = memory(8, checkpointing=checkpointing, route_ratio=routed).activations
    assert loss.requires_grad and planned == pytest.approx(real, rel=0.1)


def test_planning_leaves_no_trace_in_the_position_tables():
    memory()
    assert type(spatial_pos_embed(8, 8, 64)) is torch.Tensor


CONFIG = """
name: p
vae: {name: Wan-AI/Wan2.1-T2V-1.3B-Diffusers/vae}
data: {num_frames: 17, height: 64, width: 64}
model: {size: S/2, depth: 4, axes: [spatial, temporal]}
train: {steps: 1000, batch_size: 64, micro_batch: 8}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(CONFIG)
    return str(path)


def test_a_plan_prints_tokens_memory_speed_and_what_fits_without_weights_or_network(config, capsys):
    assert plan.main([config, "--gpu", "A100", "--count", "2"]) == 0
    said = capsys.readouterr().out
    assert "latents [5, 8, 8], 80 tokens per clip" in said
    for word in (
        "weights",
        "gradients",
        "optimizer",
        "ema",
        "without checkpointing  <- as configured",
        "with selective checkpointing",
        "with full checkpointing",
        "peak",
        "reserved",
        "too small for A100",
        "largest",
    ):
        assert word in said


def test_a_run_that_does_not_fit_fails_only_with_refuse(config, capsys):
    too_small = ["--memory", "1.6", "--gpu", "L4"]
    assert plan.main([config, *too_small]) == 0
    assert "does not fit" in capsys.readouterr().out
    assert plan.main([config, *too_small, "--refuse"]) == 1


def test_a_device_with_tflops_and_memory_needs_no_row_in_the_table(config, capsys):
    assert plan.main([config, "--gpu", "H300", "--tflops", "3000", "--memory", "3"]) == 0
    assert "of 3 on H300" in capsys.readouterr().out


def test_the_largest_batch_is_found_where_memory_does_not_grow_linearly():
    def at(frames):
        return training_memory(
            small(["joint"]), (frames, 16, 16), 1, optimizer="adamw", bf16=True, checkpointing=False, fused=False
        )

    room = at(6).peak + 1
    assert at(plan.largest(at, room)).peak <= room


def test_the_largest_batch_fits_and_one_more_clip_does_not():
    def at(n):
        return memory(n)

    room = at(9).peak + 1
    assert plan.largest(at, room) == 9
    assert plan.largest(at, at(1).peak - 1) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--memory", "nan"], "--memory must be > 0 .* got nan"), (["train.micro_batch=7"], "train.batch_size=64 is not a multiple"), (["--gpu", "H1000"], "Unknown GPU 'H1000'. Did you mean 'H100'"), (["--utilisation", "40"], "--utilisation must be > 0 and <= 1, got 40"), (["data.num_frames=18"], "num_frames=18 does not fit VAE")],
)  # fmt: skip
def test_invalid_plan_arguments_are_refused_in_one_line(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        plan.main([config, *arguments])


def test_the_tables_print(capsys):
    assert model_table.main([]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 14
    assert model_table.main(["--size", "S/2", "--frames", "1", "3", "--latent", "8"]) == 0
    assert "attention temporal" in capsys.readouterr().out


@pytest.mark.slow
def test_the_planned_peak_is_within_a_fifth_of_five_real_runs():
    assert bench_memory.main([]) == 0

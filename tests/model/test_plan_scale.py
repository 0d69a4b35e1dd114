"""What `stdit plan` says of several devices and of deep models."""

import re
import warnings

import pytest
from safetensors import safe_open

from stdit.config import Config, load_typed
from stdit.model import cost
from stdit.model.cost import frame_growth, over_processes, training_memory
from stdit.model.stdit import STDiT
from stdit.nn.low_rank import add_lora
from stdit.recipes import cache_latents, plan

SMALL = {"depth": 6, "hidden_size": 32, "num_heads": 2, "in_channels": 4, "num_classes": 2, "sample_size": (2, 8, 8)}


@pytest.mark.parametrize(
    "further", [{}, {"axes": ["spatial", "temporal"], "position_encoding": "latte"}, {"qk_norm": True}]
)
@pytest.mark.parametrize("checkpointing", [False, "selective", True])
def test_activations_of_a_deep_stack_are_those_of_all_its_blocks(monkeypatch, further, checkpointing):
    how = {"optimizer": "adamw", "bf16": True, "checkpointing": checkpointing, "fused": True}
    short = training_memory({**SMALL, **further}, (2, 8, 8), 3, **how)
    original = cost._saved_bytes
    depths = []
    monkeypatch.setattr(
        cost, "_saved_bytes", lambda model, **k: depths.append(len(model.blocks)) or original(model, **k)
    )
    every = training_memory({**SMALL, **further, "block_sources": [None] * 6}, (2, 8, 8), 3, **how)
    assert set(depths) == {6} and short.activations == pytest.approx(every.activations, rel=1e-9)
    assert short.recomputed == pytest.approx(every.recomputed, rel=1e-9)


def test_shards_and_contexts_divide_what_they_share():
    one = training_memory(SMALL, (2, 8, 8), 2, optimizer="adamw", bf16=True, checkpointing=False, fused=True)
    many = over_processes(one, shards=8, context=2, depth=6)
    assert many.persistent == pytest.approx(one.persistent / 8) and many.activations == one.activations / 2
    assert many.peak < one.peak and over_processes(one, shards=1, context=1, depth=6) == one


def test_joint_attention_grows_with_the_square_of_long_clips_and_a_window_in_proportion():
    one, four = (frame_growth(64, (frames, 16, 16)) for frames in (64, 256))
    growth = {name: four[name] / one[name] for name in one}
    assert growth["joint"] > 12 and growth["window of 4"] == pytest.approx(4, rel=0.02) and 4 < growth["factorized"] < 9


def test_a_plan_for_many_devices_says_memory_traffic_checkpoints_and_growth(capsys):
    arguments = [
        "video",
        "model.size=S/2",
        "--count",
        "16",
        "--context",
        "2",
        "data.num_frames=29",
        "train.batch_size=64",
    ]
    assert plan.main(arguments) == 0
    whole = capsys.readouterr().out
    assert plan.main([*arguments, "--shard", "fsdp"]) == 0
    sharded = capsys.readouterr().out
    weights = [
        float(next(line for line in text.splitlines() if "weights  " in line).split()[1]) for text in (whole, sharded)
    ]
    assert weights[1] == pytest.approx(weights[0] / 16, abs=0.01)
    for word in ("of weights and gradients", "of tokens", "checkpoints", "4 x frames"):
        assert word in sharded
    with pytest.raises(ValueError, match="--context 3 does not divide --count 16"):
        plan.main([*arguments[:4], "--context", "3"])
    with pytest.raises(ValueError, match="ring=4 does not divide train.parallel.context=2"):
        plan.main([*arguments, "--ring", "4"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["train.optimizer=adamw8bit", "--shard", "fsdp"], "adamw8bit is not there for shards"),
        (["init_from.path=m", "train.lora.rank=4", "--shard", "fsdp"], "not there for a LoRA"),
        (["train.compile=true", "--context", "2"], "not there for shared frames"),
        (["--ring", "-1"], "--ring must be >= 1, got -1"),
        (["--ring", "0"], "--ring must be >= 1, got 0"),
        (["--context", "0"], "--context must be >= 1, got 0"),
    ],
)
def test_a_plan_refuses_flags_that_training_refuses_as_settings(given, said):
    with pytest.raises(ValueError, match=said):
        plan.main(["video", "--count", "8", *given])


def test_a_plan_refuses_shared_frames_that_training_refuses():
    arguments = ["video", "model.size=S/2", "model.axes=[joint]", "--count", "4", "--context", "4"]
    with pytest.raises(ValueError, match="6 heads cannot be shared by 4 processes; use train.parallel.ring=2"):
        plan.main(arguments)
    with pytest.raises(ValueError, match="not on cuda in 32 bits with heads of 64"):
        plan.main([*arguments, "--ring", "2", "train.precision=fp32"])


def test_a_plan_warns_of_frames_that_do_not_divide_and_says_the_days_with_all_that_is_sent(capsys):
    with pytest.warns(UserWarning, match="training refuses these settings: 17 frames .* use 29 frames, or"):
        assert plan.main(["video", "--count", "64", "--shard", "fsdp", "--context", "8"]) == 0
    said = capsys.readouterr().out
    hours, days = re.search(r"steps in ([0-9.]+) hours, ([0-9.]+) days if none of what is sent", said).groups()
    steps, sent = re.search(r"([0-9,]+) steps in", said)[1], re.search(r"([0-9.]+) s at 50 GB/s", said)[1]
    travel = int(steps.replace(",", "")) * float(sent) / 86400
    assert float(days) == pytest.approx(float(hours) / 24 + travel, abs=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan.main(["video", "--count", "1"]) == 0
    assert "is sent" not in capsys.readouterr().out


@pytest.mark.parametrize(("dtype", "size"), [("float16", 2), ("float32", 4)])
def test_a_plan_says_what_cached_latents_take_as_they_are_written(tmp_path, monkeypatch, capsys, dtype, size):
    monkeypatch.chdir(tmp_path)
    settings = ["data.source=shapes", "data.num_shapes=3", f"data.cache_dtype={dtype}"]
    assert cache_latents.main(["quickstart", *settings, "--output", "latents"]) == 0
    with safe_open(next((tmp_path / "latents").glob("latents-*.safetensors")), "np") as shard:
        numbers = sum(shard.get_tensor(name).size for name in shard.keys())  # noqa: SIM118
    small = ["model.hidden_size=32", "model.depth=1", "model.num_heads=2"]
    assert plan.main(["quickstart", *settings, *small, "--gpu", "cpu", "--clips", "3000000"]) == 0
    said = capsys.readouterr().out
    assert f"{numbers * size / 1e3:,.1f} GB on disk for 3,000,000 clips" in said and f"in {dtype}" in said


def test_of_a_lora_only_the_matrices_that_it_adds_take_gradients_and_moments(tmp_path, capsys):
    model = STDiT(2, 32, 2, in_channels=16, num_classes=3, sample_size=(5, 4, 4))
    model.save_pretrained(tmp_path / "model")
    start = [f"init_from.path={tmp_path / 'model'}", "train.lora.rank=4", "data.height=32", "data.width=32"]
    assert plan.main(["lora", *start, "--gpu", "cpu"]) == 0
    add_lora(model.requires_grad_(False), "own", rank=4)
    added = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"LoRA          {added:,} more" in capsys.readouterr().out
    config = load_typed(Config, "lora", start)
    arguments = plan.arguments_of(config, plan.find_vae("tiny"))
    how = {"optimizer": "adamw", "bf16": False, "checkpointing": False, "fused": True}
    whole, lora = (training_memory(arguments, (5, 4, 4), 2, trained=n, **how) for n in (None, added))
    assert (lora.gradients, lora.optimizer, lora.ema) == (4 * added, 8 * added, 4 * added)
    assert lora.weights == whole.weights + 4 * added and lora.activations == whole.activations

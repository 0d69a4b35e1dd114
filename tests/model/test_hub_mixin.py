"""Features of diffusers: each has its effect on our model, and does not only run."""

import copy

import pytest
import torch
from conftest import fill, from_noise
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.training_utils import EMAModel

from stdit.conditions import Guided
from stdit.diffusion.objective import ObjectiveConfig, build_objective
from stdit.model.stdit import STDiT
from stdit.nn import attention
from stdit.sampling.guidance import Guidance, guided
from stdit.sampling.solvers import solve

STEPS = 12


@pytest.fixture
def model(tiny_model):
    return tiny_model(depth=4, axes=["spatial", "temporal"], learn_sigma=False)


def case():
    return torch.randn(2, 4, 3, 8, 8), torch.tensor([10.0, 900.0]), torch.tensor([1, 4])


def sample(model, scale: float = 1.0):
    """Sample twelve steps of flow; returns the latents and the number of attention projections of a block."""
    calls = [0]

    def count(*_):
        calls[0] += 1

    handles = [block.attn.qkv.register_forward_pre_hook(count) for block in model.blocks]
    objective = build_objective(ObjectiveConfig())
    labels = Guided({"label": torch.tensor([[1], [2]])}, {"label": torch.tensor([[5], [5]])})
    output = guided(model, objective, labels, Guidance(scale))
    noise = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    now = {"t": 1000.0}

    def predict(x, levels):
        now["t"] = float(levels.max()) * 1000
        return objective.estimate(output(x, levels), x, levels)

    model._now = now
    with torch.no_grad():
        end = solve(from_noise(noise, objective.schedule(STEPS, 192)), predict, objective.path)
    for handle in handles:
        handle.remove()
    return end, calls[0]


CALLS = 4 * STEPS


@torch.no_grad()
def test_a_sharded_save_loads_to_the_bit(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = STDiT.from_pretrained(tmp_path)
    assert torch.equal(again(*case_of(0)), model(*case_of(0)))
    assert not any(p.is_meta for p in again.parameters())


def case_of(seed: int):
    torch.manual_seed(seed)
    return case()


@torch.no_grad()
def test_bfloat16_loading_keeps_position_and_timestep_embeddings_in_float32(model, tmp_path):
    model.save_pretrained(tmp_path)
    half = STDiT.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    seen = []
    half.t_embedder.mlp[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float()))
    half.t_embedder(torch.tensor([997.0, 998.0, 999.0]))
    angles = torch.tensor([997.0, 998.0, 999.0])[:, None]
    torch.testing.assert_close(seen[0][:, :1], angles.cos(), atol=0.005, rtol=0)  # timesteps in bfloat16 would coincide
    x, t, y = case()
    exact, rounded = model(x, t, y), half(x.bfloat16(), t, y).float()
    assert (exact - rounded).norm() / exact.norm() < 0.03


@torch.no_grad()
@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_back_ends_agree(model, backend, monkeypatch):
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry.get_active_backend()[0])
    x, asked = case(), []
    want = model(*x)
    dispatch = attention.dispatch_attention_fn

    def watched(*args, **kwargs):
        asked.append(kwargs["backend"])
        return dispatch(*args, **kwargs)

    monkeypatch.setattr(attention, "dispatch_attention_fn", watched)
    model.set_attention_backend(backend)
    torch.testing.assert_close(model(*x), want, atol=1e-5, rtol=1e-5)
    assert [str(getattr(name, "value", name)) for name in asked] == [backend] * 4
    model.reset_attention_backend()


def test_pyramid_attention_broadcast_skips_attention(model):
    plain, calls = sample(model)
    model.enable_cache(PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 1000),
        spatial_attention_block_identifiers=("blocks",), current_timestep_callback=lambda: model._now["t"],
    ))  # fmt: skip
    cached, fewer = sample(model)
    assert (calls, torch.isfinite(cached).all()) == (CALLS, True)
    assert fewer < 0.8 * CALLS
    assert not torch.equal(plain, cached)


def test_faster_cache_skips_attention_and_the_unconditional_half(model):
    sizes = []
    handle = model.x_embedder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    model.enable_cache(FasterCacheConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 900),
        unconditional_batch_skip_range=3, unconditional_batch_timestep_skip_range=(-1, 900),
        spatial_attention_block_identifiers=("blocks.*attn",), attention_weight_callback=lambda _: 0.3,
        current_timestep_callback=lambda: model._now["t"], tensor_format="BCFHW",
        _unconditional_conditional_input_kwargs_identifiers=["hidden_states", "timestep", "class_labels"],
    ))  # fmt: skip
    end, calls = sample(model, scale=2.0)
    handle.remove()
    assert torch.isfinite(end).all()
    assert calls < 0.8 * CALLS
    assert sizes.count(2) > 0  # the conditional half alone
    assert sizes.count(4) > 0


def test_first_block_cache_skips_blocks_and_at_threshold_zero_changes_nothing(model):
    plain, calls = sample(model)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    same, all_calls = sample(model)
    assert torch.equal(plain, same)
    assert all_calls == calls == CALLS
    model.disable_cache()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    assert sample(model)[1] < 0.8 * CALLS


def test_mag_cache_skips_blocks(model):
    model.enable_cache(MagCacheConfig(mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS, threshold=0.5))
    end, calls = sample(model)
    assert torch.isfinite(end).all()
    assert calls < 0.8 * CALLS


def test_taylor_seer_skips_attention(model):
    model.enable_cache(
        TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, taylor_factors_dtype=torch.float32)
    )
    end, calls = sample(model)
    assert torch.isfinite(end).all()
    assert calls < 0.8 * CALLS


@torch.no_grad()
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload_changes_no_number(model, kind):
    x = case()
    want = model(*x)
    how = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=kind, **how)
    hooked = [name for name, module in model.named_modules() if hasattr(module, "_diffusers_hook")]
    assert any(name.startswith("blocks.") for name in hooked)
    assert torch.equal(model(*x), want)


@torch.no_grad()
def test_layerwise_casting_stores_fp8_and_computes_in_float32(model):
    x = case()
    want = model(*x)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.blocks[0].mlp.fc1.weight.dtype == torch.float8_e4m3fn
    assert model.t_embedder.mlp[0].weight.dtype == model.x_embedder.proj.weight.dtype == torch.float32
    got = model(*x)
    assert 0 < (got - want).norm() / want.norm() < 0.1


@pytest.mark.parametrize("trunk", ["stack", "joint"])
@torch.no_grad()
def test_layerwise_casting_takes_captions(trunk):
    model = fill(STDiT(2, 32, 4, in_channels=4, caption_channels=8, trunk=trunk), 0.1).eval()
    inputs = torch.randn(2, 4, 2, 4, 4), torch.tensor([3.0, 700.0])
    words = {"captions": torch.randn(2, 5, 8), "caption_mask": torch.arange(5)[None] < torch.tensor([[3], [5]])}
    want = model(*inputs, **words)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert (model(*inputs, **words) - want).norm() / want.norm() < 0.2


@torch.no_grad()
def test_int8_weights_give_nearly_the_same(model):
    quanto = pytest.importorskip("optimum.quanto")
    x = case()
    want = model(*x)
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    assert type(model.blocks[0].mlp.fc1) is quanto.QLinear
    got = model(*x)
    assert 0 < (got - want).norm() / want.norm() < 0.03


def test_a_lora_is_trained_saved_loaded_and_fused(model, tmp_path):
    peft = pytest.importorskip("peft")
    base, x = copy.deepcopy(model), case()
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert 0 < sum(p.numel() for p in trained) < 0.3 * base.num_parameters()
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = (model(*x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        want = model(*x)
        model.save_lora_adapter(tmp_path)
        base.load_lora_adapter(tmp_path)
        torch.testing.assert_close(base(*x), want, atol=1e-5, rtol=1e-5)
        base.fuse_lora()
        torch.testing.assert_close(base(*x), want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_diffusers_moving_average_saves_and_loads_our_model(model, tmp_path):
    average = EMAModel(model.parameters(), decay=0.5, model_cls=STDiT, model_config=model.config)
    for p in model.parameters():
        p.add_(1)
    average.step(model.parameters())
    average.save_pretrained(tmp_path)
    again = EMAModel.from_pretrained(tmp_path, STDiT)
    assert all(torch.equal(a, b) for a, b in zip(again.shadow_params, average.shadow_params, strict=True))
    assert isinstance(STDiT.from_pretrained(tmp_path), STDiT)


def test_pushing_to_a_folder_writes_the_model_and_its_card(tiny_model, tmp_path):
    model = tiny_model(class_names=list("abcde"))
    folder = tmp_path / "mine"
    assert model.push_to_hub(str(folder)) == str(folder)
    card = (folder / "README.md").read_text()
    assert "library_name: stdit" in card
    assert "Classes: a, b, c, d, e." in card
    assert torch.equal(STDiT.from_pretrained(folder).x_embedder.proj.weight, model.x_embedder.proj.weight)
    with pytest.raises(ValueError, match="is not empty; nothing is overwritten"):
        model.push_to_hub(str(folder))


EVERY_TRUNK = {
    "stack": {"position_encoding": "sincos+rope_3d", "qk_norm": True},
    "factorized": {"axes": ["spatial", "temporal"], "position_encoding": "latte"},
    "causal": {"position_encoding": "rope_3d", "causal": True, "window": 2},
    "long_skip": {"trunk": "long_skip", "depth": 3, "conditioning": "in_context"},
    "masked": {"trunk": "masked", "depth": 3, "num_decoder_blocks": 1, "relative_position_bias": True},
    "dual_stream": {"trunk": "dual_stream", "caption_channels": 8, "num_single_blocks": 1, "position_encoding": "rope_3d"},
    "u_shape": {"trunk": "u_shape", "depth": 3},
}  # fmt: skip


def of_trunk(tiny_model, name):
    model = tiny_model(sample_size=(3, 8, 8), **EVERY_TRUNK[name])
    captions = {"captions": torch.randn(2, 5, 8)} if model.config.caption_channels else {}
    return model, (torch.randn(2, 4, 3, 8, 8), torch.rand(2, 3) * 1000, torch.tensor([1, 2])), captions


@pytest.mark.parametrize("name", EVERY_TRUNK)
@torch.no_grad()
def test_blocks_of_every_trunk_compile_without_a_graph_break(tiny_model, name):
    model, inputs, captions = of_trunk(tiny_model, name)
    expected = model(*inputs, **captions)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(*inputs, **captions), expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", EVERY_TRUNK)
@torch.no_grad()
def test_the_first_block_cache_supports_every_trunk_or_is_refused(tiny_model, name):
    model, inputs, captions = of_trunk(tiny_model, name)
    expected = model(*inputs, **captions)
    if name in ("masked", "u_shape"):
        with pytest.raises(ValueError, match="skips blocks, which trunk="):
            model.enable_cache(FirstBlockCacheConfig(threshold=0.5))
        return
    model.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    with model.cache_context("cond"):
        torch.testing.assert_close(model(*inputs, **captions), expected, atol=1e-5, rtol=1e-5)
        again = model(*inputs, **captions)  # the blocks after the first are skipped: their residual is added
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-4)

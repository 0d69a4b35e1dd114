"""Patches that skip the middle blocks in training (TREAD): what the others see, and what training makes of it."""

import pytest
import torch
from conftest import fill

from stdit.config import Config, load_typed
from stdit.diffusion.objective import ObjectiveConfig, build_objective
from stdit.model.cost import flops_of_config, forward_cost
from stdit.model.stdit import STDiT
from stdit.model.trunks.stack import routed_blocks
from stdit.training.step import LatentBatch, diffusion_losses

MODELS = {
    "joint": {"axes": ["joint"]},
    "rotary in space": {"axes": ["joint"], "position_encoding": "sincos+rope_3d"},
    "factorized": {"axes": ["spatial", "temporal"], "depth": 4, "position_encoding": "rope_3d"},
    "biased by distance": {"axes": ["spatial", "joint"], "relative_position_bias": True},
    "causal": {"axes": ["joint"], "causal": True, "window": 2, "sink": 1, "position_encoding": "rope_3d"},
    "one modulation": {"axes": ["joint"], "conditioning": "adaln_single"},
    "tokens of the condition": {"axes": ["joint"], "conditioning": "cross_attention"},
    "time attention": {"axes": ["joint"], "conditioning": "time_attention"},
}


def model(**changes) -> STDiT:
    size = {"depth": 3, "hidden_size": 48, "num_heads": 4, "in_channels": 4, "num_classes": 5, "sample_size": (3, 8, 6)}
    torch.manual_seed(0)
    return fill(STDiT(**{**size, "learn_sigma": False, **changes}), 0.1).eval()


def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 4, 3, 8, 6), torch.tensor([[0.0, 100.0, 300.0], [700.0, 0.0, 20.0]]), torch.tensor([1, 4])


def permutations(frames=None):
    """All 12 patches of two clips, or of every frame of them, in another order each."""
    generator, count = torch.Generator().manual_seed(3), 2 * (frames or 1)
    orders = torch.stack([torch.randperm(12, generator=generator) for _ in range(count)])
    return orders if frames is None else orders.view(2, frames, 12)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_middle_blocks_that_see_all_patches_in_any_order_change_nothing(name):
    network, (x, t, labels) = model(**MODELS[name]), inputs()
    history = {"history": (torch.randn_like(x), torch.zeros(2, 3))} if name == "causal" else {}
    plain = network(x, t, labels, **history)
    for orders in (permutations(), permutations(frames=3)):
        torch.testing.assert_close(network(x, t, labels, visible=orders, **history), plain, atol=2e-5, rtol=1e-4)
        assert not torch.allclose(network(x, t, labels, visible=orders[..., :6], **history), plain, atol=1e-3)


@torch.no_grad()
def test_levels_per_patch_stay_with_their_patches():
    network, (x, _, labels) = model(position_encoding="rope_3d", conditioning="adaln_single"), inputs()
    levels = 1000 * torch.rand(2, 3, 12)
    plain = network(x, levels, labels)
    found = network(x, levels, labels, visible=permutations(frames=3))
    torch.testing.assert_close(found, plain, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_patches_around_the_middle_blocks_come_out_of_them_as_they_went_in():
    network, (x, t, labels) = model(depth=4), inputs()
    seen, visible = {}, torch.tensor([[[0, 5, 7]] * 3, [[3, 11, 1], [3, 1, 11], [3, 11, 2]]])
    for i in range(4):
        network.blocks[i].register_forward_hook(lambda block, args, result, i=i: seen.update({i: (args[0], result)}))
    network(x, t, labels, visible=visible)
    assert [seen[i][0].shape[2] for i in range(4)] == [12, 3, 3, 12]
    before, after = seen[0][1], seen[3][0]
    moved = (before != after).any(3)
    assert [[frame.nonzero().flatten().tolist() for frame in clip] for clip in moved] == [
        [[0, 5, 7]] * 3, [[1, 3, 11], [1, 3, 11], [2, 3, 11]],
    ]  # fmt: skip
    assert torch.equal(after[1, 2, [3, 11, 2]], seen[2][1][1, 2])


def test_blocks_that_are_skipped_are_those_of_tread():
    assert [(routed_blocks(depth).start, routed_blocks(depth).stop) for depth in (3, 6, 12, 28)] == [
        (1, 2), (1, 5), (1, 11), (2, 24),
    ]  # fmt: skip


def losses(network, part=slice(None), route=True, step=3, **config):
    torch.manual_seed(2)
    latents = torch.randn(4, 4, 3, 8, 6)[part]
    keys = [(0, step, slot) for slot in range(4)][part]
    objective = build_objective(ObjectiveConfig(**config))
    labels = {"label": torch.arange(4)[part, None]}
    clips = LatentBatch(latents, lambda mask: torch.zeros(int(mask.sum()), 4, 8, 6))
    return diffusion_losses(network, objective, [clips], labels, keys, patch=network.patch_size, route=route).clips


@pytest.mark.parametrize("strategy", ["shared", "prefix", "region"])
def test_which_patches_skip_is_a_function_of_the_clip_and_the_step(strategy):
    network, config = model(), {"mask_strategy": strategy, "route_ratio": 0.5}
    whole = losses(network, **config)
    halves = torch.cat([losses(network, slice(0, 1), **config), losses(network, slice(1, 4), **config)])
    torch.testing.assert_close(halves, whole, atol=1e-6, rtol=1e-5)
    plain = losses(network, mask_strategy=strategy)
    assert torch.equal(losses(network, route=False, **config), plain)  # a held-out loss
    assert not torch.allclose(whole, plain, rtol=1e-3)


def test_every_weight_learns_from_a_step_in_which_patches_skip():
    network = model()
    losses(network, route_ratio=0.5).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in network.named_parameters())


@pytest.mark.parametrize("name", MODELS)
def test_operations_of_a_step_are_counted_with_every_encoding(name):
    config = dict(model(**MODELS[name]).config)
    assert 0 < flops_of_config(config, (3, 8, 6), 0.5) < flops_of_config(config, (3, 8, 6))


def test_operations_of_a_step_are_those_of_the_patches_that_blocks_see():
    config = dict(model(depth=6, hidden_size=96, axes=["spatial"]).config)
    whole, half = (flops_of_config(config, (3, 16, 16), ratio) for ratio in (0.0, 0.5))
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    assert forward_cost(arguments, (3, 16, 16), 0.5).total == half
    blocks = 4 / 6 * 0.5  # of six blocks four see half of the patches, and attention among them is a quarter
    assert (1 - 1.2 * blocks) * whole < half < (1 - 0.8 * blocks) * whole


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.trunk=long_skip"], "model.trunk=stack"),
        (["model.conditioning=in_context", "model.position_encoding=sincos"], "in_context"),
        (["model.network=unet"], "model.trunk=stack"),
        (["model.depth=2"], "model.depth=2"),
        (["data.packing=true"], "data.packing=true"),
        (["objective.flow_map=true"], "route_ratio=0"),
        (["objective.route_ratio=1"], "TREAD uses 0.5"),
        (["train.parallel.context=2"], "train.parallel.context=2"),
    ],
)
def test_what_routing_does_not_go_with_is_said_before_training(tmp_path, overrides, words):
    (tmp_path / "t.yaml").write_text("name: t\nobjective: {route_ratio: 0.5}\n")
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        load_typed(Config, tmp_path / "t.yaml", overrides)


def test_a_model_whose_blocks_see_every_patch_refuses_visible_ones():
    x, t, labels = inputs()
    with pytest.raises(ValueError, match="in_context"):
        model(conditioning="in_context")(x, t, labels, visible=torch.arange(4).expand(2, 4))

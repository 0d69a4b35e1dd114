import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stdit.model.stdit import STDiT
from stdit.nn.checkpointing import CHECKPOINTING


@pytest.mark.parametrize(
    ("size", "trainable", "with_table"),
    [
        ("XL/2", 674_834_720, 675_129_632),
        ("S/2", 32_865_056, 32_963_360),
        ("B/4", 130_426_496, 130_475_648),
        ("L/8", 458_578_432, 458_594_816),
    ],
)
def test_sizes_have_dits_parameter_counts(size, trainable, with_table):
    with torch.device("meta"):
        model = STDiT.from_size(size, num_classes=1000, in_channels=4, sample_size=(1, 32, 32), axes=["spatial"])
    assert sum(p.numel() for p in model.parameters()) == trainable
    patches = (32 // model.patch_size[1]) ** 2
    assert trainable + patches * model.config.hidden_size == with_table


def test_keys_equal_dits():
    model = STDiT(depth=1, hidden_size=32, num_heads=4, in_channels=4, num_classes=3, axes=["spatial"])
    weights = {"x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "blocks.0.attn.qkv", "blocks.0.attn.proj",
               "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.0.adaLN_modulation.1", "final_layer.linear", "final_layer.adaLN_modulation.1"}  # fmt: skip
    expected = {f"{name}.{kind}" for name in weights for kind in ("weight", "bias")} | {
        "y_embedder.embedding_table.weight"
    }
    assert set(model.state_dict()) == expected


def test_a_fresh_model_predicts_zero():
    model = STDiT(depth=2, hidden_size=32, num_heads=4, in_channels=4, num_classes=3)
    assert not model(torch.randn(2, 4, 3, 8, 8), torch.rand(2) * 1000, torch.tensor([0, 3])).any()


def test_joint_and_spatial_models_give_equal_outputs_for_an_image(tiny_model):
    joint, spatial = tiny_model(axes=["joint"]), tiny_model(axes=["spatial"])
    x, t, y = torch.randn(2, 4, 1, 8, 8), torch.rand(2) * 1000, torch.tensor([1, 4])
    assert torch.equal(joint(x, t, y), spatial(x, t, y))


@pytest.mark.parametrize("axes", [["joint"], ["spatial", "temporal"]])
def test_one_level_for_all_frames_is_the_same_level_in_each(tiny_model, axes):
    model = tiny_model(axes=axes)
    x, t, y = torch.randn(2, 4, 3, 8, 8), torch.rand(2) * 1000, torch.tensor([1, 5])
    torch.testing.assert_close(model(x, t, y), model(x, t[:, None].expand(2, 3), y), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(x, t, y), model(x, t[:, None, None].expand(2, 3, 16), y), atol=1e-5, rtol=1e-5)


def test_a_frames_level_reaches_only_that_frame_without_temporal_attention(tiny_model):
    model = tiny_model(axes=["spatial"])
    x, t = torch.randn(1, 4, 3, 8, 8), torch.full((1, 3), 500.0)
    other = t.clone()
    other[0, 1] = 100
    moved = (model(x, t) - model(x, other)).abs().amax(dim=(0, 1, 3, 4)) > 1e-6
    assert moved.tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("shape", "patch"),
    [((1, 8, 8), (1, 2, 2)), ((5, 6, 10), (1, 2, 2)), ((4, 8, 12), (2, 2, 4)), ((9, 4, 4), (1, 1, 1))],
)
def test_one_model_accepts_any_grid(tiny_model, shape, patch):
    model = tiny_model(patch_size=patch, learn_sigma=False)
    assert model(torch.randn(2, 4, *shape), torch.rand(2) * 1000).shape == (2, 4, *shape)


def test_no_labels_are_null_labels(tiny_model):
    model = tiny_model()
    x, t = torch.randn(2, 4, 2, 8, 8), torch.rand(2) * 1000
    assert torch.equal(model(x, t), model(x, t, torch.tensor([5, 5])))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        {"axes": ["spatial", "temporal"], "position_encoding": "latte"},
        {"position_encoding": "rope_3d", "qk_norm": True, "causal": True, "window": 2},
        {"trunk": "masked", "depth": 6},
    ],
    ids=["factorized", "causal", "masked"],
)
def test_gradient_checkpointing_changes_no_bit_of_a_gradient(tiny_model, arguments, bf16):
    x, t = torch.randn(2, 4, 4, 8, 8), torch.rand(2) * 1000
    gradients = []
    for checkpointing in (False, True, "selective"):
        model = tiny_model(**arguments)
        if checkpointing:
            model.enable_gradient_checkpointing(CHECKPOINTING[checkpointing])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                model(x, t)  # fills autocast's cache of weights, as the training of a flow map does
            loss = model(x, t).float().square().sum()
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients, strict=True))


def test_selective_checkpointing_runs_products_and_attention_once(tiny_model):
    x, t = torch.randn(2, 4, 4, 8, 8), torch.rand(2) * 1000
    counts = []
    for checkpointing in (False, True, "selective"):
        model = tiny_model()
        if checkpointing:
            model.enable_gradient_checkpointing(CHECKPOINTING[checkpointing])
        with FlopCounterMode(display=False) as counter:
            model(x, t).square().sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[2] < counts[1]


def test_what_is_saved_is_loaded_to_the_bit(tiny_model, tmp_path):
    model = tiny_model(patch_size=(2, 2, 2), class_names=list("abcde"))
    model.save_pretrained(tmp_path)
    again = STDiT.from_pretrained(tmp_path)
    assert again.patch_size == (2, 2, 2)
    assert list(again.config.class_names) == list("abcde")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_weights_that_do_not_fit_the_config_are_refused(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit its config: missing .*blocks\.2"):
        STDiT.from_pretrained(tmp_path, depth=3)
    with pytest.raises(ValueError, match=r"unexpected .*blocks\.1"):
        STDiT.from_pretrained(tmp_path, depth=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 30}, "hidden_size=30 is not a multiple of num_heads=4"),
        ({"axes": ["spacial"]}, "'spacial'.* is unknown. Choose from: joint, spatial, temporal"),
        ({"axes": []}, "the list is empty. Choose from: joint, spatial, temporal"),
        ({"patch_size": (0, 2, 2)}, "Use \\[1, 2, 2\\]"),
        ({"class_names": ["one"]}, "1 class_names for num_classes=5"),
        ({"depth": 0}, "depth must be >= 1"),
    ],
)
def test_impossible_models_are_refused(tiny_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**arguments)


def test_an_unknown_size_names_the_nearest():
    with pytest.raises(ValueError, match="Unknown model size 'XL2'. Did you mean 'XL/2'"):
        STDiT.from_size("XL2")


def test_bfloat16_keeps_positions_and_timesteps_apart(tiny_model):
    model = tiny_model(axes=["joint"])
    x, t = torch.randn(1, 4, 3, 8, 8), torch.tensor([431.0])
    exact, half = model(x, t), model.to(torch.bfloat16)(x.bfloat16(), t).float()
    assert (exact - half).norm() / exact.norm() < 0.03


def test_embeddings_of_labels_start_with_the_standard_deviation_that_is_asked_for():
    plain = {
        "depth": 1,
        "hidden_size": 64,
        "num_heads": 2,
        "in_channels": 4,
        "num_classes": 99,
        "sample_size": (2, 4, 4),
    }
    for given, std in (({}, 0.02), ({"label_std": 0.5}, 0.5)):
        table = STDiT(**plain, **given).y_embedder.embedding_table.weight
        assert table.std().item() == pytest.approx(std, rel=0.1)


def test_a_negative_spread_of_labels_is_refused():
    with pytest.raises(ValueError, match=r"label_std must be >= 0, got -1.0; DiT's is 0.02"):
        STDiT(depth=1, hidden_size=64, num_heads=2, num_classes=3, label_std=-1.0)

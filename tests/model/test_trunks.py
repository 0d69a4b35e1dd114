import pytest
import torch
from accelerate import dispatch_model
from conftest import fill

import stdit.model.trunks
from stdit.config import Config, load_typed
from stdit.diffusion.objective import ObjectiveConfig, build_objective
from stdit.model.stdit import STDiT
from stdit.model.trunks import Trunk
from stdit.nn.embedders import LearnedPosEmbed
from stdit.nn.layout import DenseLayout
from stdit.training.optim import build_optimizers
from stdit.training.step import LatentBatch, diffusion_losses

TRUNKS = {
    "u-vit": {"trunk": "long_skip", "depth": 5, "conditioning": "in_context", "learned_pos_embed": True, "timestep_mlp": False,
              "activation": "gelu", "output_conv": True},
    "mdt": {"trunk": "masked", "depth": 4, "num_decoder_blocks": 2, "learned_pos_embed": True, "relative_position_bias": True},
    "diffit": {"trunk": "u_shape", "depth": 3, "conditioning": "time_attention", "relative_position_bias": True},
    "long skips and adaLN": {"trunk": "long_skip", "depth": 4, "learned_pos_embed": True},
}  # fmt: skip


def model(name: str, **changes) -> STDiT:
    size = {"hidden_size": 32, "num_heads": 4, "in_channels": 4, "num_classes": 5, "sample_size": (1, 8, 8)}
    torch.manual_seed(0)
    return fill(STDiT(**{**size, **TRUNKS[name], **changes}), 0.1).eval()


def inputs(frames=3):
    return torch.randn(2, 4, frames, 8, 8), torch.tensor([100.0, 700.0]), torch.tensor([1, 4])


@pytest.mark.parametrize("name", TRUNKS)
@torch.no_grad()
def test_one_frame_of_a_video_model_is_an_image(name):
    joint, spatial = model(name, axes=["joint"]), model(name, axes=["spatial"])
    x, t, labels = inputs(frames=1)
    torch.testing.assert_close(joint(x, t, labels), spatial(x, t, labels), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", TRUNKS)
@torch.no_grad()
def test_frames_exchange_information_and_their_positions_matter(name):
    video = model(name, axes=["spatial", "temporal"])
    x, t, labels = inputs()
    changed = x.clone()
    changed[:, :, 2] += 1
    assert not torch.allclose(video(x, t, labels)[:, :, 0], video(changed, t, labels)[:, :, 0])
    still = x[:, :, :1].expand(-1, -1, 3, -1, -1)
    assert not torch.allclose(video(still, t, labels)[:, :, 0], video(still, t, labels)[:, :, 1])


@pytest.mark.parametrize("name", TRUNKS)
@torch.no_grad()
def test_sizes_that_were_not_trained_are_accepted(name):
    x = torch.randn(1, 4, 2, 12, 16)
    assert model(name)(x, torch.tensor([5.0]), torch.tensor([0])).shape == (1, 4 * 2, 2, 12, 16)


@torch.no_grad()
def test_the_middle_of_the_u_has_a_quarter_of_the_patches_and_odd_grids_are_refused():
    network, (x, t, labels) = model("diffit"), inputs()
    counts = []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda block, args: counts.append(args[0].shape[2]))
    network(x, t, labels)
    assert counts == [16, 4, 16]
    with pytest.raises(ValueError, match="such as 4 x 4"):
        network(torch.randn(1, 4, 1, 6, 8), t[:1], labels[:1])
    with pytest.raises(ValueError, match="not per patch"):
        network(x, torch.rand(2, 3, 16), labels)


@torch.no_grad()
def test_learned_positions_are_interpolated_to_other_grids_and_exact_on_their_own():
    table = LearnedPosEmbed(4, 4, 32)
    assert torch.equal(table(4, 4), table.patches)
    twice = table(8, 8).view(8, 8, 32)
    coarse = twice.unflatten(0, (4, 2)).unflatten(2, (4, 2)).mean((1, 3))
    assert (coarse.flatten(0, 1) - table.patches).abs().mean() < 0.1


@torch.no_grad()
def test_with_all_patches_visible_in_any_order_only_the_decoders_tokens_matter():
    masked, (x, t, labels) = model("mdt"), inputs()
    everything = torch.stack([torch.randperm(16) for _ in range(2)])
    torch.testing.assert_close(
        masked(x, t, labels, visible=everything), masked(x, t, labels, visible=torch.arange(16).expand(2, 16)), atol=1e-5, rtol=1e-4
    )  # fmt: skip
    torch.testing.assert_close(masked(x, t, labels, visible=everything), masked(x, t, labels), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_hidden_patch_reaches_the_decoder_by_the_long_skip_alone():
    masked, (x, t, labels) = model("mdt"), inputs()
    kept = torch.arange(16)[torch.arange(16) != 5].expand(2, 15)
    seen = []
    masked.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    masked(x, t, labels, visible=kept)
    changed = x.clone()
    changed[..., 2:4, 2:4] += 3  # patch 5 of 4 x 4
    masked(changed, t, labels, visible=kept)
    assert torch.equal(seen[0], seen[1])
    assert seen[0].shape[2] == 15


def test_visible_patches_fold_and_unfold_with_their_positions():
    layout = DenseLayout((2, 2, 3)).with_visible(torch.tensor([[0, 5], [3, 1]]))
    tokens = torch.randn(2, 2, 2, 4)
    for axis in ("joint", "spatial", "temporal"):
        assert torch.equal(layout.unfold(layout.fold(tokens, axis), axis), tokens)
        assert len(layout.positions(axis)) == layout.fold(tokens, axis).shape[1]
    assert layout.spatial_positions("joint").tolist() == [[[0, 0], [1, 2]] * 2, [[1, 0], [0, 1]] * 2]
    assert layout.spatial_positions("spatial").tolist() == [[[0, 0], [1, 2]]] * 2 + [[[1, 0], [0, 1]]] * 2


def test_masking_trains_on_all_patches_and_on_some_and_is_a_function_of_the_key():
    network = model("mdt", learn_sigma=False)
    clips, labels = LatentBatch(torch.randn(2, 4, 3, 8, 8)), {"label": torch.tensor([[1], [2]])}

    def losses(ratio, step=3):
        objective = build_objective(ObjectiveConfig(mask_ratio=ratio))
        return diffusion_losses(
            network, objective, [clips], labels, [(0, step, 0), (0, step, 1)], patch=network.patch_size
        ).clips

    plain, both = losses(0.0), losses(0.5)
    assert (both > plain).all()
    assert torch.equal(both, losses(0.5))
    assert not torch.equal(both, losses(0.6))
    both.mean().backward()
    assert network.trunk.mask_token.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trunk": "unet"}, "trunk"),
        ({"depth": 5}, "such as depth=4"),
        ({"trunk": "u_shape", "depth": 2, "relative_position_bias": False}, "3 blocks or more"),
        ({"conditioning": "in_context"}, "and adaln_zero"),
        ({"conditioning": "in_context", "relative_position_bias": False}, "use adaln_zero"),
        ({"num_single_blocks": 1}, "belongs to trunk='dual_stream'"),
        ({"trunk": "dual_stream", "caption_channels": 8}, "use relative_position_bias=false"),
        ({"position_encoding": "rope_3d"}, "use adaln_zero"),
    ],
)
def test_invalid_trunks_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        model("mdt", **changes)


def test_a_trunk_without_masking_refuses_visible_patches():
    x, t, labels = inputs()
    with pytest.raises(ValueError, match="sees every patch"):
        model("u-vit")(x, t, labels, visible=torch.arange(4).expand(2, 4))


def test_a_new_trunk_is_one_class_and_one_row(monkeypatch, tmp_path):
    class Twice(Trunk):
        """Runs every block twice, with a gate for the result."""

        def __init__(self, config):
            super().__init__(config)
            self.gate = torch.nn.Parameter(torch.zeros(config.block.dim))

        def forward(self, tokens, ctx):
            for block in ctx.blocks:
                tokens = tokens + self.gate * ctx(block, ctx(block, tokens))
            return tokens

    monkeypatch.setitem(stdit.model.trunks.TRUNKS, "twice", Twice)
    network = model("mdt", trunk="twice", learn_sigma=False)
    loss = diffusion_losses(
        network, build_objective(ObjectiveConfig()), [LatentBatch(torch.randn(2, 4, 3, 8, 8))], {"label": torch.tensor([[1], [2]])},
        [(0, 3, 0), (0, 3, 1)], patch=network.patch_size,
    ).clips  # fmt: skip
    loss.mean().backward()
    assert network.trunk.gate.grad.abs().sum() > 0
    network.save_pretrained(tmp_path)
    assert torch.equal(STDiT.from_pretrained(tmp_path).trunk.gate, network.trunk.gate)
    config = load_typed(Config, "configs/video.yaml", ["model.trunk=twice", "objective.mask_strategy=shared"])
    assert config.model.trunk == "twice"


@pytest.mark.parametrize("name", ["u-vit", "mdt", "diffit"])
@torch.no_grad()
def test_accelerate_spreads_a_model_over_devices_and_disk(name, tmp_path):
    network, (x, t, labels) = model(name), inputs()
    want = network(x, t, labels)
    places = {key: "cpu" for key, _ in network.named_children() if key != "blocks"}
    places |= {f"blocks.{i}": "disk" if i % 2 else "cpu" for i in range(len(network.blocks))}
    spread = dispatch_model(network, places, main_device="cpu", offload_dir=tmp_path)
    assert any(value.is_meta for value in spread.parameters())
    torch.testing.assert_close(spread(x, t, labels), want)


@pytest.mark.parametrize("name", TRUNKS)
def test_muon_takes_matrices_and_no_tables(name):
    network = model(name, micro_conditions=["fps"])
    muon, rest = build_optimizers(network, "muon", 1e-3)
    names = {id(p): key for key, p in network.named_parameters()}
    shapes = {p.data_ptr(): names[id(p)] for p in network.parameters()}
    taken = {shapes[p.data_ptr()] for group in muon.param_groups for p in group["params"]}
    assert all(key.endswith("weight") for key in taken)
    assert {key for key in names.values() if key.endswith(("attn.qkv.weight", "mlp.fc1.weight"))} <= taken
    assert not [key for key in taken if "embed" in key or "adaLN" in key or "final" in key]
    others = {names[id(p)] for group in rest.param_groups for p in group["params"]}
    assert taken | others == set(names.values())
    assert not taken & others


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.mask_ratio=0.3"], "set model.trunk=masked"),
        (
            ["objective.mask_ratio=0.3", "model.trunk=masked", "objective.mask_strategy=prefix"],
            "known frames must be visible",
        ),
        (
            ["model.conditioning=in_context", "objective.mask_strategy=mixed", "objective.mask_probs.region=0.1"],
            "objective.mask_probs.region=0",
        ),
        (["model.caption_channels=64"], "text.encoder"),
        (["model.conditioning=in_context", "data.packing=true", "data.sizes=[[17,64,64]]"], "data.packing=false"),
        (["model.trunk=dual_stream"], "text.encoder=words"),
        (["model.trunk=masked", "data.packing=true", "data.sizes=[[17,64,64]]"], "one of stack, long_skip"),
        (
            ["model.trunk=u_shape", "objective.mask_strategy=mixed", "objective.mask_probs.region=0.1"],
            "objective.mask_probs.region=0",
        ),
        (["model.network=unet", "model.micro_conditions=[fps]"], "none of model.micro_conditions"),
        (["model.network=unet", "model.trunk=long_skip"], "none of model.trunk=long_skip"),
        (["model.causal=true", "model.sink=1", "data.sizes=[[33,64,64]]"], "data.num_frames=33"),
        (["model.conditioning=adaln_zer"], "Did you mean 'adaln_zero'"),
        (["objective.mask_strategy=teacher_forcing"], "model.causal=true"),
    ],
)
def test_invalid_configs_are_refused_when_they_are_read(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_typed(Config, "configs/video.yaml", ["objective.mask_strategy=shared", *overrides])

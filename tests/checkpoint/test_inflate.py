import re
import subprocess
import sys

import pytest
import torch
from conftest import fill

from stdit.checkpoint.config import InitFrom
from stdit.checkpoint.inflate import inflate, inflated_arguments, plan_blocks
from stdit.model.config import ModelConfig, model_arguments
from stdit.model.stdit import STDiT
from stdit.nn.conditioning import CONDITIONINGS

GIVEN = {"hidden_size": 32, "num_heads": 4, "mlp_ratio": 4.0, "qk_norm": False}


def to_video(image: STDiT, init_from: InitFrom | None = None, axes=("spatial", "temporal"), patch=1, **changes):
    """(video model, what is preserved of the image model)."""
    init_from = init_from or InitFrom(path="image")
    chosen = {**GIVEN, "axes": list(axes), "patch_size": (patch, *image.patch_size[1:]), **changes}
    video = STDiT(**{
        "in_channels": image.in_channels, "num_classes": image.num_classes, "learn_sigma": image.config.learn_sigma,
        **chosen, **inflated_arguments(image, chosen, None, init_from),
    }).eval()  # fmt: skip
    return video, inflate(image, video, init_from)


def each_frame(image: STDiT, x, t, y):
    """The output of the image model on every frame of a clip alone."""
    return torch.cat([image(x[:, :, i : i + 1], t, y) for i in range(x.shape[2])], dim=2)


CASE = (torch.tensor([3.0, 700.0]), torch.tensor([1, 5]))


@torch.no_grad()
@pytest.mark.parametrize(
    ("axes", "depth"),
    [(("spatial", "temporal"), 4), (("spatial", "spatial", "temporal"), 3), (("temporal", "spatial"), 4)],
)
def test_with_inserted_blocks_every_frame_is_the_image_models(tiny_model, axes, depth):
    image = tiny_model(axes=["spatial"])
    video, inflation = to_video(image, axes=axes)
    x = torch.randn(2, 4, 3, 8, 8)
    assert video.config.depth == len(inflation.sources) == depth
    assert [s for s in inflation.sources if s is not None] == [0, 1]
    assert (video(x, *CASE) - each_frame(image, x, *CASE)).abs().max() < 1e-6
    assert (video(x[:, :, :1], *CASE) - image(x[:, :, :1], *CASE)).abs().max() < 1e-6
    assert "preserved of the image model: the output on every frame." in inflation.keeps


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["first", "centre", "mean"])
def test_with_a_temporal_patch_still_clips_are_the_image_models(tiny_model, kernel):
    image = tiny_model(axes=["spatial"])
    video, inflation = to_video(image, InitFrom(path="image", patch=kernel), patch=3)
    still = torch.randn(2, 4, 1, 8, 8).expand(-1, -1, 6, -1, -1)
    assert (video(still, *CASE) - each_frame(image, still, *CASE)).abs().max() < 1e-6
    assert "preserved of the image model: the output on every frame of a still clip." in inflation.keeps
    moving = torch.randn(2, 4, 6, 8, 8)
    assert not torch.allclose(video(moving, *CASE), each_frame(image, moving, *CASE), atol=1e-3)


@torch.no_grad()
def test_joint_blocks_preserve_one_frame_and_say_so(tiny_model):
    image = tiny_model(axes=["spatial"])
    video, inflation = to_video(image, axes=["joint"])
    x = torch.randn(2, 4, 1, 8, 8)
    assert torch.equal(video(x, *CASE), image(x, *CASE))
    assert "preserved of the image model: the output on one frame" in inflation.keeps


def test_converted_temporal_blocks_preserve_weights_alone(tiny_model):
    image = tiny_model(axes=["spatial"])
    video, inflation = to_video(image, InitFrom(path="image", temporal="convert"))
    assert torch.equal(video.blocks[1].attn.qkv.weight, image.blocks[1].attn.qkv.weight)
    assert "compute something else" in inflation.keeps
    assert inflation.sources == [0, 1]


def test_block_sources_are_written_to_the_config(tiny_model, tmp_path):
    video, _ = to_video(tiny_model(axes=["spatial"]))
    video.save_pretrained(tmp_path)
    again = STDiT.from_pretrained(tmp_path)
    assert (again.config.depth, list(again.config.block_sources)) == (4, [0, None, 1, None])


def test_training_moves_the_new_blocks(tiny_model):
    video, inflation = to_video(tiny_model(axes=["spatial"]))
    video.train()
    optimizer = torch.optim.SGD(video.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in video.named_parameters()}
    for _ in range(2):  # the gates open first, then what they gate learns
        optimizer.zero_grad()
        video(torch.randn(2, 4, 3, 8, 8), *CASE).square().sum().backward()
        optimizer.step()
    for block, source in zip(video.blocks, inflation.sources, strict=True):
        if source is None:
            assert all(p.grad is not None and p.grad.abs().max() > 0 for p in block.parameters())
    assert all(not torch.equal(before[name], value) for name, value in video.named_parameters() if "blocks.1" in name)


@torch.no_grad()
def test_an_unconditional_video_model_keeps_the_null_class_exactly(tiny_model):
    image = tiny_model(axes=["spatial"])
    video, _ = to_video(image, num_classes=0)
    x = torch.randn(2, 4, 3, 8, 8)
    assert (video(x, CASE[0]) - each_frame(image, x, CASE[0], None)).abs().max() < 1e-6


@torch.no_grad()
def test_a_replaced_class_table_keeps_the_null_class(tiny_model):
    image = tiny_model(axes=["spatial"])
    video, _ = to_video(image, InitFrom(path="image", classes="replace"), num_classes=9)
    x = torch.randn(2, 4, 3, 8, 8)
    assert (video(x, CASE[0]) - each_frame(image, x, CASE[0], None)).abs().max() < 1e-6


def test_other_channels_are_refused_until_parts_are_restarted(tiny_model):
    image = tiny_model(axes=["spatial"])
    with pytest.raises(ValueError, match=r"do not fit: x_embedder.*add init_from.restart=\[final_layer, x_embedder\]"):
        to_video(image, in_channels=16)
    video, inflation = to_video(image, InitFrom(path="image", restart=["x_embedder", "final_layer"]), in_channels=16)
    assert torch.equal(video.blocks[0].attn.qkv.weight, image.blocks[0].attn.qkv.weight)
    assert "New: x_embedder, final_layer" in inflation.keeps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: to_video(image, num_classes=7), "5 classes, the data has 7; add init_from.classes=replace"),
        (lambda image: plan_blocks(image, ["spatial"] * 4 + ["temporal"], InitFrom()), "2 blocks do not fill whole cycles"),
        (lambda image: plan_blocks(image, ["temporal"], InitFrom()), "leaves no block for the image model's weights"),
        (lambda image: InitFrom(restart=["heads"]), "'heads' is not a part of a model"),
        (lambda image: inflated_arguments(image, {**GIVEN, "axes": ["spatial", "temporal"], "patch_size": (1, 2, 2)}, 7, InitFrom()), "makes 4 blocks of 2; leave model.depth out"),
        (lambda image: inflated_arguments(image, {**GIVEN, "hidden_size": 64, "axes": ["joint"], "patch_size": (1, 2, 2)}, None, InitFrom(path="x")), "model.hidden_size=64 but the weights of init_from.path='x' have 32"),
    ],
)  # fmt: skip
def test_what_cannot_be_inflated_is_refused_in_one_line(tiny_model, change, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        change(tiny_model(axes=["spatial"]))


@torch.no_grad()
def test_a_video_model_is_not_inflated_again_but_loaded_whole(tiny_model):
    video = tiny_model(axes=["spatial", "temporal"])
    with pytest.raises(ValueError, match="have temporal blocks already"):
        to_video(video)
    again, inflation = to_video(video, InitFrom(path="image", temporal="convert"))
    x = torch.randn(2, 4, 3, 8, 8)
    assert torch.equal(again(x, *CASE), video(x, *CASE))
    assert "preserved of the image model: the whole output, since it is the same model" in inflation.keeps


@torch.no_grad()
def test_classes_added_to_an_unconditional_model_change_nothing_at_first(tiny_model):
    image = tiny_model(axes=["spatial"], num_classes=0)
    video, inflation = to_video(image, num_classes=5)
    x = torch.randn(2, 4, 3, 8, 8)
    assert (video(x, *CASE) - each_frame(image, x, CASE[0], None)).abs().max() < 1e-6
    assert "New: classes, initialised to zero" in inflation.keeps


def test_a_replaced_class_table_is_reported(tiny_model):
    image = tiny_model(axes=["spatial"])
    _, inflation = to_video(image, InitFrom(path="image", classes="replace"), num_classes=9)
    assert "holds without a label" in inflation.keeps


@torch.no_grad()
@pytest.mark.parametrize("encoding", ["sincos", "rope"])
def test_the_chosen_position_encoding_is_the_video_models(tiny_model, encoding):
    image = tiny_model(axes=["spatial"], position_encoding="sincos" if encoding == "rope" else "rope")
    video, inflation = to_video(image, position_encoding=encoding)
    x = torch.randn(2, 4, 3, 8, 8)
    assert {block.attn.position_encoding for block in video.blocks} == {video.config.position_encoding} == {encoding}
    assert (video(x, *CASE) - each_frame(image, x, *CASE)).abs().max() < 1e-6
    assert "preserved of the image model: the output on every frame." in inflation.keeps


@torch.no_grad()
def test_rope_3d_is_honoured_and_what_it_changes_is_reported(tiny_model):
    image = tiny_model(axes=["spatial"])
    video, inflation = to_video(image, position_encoding="rope_3d")
    x = torch.randn(2, 4, 3, 8, 8)
    assert video.config.position_encoding == "rope_3d"
    assert not torch.allclose(video(x, *CASE), each_frame(image, x, *CASE), atol=1e-3)
    assert "also rotates spatial attention, so no frame's output is preserved" in inflation.keeps
    rotated = tiny_model(axes=["spatial"], position_encoding="rope_3d")
    video, inflation = to_video(rotated, position_encoding="rope_3d")
    assert (video(x, *CASE) - each_frame(rotated, x, *CASE)).abs().max() < 1e-6
    assert "preserved of the image model: the output on every frame." in inflation.keeps


@torch.no_grad()
@pytest.mark.parametrize("encoding", ["rope", "rope_3d"])
def test_an_image_model_becomes_a_causal_video_model(tiny_model, encoding):
    image = tiny_model(axes=["spatial"], position_encoding="rope_3d" if encoding == "rope_3d" else "sincos")
    video, inflation = to_video(image, position_encoding=encoding, causal=True)
    x = torch.randn(2, 4, 3, 8, 8)
    assert video.config.causal and "preserved of the image model: the output on every frame." in inflation.keeps
    assert (video(x, *CASE) - each_frame(image, x, *CASE)).abs().max() < 1e-6
    trained, changed = fill(video, 0.2), x.clone()
    changed[:, :, 2] += 1
    before, after = trained(x, *CASE), trained(changed, *CASE)
    torch.testing.assert_close(before[:, :, :2], after[:, :, :2])
    assert not torch.allclose(before[:, :, 2], after[:, :, 2], atol=1e-3)


@torch.no_grad()
def test_blocks_made_joint_and_causal_keep_the_first_frame_and_say_what_they_attend_to(tiny_model):
    image = tiny_model(axes=["spatial"])
    video, inflation = to_video(image, axes=["joint"], position_encoding="rope", causal=True)
    x = torch.randn(2, 4, 3, 8, 8)
    assert (video(x, *CASE)[:, :, :1] - image(x[:, :, :1], *CASE)).abs().max() < 1e-6
    assert "the output on one frame; on several frames the blocks attend to earlier frames too" in inflation.keeps


def test_causal_without_rope_is_refused_as_for_any_model(tiny_model):
    with pytest.raises(ValueError, match="a causal model needs position_encoding='rope'"):
        to_video(tiny_model(axes=["spatial"]), causal=True)


@torch.no_grad()
def test_a_video_model_made_causal_preserves_one_frame_and_says_so(tiny_model):
    video = tiny_model(axes=["spatial", "temporal"])
    convert = InitFrom(path="image", temporal="convert")
    causal, inflation = to_video(video, convert, position_encoding="rope", causal=True)
    x = torch.randn(2, 4, 3, 8, 8)
    assert torch.equal(causal(x[:, :, :1], *CASE), video(x[:, :, :1], *CASE))
    assert not torch.allclose(causal(x, *CASE), video(x, *CASE), atol=1e-3)
    assert (
        "preserved of the image model: the output on one frame" in inflation.keeps and "causal=True" in inflation.keeps
    )


@torch.no_grad()
def test_only_the_timestep_convention_and_the_epsilon_come_from_the_image_model(tiny_model):
    convention = {"timestep_scale": 1e-3, "timestep_reversed": True, "timestep_offset": 1.0, "frequency_shift": 1.0, "norm2_eps": 1e-5}  # fmt: skip
    image = tiny_model(axes=["spatial"], **convention)
    arguments = inflated_arguments(image, {**GIVEN, "axes": ["joint"], "patch_size": (1, 2, 2)}, None, InitFrom())
    assert {key: value for key, value in arguments.items() if key not in ("depth", "block_sources")} == convention
    video, _ = to_video(image)
    x = torch.randn(2, 4, 3, 8, 8)
    assert (video(x, *CASE) - each_frame(image, x, *CASE)).abs().max() < 1e-6


OTHER = {
    "conditioning": "in_context", "trunk": "long_skip", "learned_pos_embed": True, "relative_position_bias": True,
    "timestep_mlp": False, "output_conv": True, "activation": "gelu", "qk_norm": True, "mlp_ratio": 2.0, "micro_conditions": ["fps"],
}  # fmt: skip


@pytest.mark.parametrize("key", OTHER)
def test_arguments_that_the_weights_decide_must_agree(tiny_model, key):
    image = tiny_model(axes=["spatial"], **{key: OTHER[key]})
    chosen = model_arguments(ModelConfig(hidden_size=32, num_heads=4, axes=["joint"]))
    value = str(OTHER[key]).lower() if isinstance(OTHER[key], bool) else str(OTHER[key])
    message = (
        rf"^model.{key}=.* but the weights of init_from.path='image' have .*; set model.{key}={re.escape(value)}\.$"
    )
    with pytest.raises(ValueError, match=message):
        inflated_arguments(image, chosen, None, InitFrom(path="image"))
    inflated_arguments(image, {**chosen, key: OTHER[key]}, None, InitFrom(path="image"))


@pytest.mark.parametrize(
    ("ours", "remedy"), [({}, "set model.actions=true"), ({"width": 2}, "train on clips with the same actions")]
)
def test_actions_that_differ_from_those_of_the_weights_have_a_remedy_that_a_config_can_follow(tiny_model, ours, remedy):
    extra = {"actions": {"stride": 1, "count": 5}}
    image = tiny_model(axes=["spatial"], extra_conditions=extra)
    chosen = model_arguments(ModelConfig(hidden_size=32, num_heads=4, axes=["joint"]))
    chosen["extra_conditions"] = {"actions": {"stride": 1, **ours}} if ours else {}
    with pytest.raises(ValueError, match=f"^model.extra_conditions=.*; {remedy}\.$"):
        inflated_arguments(image, chosen, None, InitFrom(path="image"))
    inflated_arguments(image, {**chosen, "extra_conditions": extra}, None, InitFrom(path="image"))


@pytest.mark.parametrize(
    ("encoding", "axes", "chosen", "message"),
    [
        ("latte", ["spatial", "temporal"], {}, "sincos but .* have latte, whose table the weights need; set model.position_encoding=latte."),
        ("latte", ["spatial", "temporal"], {"position_encoding": "rope", "causal": True}, "set model.position_encoding=latte and model.causal=false"),
        ("rope_3d", ["spatial"], {"position_encoding": "rope"}, "rope but .* have rope_3d, which rotates spatial attention; set"),
    ],
)  # fmt: skip
def test_weights_that_need_their_position_encoding_say_so(tiny_model, encoding, axes, chosen, message):
    image = tiny_model(axes=axes, position_encoding=encoding)
    with pytest.raises(ValueError, match=message):
        to_video(image, InitFrom(path="image", temporal="convert"), axes, **chosen)


@torch.no_grad()
def test_latte_weights_are_loaded_whole(tiny_model):
    latte = tiny_model(axes=["spatial", "temporal"], position_encoding="latte")
    again, inflation = to_video(latte, InitFrom(path="image", temporal="convert"), position_encoding="latte")
    x = torch.randn(2, 4, 3, 8, 8)
    assert torch.equal(again(x, *CASE), latte(x, *CASE))
    assert "preserved of the image model: the whole output, since it is the same model" in inflation.keeps


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_inserted_blocks_are_the_identity_with_every_conditioning_and_learn(tiny_model, conditioning):
    image = tiny_model(axes=["spatial"], conditioning=conditioning)
    video, inflation = to_video(image, conditioning=conditioning)
    x = torch.randn(2, 4, 3, 8, 8)
    with torch.no_grad():
        assert (video(x, *CASE) - each_frame(image, x, *CASE)).abs().max() < 1e-5
    assert "preserved of the image model: the output on every frame." in inflation.keeps
    video.train()
    optimizer = torch.optim.SGD(video.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        video(x, *CASE).square().sum().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in video.blocks[1].attn.qkv.parameters())


@torch.no_grad()
@pytest.mark.parametrize(
    "choices",
    [
        {"trunk": "long_skip", "conditioning": "in_context", "learned_pos_embed": True, "timestep_mlp": False, "output_conv": True, "activation": "gelu"},
        {"trunk": "masked", "learned_pos_embed": True, "relative_position_bias": True, "depth": 6, "num_decoder_blocks": 2},
        {"conditioning": "adaln_single", "micro_conditions": ["fps"]},
    ],
    ids=["uvit", "mdt", "adaln_single"],
)  # fmt: skip
def test_everything_outside_the_blocks_is_copied_too(tiny_model, choices):
    image = tiny_model(axes=["spatial"], sample_size=(1, 8, 8), **choices)
    video, inflation = to_video(image, axes=["joint"], sample_size=(3, 8, 8), **choices)
    x = torch.randn(2, 4, 1, 8, 8)
    assert (video(x, *CASE) - image(x, *CASE)).abs().max() < 1e-6
    assert "preserved of the image model: the output on one frame" in inflation.keeps


@torch.no_grad()
def test_learned_positions_are_resized_to_the_video_models_grid(tiny_model):
    image = tiny_model(axes=["spatial"], learned_pos_embed=True, sample_size=(1, 8, 8))
    video, _ = to_video(image, learned_pos_embed=True, sample_size=(3, 12, 16))
    x = torch.randn(2, 4, 3, 12, 16)
    assert (video(x, *CASE) - each_frame(image, x, *CASE)).abs().max() < 1e-5


@torch.no_grad()
def test_captions_may_be_added_but_not_dropped(tiny_model):
    image, words = tiny_model(axes=["spatial"]), torch.randn(2, 3, 12)
    video, inflation = to_video(image, caption_channels=12)
    x = torch.randn(2, 4, 3, 8, 8)
    assert (video(x, *CASE, captions=words) - each_frame(image, x, *CASE)).abs().max() < 1e-6
    assert "New: captions" in inflation.keeps
    image = tiny_model(axes=["spatial"], caption_channels=12)
    video, _ = to_video(image, caption_channels=12)
    frames = [image(x[:, :, i : i + 1], *CASE, captions=words) for i in range(3)]
    assert (video(x, *CASE, captions=words) - torch.cat(frames, 2)).abs().max() < 1e-6
    with pytest.raises(ValueError, match="the weights take captions .* set text.encoder"):
        to_video(image)


def test_blocks_are_not_inserted_into_a_trunk_that_connects_them_by_position(tiny_model):
    with pytest.raises(ValueError, match="insert needs model.trunk=stack, but .* trunk=long_skip"):
        to_video(tiny_model(axes=["spatial"], trunk="long_skip"), trunk="long_skip")


def test_the_config_imports_no_torch():
    code = "import sys, stdit.checkpoint.config; print([m for m in ('torch', 'diffusers', 'accelerate') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

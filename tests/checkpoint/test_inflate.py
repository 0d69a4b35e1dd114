import pytest
import torch

from stdit.checkpoint.inflate import InitFrom, inflate, inflated_arguments, plan_blocks
from stdit.model.stdit import STDiT

GIVEN = {"hidden_size": 32, "num_heads": 4, "mlp_ratio": 4.0, "qk_norm": False}


def to_video(image: STDiT, how: InitFrom | None = None, axes=("spatial", "temporal"), patch=1, **changes):
    """(video model, what it keeps)."""
    how = how or InitFrom(path="image")
    chosen = {**GIVEN, "axes": list(axes), "patch_size": (patch, *image.patch_size[1:])}
    video = STDiT(**{
        **chosen, **inflated_arguments(image, chosen, None, how), "in_channels": image.in_channels,
        "num_classes": image.num_classes, "learn_sigma": image.config.learn_sigma, **changes,
    }).eval()  # fmt: skip
    return video, inflate(image, video, how)


def each_frame(image: STDiT, x, t, y):
    """The image model on every frame of a clip by itself."""
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
    assert "on every frame as the image model" in inflation.keeps


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["first", "centre", "mean"])
def test_with_a_temporal_patch_still_clips_are_the_image_models(tiny_model, kernel):
    image = tiny_model(axes=["spatial"])
    video, inflation = to_video(image, InitFrom(path="image", patch=kernel), patch=3)
    still = torch.randn(2, 4, 1, 8, 8).expand(-1, -1, 6, -1, -1)
    assert (video(still, *CASE) - each_frame(image, still, *CASE)).abs().max() < 1e-6
    assert "on still clips" in inflation.keeps
    moving = torch.randn(2, 4, 6, 8, 8)
    assert not torch.allclose(video(moving, *CASE), each_frame(image, moving, *CASE), atol=1e-3)


@torch.no_grad()
def test_blocks_made_joint_keep_one_frame_and_say_so(tiny_model):
    image = tiny_model(axes=["spatial"])
    video, inflation = to_video(image, axes=["joint"])
    x = torch.randn(2, 4, 1, 8, 8)
    assert torch.equal(video(x, *CASE), image(x, *CASE))
    assert "on one frame as the image model" in inflation.keeps


def test_blocks_made_temporal_keep_their_weights_and_promise_no_more(tiny_model):
    image = tiny_model(axes=["spatial"])
    video, inflation = to_video(image, InitFrom(path="image", temporal="convert"))
    assert torch.equal(video.blocks[1].attn.qkv.weight, image.blocks[1].attn.qkv.weight)
    assert "compute something else" in inflation.keeps
    assert inflation.sources == [0, 1]


def test_where_each_block_came_from_is_written_to_the_config(tiny_model, tmp_path):
    video, _ = to_video(tiny_model(axes=["spatial"]))
    video.save_pretrained(tmp_path)
    again = STDiT.from_pretrained(tmp_path)
    assert (again.config.depth, list(again.config.block_sources)) == (4, [0, None, 1, None])


def test_training_moves_the_new_blocks(tiny_model):
    video, inflation = to_video(tiny_model(axes=["spatial"]))
    video.train()
    optimizer = torch.optim.SGD(video.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in video.named_parameters()}
    for _ in range(2):  # the gates open first, then what is behind them learns
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


def test_other_channels_are_refused_until_told_what_to_start_afresh(tiny_model):
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
        (lambda image: InitFrom(restart=["heads"]), "'heads' is no part"),
        (lambda image: inflated_arguments(image, {**GIVEN, "axes": ["spatial", "temporal"], "patch_size": (1, 2, 2)}, 7, InitFrom()), "makes 4 blocks of 2; leave model.depth out"),
        (lambda image: inflated_arguments(image, {**GIVEN, "hidden_size": 64, "axes": ["joint"], "patch_size": (1, 2, 2)}, None, InitFrom(path="x")), "model.hidden_size=64 but the weights of init_from.path='x' have 32"),
    ],
)  # fmt: skip
def test_what_cannot_be_inflated_is_refused_in_one_line(tiny_model, change, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        change(tiny_model(axes=["spatial"]))


@torch.no_grad()
def test_a_video_model_is_not_inflated_again_but_taken_up_whole(tiny_model):
    video = tiny_model(axes=["spatial", "temporal"])
    with pytest.raises(ValueError, match="have temporal blocks already"):
        to_video(video)
    again, inflation = to_video(video, InitFrom(path="image", temporal="convert"))
    x = torch.randn(2, 4, 3, 8, 8)
    assert torch.equal(again(x, *CASE), video(x, *CASE))
    assert "everything, it is the same model" in inflation.keeps


@torch.no_grad()
def test_classes_given_to_an_unconditional_model_say_nothing_at_first(tiny_model):
    image = tiny_model(axes=["spatial"], num_classes=0)
    video, inflation = to_video(image, num_classes=5)
    x = torch.randn(2, 4, 3, 8, 8)
    assert (video(x, *CASE) - each_frame(image, x, CASE[0], None)).abs().max() < 1e-6
    assert "New: classes, all zero" in inflation.keeps


def test_what_is_replaced_is_said(tiny_model):
    image = tiny_model(axes=["spatial"])
    _, inflation = to_video(image, InitFrom(path="image", classes="replace"), num_classes=9)
    assert "holds without a label" in inflation.keeps

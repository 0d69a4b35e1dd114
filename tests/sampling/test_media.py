"""Tasks take pictures and clips in the forms that people have them in, and a call's own frames."""

import numpy as np
import pytest
import torch
from conftest import fill
from PIL import Image

from stdit.sampling.media import as_clips, as_mask
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.vae import TinyVAE

pytestmark = pytest.mark.filterwarnings("ignore:this model")
FAST = {"num_inference_steps": 2, "progress": False, "precision": "fp32"}


@pytest.fixture
def pipe(tiny_model):
    vae = fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8)))
    model = tiny_model(in_channels=16, num_classes=3, learn_sigma=False)
    return STDiTPipeline(model, vae, STDiTScheduler("flow", learn_sigma=False), 9, 16, 16)


def frames(count: int = 5, clips: int = 1) -> np.ndarray:
    """Clips (B, F, H, W, 3) uint8."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(256, (clips, count, 16, 16, 3), generator=generator, dtype=torch.uint8).numpy()


def pixels(shown: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(shown).movedim(-1, 1).float() / 127.5 - 1


def pictures(clip: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in clip]


FORMS = {
    "pictures": pictures,
    "tuple of pictures": lambda clip: tuple(pictures(clip)),
    "array": lambda clip: clip,
    "array of floats": lambda clip: clip.astype(np.float32) / 255,
    "list of arrays": list,
    "list of tensors (3, H, W)": lambda clip: list(pixels(clip[None])[0].unbind(1)),
    "tensor (3, F, H, W)": lambda clip: pixels(clip[None])[0],
    "tensor (F, 3, H, W) in [0, 1]": lambda clip: torch.from_numpy(clip).movedim(-1, 1) / 255,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_clip_in_any_form_is_the_same_pixels(form):
    two = frames(clips=2)
    for clip in two:
        assert torch.allclose(as_clips(FORMS[form](clip), "clip"), pixels(clip[None]), atol=1e-6)
    batch = as_clips([FORMS[form](clip) for clip in two], "clip")
    assert torch.allclose(batch, pixels(two), atol=1e-6)
    one = as_clips(FORMS[form](two[0][:1]), "clip")
    assert one.shape == (1, 3, 1, 16, 16)


def test_pixels_of_stdit_are_passed_on_unchanged():
    for shape in ((2, 3, 5, 16, 16), (1, 3, 3, 16, 16), (2, 3, 1, 8, 8)):
        given = torch.rand(shape) * 2 - 1
        assert as_clips(given, "clip") is given
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(as_clips(images, "image", "image"), images[:, :, None])
    assert torch.equal(as_clips(images, "first", "either"), images[:, :, None])


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_what_a_call_returns_goes_into_the_next_and_known_frames_come_back(pipe, kind):
    first = pipe([0, 1], num_frames=5, output_type=kind, **FAST)
    for given, count in ((first.frames, 2), (first.frames[0], 1)):
        longer = pipe.extend(given, after=4, class_labels=0, output_type=kind, **FAST)
        before = as_clips(given, "clip")
        assert before.shape == (count, 3, 5, 16, 16)
        after = as_clips(longer.frames, "clip")
        assert after.shape == (count, 3, 9, 16, 16)
        assert torch.allclose(after[:, :, :5], before, atol=1e-6)


def test_every_task_takes_pictures_as_it_takes_tensors(pipe):
    shown, mask = frames()[0], np.zeros((16, 16), dtype=np.uint8)
    mask[4:12, 4:12] = 255
    clip, picture, image = pictures(shown), Image.fromarray(shown[0]), pixels(shown[None])[:, :, 0]
    tensor, regenerated = pixels(shown[None]), torch.from_numpy(mask > 127)
    calls = {
        "animate": (lambda image, **given: pipe.animate(image, 5, 1, **given), [picture], [image]),
        "extend": (lambda clip, **given: pipe.extend(clip, 4, 0, 1, **given), [clip], [tensor]),
        "connect": (lambda first, last, **given: pipe.connect(first, last, 4, 1, **given), [picture, clip], [image, tensor]),
        "loop": (lambda clip, **given: pipe.loop(clip, 4, 1, **given), [clip], [tensor]),
        "interpolate": (lambda clip, **given: pipe.interpolate(clip, 2, 1, **given), [clip], [tensor]),
        "inpaint": (lambda *given, **more: pipe.inpaint(*given, 1, **more), [clip, Image.fromarray(mask)], [tensor, regenerated]),
        "edit": (lambda clip, **given: pipe.edit(clip, 0.5, 1, **given), [clip], [tensor]),
    }  # fmt: skip
    for name, (call, theirs, ours) in calls.items():
        expected = call(*ours, seed=3, **FAST)
        found = call(*theirs, generator=torch.Generator().manual_seed(3), output_type="pt", **FAST).frames
        assert torch.equal(found.transpose(1, 2), expected * 0.5 + 0.5), name


def test_a_picture_is_seen_upright_and_on_white(tmp_path):
    image = Image.fromarray(np.zeros((16, 8, 4), dtype=np.uint8), "RGBA")
    assert torch.equal(as_clips(image, "image"), torch.ones(1, 3, 1, 16, 8))
    lying = Image.fromarray(frames()[0, 0][:8])
    lying.getexif()[0x0112] = 6
    lying.save(tmp_path / "lying.png", exif=lying.getexif())
    with Image.open(tmp_path / "lying.png") as opened:
        assert as_clips(opened, "image").shape == (1, 3, 1, 16, 8)


def test_a_mask_in_any_form_is_true_where_it_is_white():
    shown = np.zeros((2, 4, 6), dtype=np.uint8)
    shown[1, 1:3] = 255
    expected = torch.from_numpy(shown > 127)
    tensor = torch.from_numpy(shown)
    forms = [shown, shown > 127, shown / 255, [Image.fromarray(one) for one in shown], list(shown > 127)]
    forms += [tensor, tensor > 127, tensor / 255, (tensor / 255).bfloat16(), list(tensor / 255)]
    for form in forms:
        assert torch.equal(as_mask(form), expected)
    layer = np.zeros((4, 6, 4), dtype=np.uint8)
    layer[1:3] = 255  # white strokes on a transparent layer
    assert torch.equal(as_mask(Image.fromarray(layer, "RGBA")), expected[1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("clip.mp4", "clip is a str; give PIL images, lists of them, arrays"),
        ([], "clip is an empty list; give"),
        (None, "clip is a NoneType; give"),
        (frames()[0].astype(np.int64), r"clip is an array of int64 of shape \(5, 16, 16, 3\); give"),
        (frames()[0][..., 0], r"clip is an array of uint8 of shape \(5, 16, 16\); give"),
        (frames()[0].astype(np.float32), "clip is an array of values from .* arrays are uint8, or floats in .0, 1."),
        (frames()[0] / 127.5 - 1, "clip is an array of values from -1 to 1"),
        (pixels(frames()) * 3, r"clip holds values from -3 to 3; scale pixels to \[-1, 1\]"),
        (pixels(frames()).transpose(1, 2), r"clip is torch.float32 of shape \(1, 5, 3, 16, 16\)"),
        (
            [Image.new("RGB", (16, 16)), Image.new("RGB", (16, 24))],
            "of several sizes .*: 16 x 16, 24 x 16; resize them",
        ),
        ([frames(5)[0], frames(9)[0]], r"clip has clips of several lengths \(5, 9 frames\)"),
    ],
)
def test_what_is_no_clip_is_refused_in_one_line(given, message):
    with pytest.raises(ValueError, match=message) as error:
        as_clips(given, "clip")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int32", "int64", "float16", "float32", "float64"])
def test_the_upper_half_of_a_type_s_range_is_generated_and_ambiguous_values_are_refused(kind):
    white = 1 if kind.startswith("f") else 65535 if kind == "uint16" else 255
    levels = np.linspace(0, white, 9).astype(kind)[:, None]
    assert torch.equal(as_mask(levels), torch.from_numpy(levels > white / 2))
    assert torch.equal(as_mask(levels), torch.tensor([False] * 4 + [bool(levels[4] > white / 2)] + [True] * 4)[:, None])
    assert not as_mask(np.zeros((4, 4), kind)).any() and as_mask(np.full((4, 4), white, kind)).all()
    binary = np.eye(4, dtype=kind)
    if white > 1:
        with pytest.raises(ValueError, match=rf"array of {kind} .* holds 0 and 1; use bool, or 0 and {white}"):
            as_mask(binary)
    else:
        assert torch.equal(as_mask(binary), torch.eye(4).bool())
    if kind not in ("uint8", "uint16"):
        for beyond in (-1, 2 * white):
            with pytest.raises(ValueError, match="values from .*; give bool, or 0 to"):
                as_mask(np.array([[0, beyond, white]], dtype=kind))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_clips_in_half_precision_are_the_same_pixels_in_float32(pipe, half):
    given = pixels(frames()[:1]).to(half)
    assert as_clips(given, "clip").dtype == torch.float32
    options = {"class_labels": 1, **FAST}
    assert torch.equal(pipe.extend(given, 4, **options), pipe.extend(given.float(), 4, **options))


def test_the_output_of_a_call_in_place_of_its_frames_is_told_from_them(pipe):
    made = pipe(1, num_frames=5, output_type="pil", **FAST)
    with pytest.raises(ValueError, match="clip is a STDiTPipelineOutput, whose .frames are the clips; give"):
        pipe.extend(made, after=4)


def test_what_is_no_mask_is_refused_in_one_line():
    for given in (np.array([["a"]]), np.array([[None]]), np.ones((2, 2), complex), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match="mask is an array of .*; give"):
            as_mask(given)
    with pytest.raises(ValueError, match="mask is a str; give a PIL image"):
        as_mask("mask.png")
    with pytest.raises(ValueError, match="mask is a list; give a PIL image"):
        as_mask([Image.new("L", (4, 4)), Image.new("L", (4, 6))])

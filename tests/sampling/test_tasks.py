"""Every task on a tiny random model: known frames are unchanged at any position, and impossible tasks are refused."""

import pytest
import torch
from conftest import fill

from stdit.data.shapes import draw, random_clip
from stdit.diffusion.masks import MASK_STRATEGIES
from stdit.rng import keyed_rng
from stdit.sampling import tasks
from stdit.sampling.conditioning import encode_known, latent_masks, paste
from stdit.sampling.engine import Engine
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.sampling.tasks import Canvas, outpaint_canvas
from stdit.sampling.windowed import WindowedSampler
from stdit.sampling.windows import next_window
from stdit.vae import TinyVAE, load_vae

FAST = {"num_inference_steps": 2, "progress": False, "precision": "fp32"}


@pytest.fixture
def make(tiny_model):
    def build(objective="flow", schemes=tuple(MASK_STRATEGIES), **changes) -> STDiTPipeline:
        model = tiny_model(
            in_channels=16, num_classes=3, class_names=["a", "b", "c"], learn_sigma=objective == "ddpm", **changes
        )
        vae = fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8)))
        return STDiTPipeline(
            model, vae, STDiTScheduler(objective), 9, 32, 32, 8.0, objective, mask_strategies=list(schemes)
        )

    return build


def clip(frames, count=2, height=32, width=32):
    return torch.rand(count, 3, frames, height, width, generator=torch.Generator().manual_seed(frames)) * 2 - 1


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_every_task_returns_the_whole_clip_with_unchanged_known_frames(make, objective):
    pipe, five, nine = make(objective), clip(5), clip(9)
    after = pipe.extend(five, after=4, **FAST)
    assert after.shape == (2, 3, 9, 32, 32)
    assert torch.equal(after[:, :, :5], five)
    before = pipe.extend(clip(4), before=5, class_labels=["a", "c"], **FAST)
    assert torch.equal(before[:, :, 5:], clip(4))
    both = pipe.extend(clip(4), before=1, after=4, class_labels="b", **FAST)
    assert torch.equal(both[:, :, 1:5], clip(4))
    animated = pipe.animate(five[:, :, 0], **FAST)
    assert animated.shape == nine.shape
    assert torch.equal(animated[:, :, 0], five[:, :, 0])
    joined = pipe.connect(five, clip(4), frames=4, **FAST)
    assert joined.shape[2] == 13
    assert torch.equal(joined[:, :, :5], five)
    assert torch.equal(joined[:, :, 9:], clip(4))
    looped = pipe.loop(five, frames=4, **FAST)
    assert looped.shape[2] == 9
    assert torch.equal(looped[:, :, :5], five)
    faster = pipe.interpolate(five, 2, **FAST)
    assert faster.shape[2] == 9
    assert torch.equal(faster[:, :, ::2], five)
    mask = torch.zeros(9, 32, 32, dtype=torch.bool)
    mask[2:, 5:20, 3:] = True
    painted = pipe.inpaint(nine, mask, **FAST)
    assert torch.equal(painted[..., ~mask], nine[..., ~mask])
    assert not (painted[..., mask] == nine[..., mask]).all()
    assert torch.equal(pipe.edit(nine, 0.0, **FAST), nine)
    changes = [
        (pipe.edit(nine, s, "a", **{**FAST, "num_inference_steps": 10}) - nine).square().mean() for s in (0.2, 1.0)
    ]
    assert changes[0] != changes[1]


def test_images_can_be_connected_by_any_gap_that_fits(make):
    pipe, first, last = make(), clip(1)[:, :, 0], clip(2)[:, :, 0]
    joined = pipe.connect(first, last, frames=7, **FAST)
    assert torch.equal(joined[:, :, 0], first)
    assert torch.equal(joined[:, :, -1], last)


@pytest.mark.parametrize(("head", "gap", "tail"), [(1, 15, 1), (1, 16, 1), (5, 12, 2), (5, 13, 5), (5, 8, 4)])
def test_known_frames_that_fill_no_group_at_the_end_of_a_gap_are_repeated(make, monkeypatch, head, gap, tail):
    windows, look = [], WindowedSampler.fill_window

    def spy(self, canvas, *rest):
        windows.append(canvas._replace(pixels=canvas.pixels.clone(), mask=canvas.mask.clone()))
        return look(self, canvas, *rest)

    monkeypatch.setattr(WindowedSampler, "fill_window", spy)
    pipe, given = make(), clip(head + gap + tail)
    mask = torch.zeros(head + gap + tail, 1, 1, dtype=torch.bool)
    mask[head : head + gap] = True
    filled = pipe.fill(Canvas(given, mask), **FAST)
    assert filled.shape == given.shape
    assert torch.equal(filled[:, :, head + gap :], given[:, :, head + gap :])
    closing = next(w for w in windows if not w.mask[-1])
    latent_mask, _ = latent_masks(closing.mask, pipe.video_vae, (1, 1, 1))
    assert not latent_mask.flatten(1).any(1)[-1]
    if tail < 4:
        assert torch.equal(closing.pixels[:, :, -1], given[:, :, -1])
    windows.clear()
    pipe.fill(Canvas(given, mask), window=25, **FAST)
    assert len(windows) == 1  # a window that is long enough contains the repeated frames and all others


def test_canvases_without_a_partly_known_group_at_the_end_are_not_padded(make):
    vae = make().video_vae
    for canvas in (
        tasks.extend(clip(1), 0, 8, vae),
        tasks.extend(clip(4), 4, 5, vae),
        tasks.interpolate(clip(5), 2, vae),
        tasks.extend(clip(1), 8, 0, vae),
        tasks.extend(clip(7), 8, 0, vae),
    ):
        assert tasks.pad_to_groups(canvas, vae) is canvas


@pytest.mark.parametrize(("head", "gap", "tail"), [(2, 4, 0), (3, 14, 0), (4, 16, 0), (2, 12, 3), (4, 8, 1)])
def test_a_model_gets_every_frame_of_a_clip_shorter_than_a_group(make, head, gap, tail):
    pipe, given = make(), clip(head + gap + tail)
    mask = torch.zeros(head + gap + tail, 1, 1, dtype=torch.bool)
    mask[head : head + gap] = True
    canvas = tasks.pad_to_groups(Canvas(given, mask), pipe.video_vae)
    latent_mask, boundary_mask = latent_masks(canvas.mask, pipe.video_vae, (1, 1, 1))
    assert not boundary_mask.any()
    assert (~latent_mask).sum() == 2 + bool(tail)
    assert torch.equal(canvas.pixels[:, :, canvas.output], given)
    assert torch.equal(canvas.mask[canvas.output], mask)
    assert torch.equal(canvas.pixels[:, :, 0], given[:, :, 0])
    filled = pipe.fill(Canvas(given, mask), **FAST)
    assert torch.equal(filled[:, :, ~mask.flatten()], given[:, :, ~mask.flatten()])
    assert not torch.equal(filled[:, :, mask.flatten()], given[:, :, mask.flatten()])


def test_an_overlap_that_a_short_clip_does_not_need_is_no_error(make):
    assert make().extend(clip(1), after=4, overlap=5, **FAST).shape[2] == 5


@pytest.mark.parametrize("length", [7, 8, 9, 17])
def test_a_loop_ends_at_a_whole_group_of_the_clip_itself(make, length):
    vae = make().video_vae
    canvas = tasks.loop(clip(length), 4, vae)
    latent_mask, _ = latent_masks(canvas.mask, vae, (1, 1, 1))
    assert not latent_mask[-1].any()
    assert torch.equal(canvas.pixels[:, :, length + 4 :], clip(length)[:, :, : canvas.pixels.shape[2] - length - 4])


@pytest.mark.parametrize("arrangement", ["autoregressive", "pyramid"])
def test_every_arrangement_works_with_history_guidance(make, arrangement):
    made = make().extend(clip(5), after=4, class_labels="a", arrangement=arrangement, history_guidance=2.0, **FAST)
    assert torch.isfinite(made).all()


@pytest.mark.parametrize("known", [slice(0, 5), slice(5, 9), slice(1, 5), slice(0, 1)])
def test_known_latents_are_bit_equal_from_encoding_to_the_end(make, known, monkeypatch):
    pipe, seen = make(), {}
    decode = Engine.decode
    monkeypatch.setattr(Engine, "decode", lambda self, z, tile=None: seen.update(end=z) or decode(self, z, tile))
    mask = torch.ones(9, 1, 1, dtype=torch.bool)
    mask[known] = False

    pipe.fill(Canvas(clip(9), mask), "a", **FAST)
    latent_mask, boundary_mask = latent_masks(mask, pipe.video_vae, pipe.transformer.patch_size)
    with torch.no_grad():
        expected = encode_known(clip(9), mask, latent_mask, pipe.video_vae)
    assert not boundary_mask.any()
    assert torch.equal(seen["end"][:, :, ~latent_mask[:, 0, 0]], expected[:, :, ~latent_mask[:, 0, 0]])


@torch.no_grad()
def test_a_known_segment_inside_a_clip_does_not_depend_on_earlier_frames():
    vae, pixels = load_vae("tiny"), clip(17)
    changed = pixels.clone()
    changed[:, :, :9] = 0
    assert torch.equal(vae.encode_segment(pixels[:, :, 9:]), vae.encode_segment(changed[:, :, 9:]))
    alone = vae.encode(torch.cat([pixels[:, :, 9:10], pixels[:, :, 9:]], 2))[:, :, 1:]
    assert torch.equal(vae.encode_segment(pixels[:, :, 9:]), alone)


@torch.no_grad()
@pytest.mark.parametrize("known", [slice(0, 5), slice(5, 9), slice(9, 13), slice(13, 17)], ids=str)
def test_known_frames_survive_encoding_and_decoding_at_any_position(known):
    """Compared with encoding the whole clip, known frames alone lose less than 1.5 dB."""
    vae = load_vae("tiny")
    drawn = torch.stack([torch.from_numpy(draw(random_clip(keyed_rng("sample", 9, i), i))) for i in range(12)])
    pixels = drawn.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    mask = torch.ones(17, 1, 1, dtype=torch.bool)
    mask[known] = False
    latent_mask, _ = latent_masks(mask, vae, (1, 2, 2))
    whole = vae.encode(pixels)
    placed = torch.where(latent_mask.view(1, 1, -1, 1, 1), whole, encode_known(pixels, mask, latent_mask, vae))
    errors = [(vae.decode(x)[:, :, known] - pixels[:, :, known]).square().mean().log10() * 10 for x in (placed, whole)]
    assert errors[0] - errors[1] < 1.5


def test_a_patch_is_known_if_all_its_pixels_are():
    vae = TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8))
    mask = torch.zeros(9, 32, 48, dtype=torch.bool)
    mask[3, 17, 20] = True  # one pixel of frame 3: group 1, patch row 1 of 2, column 1 of 3
    latent_mask, boundary_mask = latent_masks(mask, vae, (1, 2, 2))
    assert latent_mask.shape == (3, 2, 3)
    assert latent_mask.nonzero().tolist() == boundary_mask.nonzero().tolist() == [[1, 1, 1]]
    mask[1:5, 16:, 16:32] = True
    latent_mask, boundary_mask = latent_masks(mask, vae, (1, 2, 2))
    assert latent_mask.sum() == 1
    assert not boundary_mask.any()
    frames = torch.tensor([0, 1, 1, 1, 1, 0, 1, 0, 0]).bool().view(-1, 1, 1)
    latent_mask, boundary_mask = latent_masks(frames, vae, (1, 2, 2))
    assert latent_mask.flatten().tolist() == [False, True, True]
    assert boundary_mask.flatten().tolist() == [False, False, True]


def test_blending_keeps_generated_pixels_and_fades_over_known_ones():
    mask = torch.zeros(6, 1, 1, dtype=torch.bool)
    mask[4:] = True
    out = paste(torch.ones(1, 3, 6, 2, 2), torch.zeros(1, 3, 6, 2, 2), mask, blend=2)
    torch.testing.assert_close(out[0, 0, :, 0, 0], torch.tensor([0, 0, 1 / 3, 2 / 3, 1, 1]))


@pytest.mark.parametrize(
    ("frames", "known"),
    [(33, range(5)), (33, range(29, 33)), (41, [*range(5), *range(33, 41)]), (25, range(0, 25, 2)), (29, [])],
)
def test_windows_generate_every_frame_and_contain_known_frames_in_whole_groups(frames, known):
    open_frames = torch.ones(frames, dtype=torch.bool)
    open_frames[list(known)] = False
    for _ in range(60):
        window = next_window(open_frames, 17, overlap=5, stride=4)
        if window is None:
            break
        assert 0 <= window.begin <= window.keep_from < window.keep_to <= window.end <= frames
        assert window.end - window.begin == 17
        view = ~open_frames[window.begin : window.end]
        assert view.any() or not known or window.begin == 0
        assert open_frames[window.keep_from : window.keep_to].any()
        open_frames[window.keep_from : window.keep_to] = False
    assert not open_frames.any()


@pytest.mark.parametrize("gap", [16, 20, 24, 28])
def test_a_gap_is_closed_by_the_largest_possible_window_with_both_ends(gap):
    open_frames = torch.zeros(5 + gap + 8, dtype=torch.bool)
    open_frames[5 : 5 + gap] = True
    while (window := next_window(open_frames, 17, overlap=5, stride=4)) is not None:
        if window.keep_to >= 5 + gap:
            assert window.end >= 5 + gap + 4
            assert int(open_frames.sum()) == 17 - 1 - 4  # besides one frame before the gap and a group after it
        open_frames[window.keep_from : window.keep_to] = False


def test_long_clips_are_sampled_window_by_window_and_known_frames_stay(make):
    made = make().extend(clip(5), after=20, **FAST)
    assert made.shape[2] == 25
    assert torch.equal(made[:, :, :5], clip(5))
    assert torch.equal(make().extend(clip(4), before=21, **FAST)[:, :, 21:], clip(4))


@pytest.mark.parametrize("frames", [2, 6, 7, 12, 16])
def test_clips_of_any_length_are_padded_and_cut(make, frames):
    pipe, given = make(), clip(frames)
    assert pipe.edit(given, 0.5, **FAST).shape == given.shape
    longer = pipe.extend(given, after=8, **FAST)
    assert longer.shape[2] == frames + 8
    assert torch.equal(longer[:, :, :frames], given)
    assert pipe.interpolate(given, 2, **FAST).shape[2] == 2 * frames - 1
    assert torch.equal(pipe.connect(given, given, 12, **FAST)[:, :, frames + 12 :], given)
    assert pipe.loop(given, 12, **FAST).shape[2] == frames + 12


def causal(make):
    return make(causal=True, window=3, position_encoding="rope", axes=["joint"])


def test_a_stream_equals_extend_in_constant_memory(make):
    pipe = causal(make)
    whole = pipe.extend(clip(5), after=24, class_labels="a", **FAST)
    parts = list(pipe.stream(clip(5), 24, class_labels="a", num_inference_steps=2, precision="fp32"))
    assert [part.shape[2] for part in parts] == [4] * 6
    assert torch.equal(torch.cat(parts, 2), whole[:, :, 5:])
    assert torch.equal(whole[:, :, :5], clip(5))


def test_a_causal_model_refuses_later_known_frames(make):
    for call in (lambda p: p.extend(clip(4), before=5, **FAST), lambda p: p.connect(clip(5), clip(4), 4, **FAST)):
        with pytest.raises(ValueError, match="this model is causal: it cannot attend"):
            call(causal(make))
    with pytest.raises(ValueError, match="this model is not causal; use extend"):
        next(make().stream(clip(5), 4))


def test_models_not_trained_with_known_frames_warn_and_name_their_mask_strategy(make):
    with pytest.warns(
        UserWarning, match=r"trained with objective.mask_strategy=shared .* train with objective.mask_strategy=mixed"
    ):
        make(schemes=["shared"]).extend(clip(5), after=4, **FAST)


def test_outpainting_keeps_the_image_in_the_middle(make):
    pixels, mask = outpaint_canvas(clip(5), 32, 64)
    made = make().inpaint(pixels, mask, **FAST)
    assert made.shape == (2, 3, 5, 32, 64)
    assert torch.equal(made[..., 16:48], clip(5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.extend(clip(5)), "after=0 and before=0 add no frames"),
        (lambda p: p.extend(clip(5), after=-4), r"=-\d+ must be a number of new frames, 0 or more"),
        (
            lambda p: p.extend(clip(5), after=6),
            r"after=6 is not whole groups of VAE 'tiny' .* the 11 frames in all. Use after=4 or 8",
        ),
        (lambda p: p.extend(clip(4), before=4), r"before=4 is not whole groups .* Use before=1 or 5"),
        (lambda p: p.extend(clip(5), after=4, overlap=9), "overlap=9 leaves nothing to be generated"),
        (lambda p: p.connect(clip(5), clip(4), 5), r"frames=5 is not whole groups .* Use frames=4 or 8"),
        (lambda p: p.connect(clip(5), clip(4), 0), "frames must be >= 1, got 0"),
        (
            lambda p: p.connect(clip(5), clip(4, height=16), 4),
            "equal in number and size: .*last is 2 clip.s. of 16 x 32",
        ),
        (lambda p: p.loop(clip(5), 6), r"frames=6 is not whole groups .* Use frames=4 or 8"),
        (lambda p: p.animate(clip(5)), "takes one image, got 5 frames"),
        (lambda p: p.animate(clip(1), 1), "num_frames must be >= 2, got 1"),
        (lambda p: p.interpolate(clip(5), 1), "factor=1"),
        (
            lambda p: p.inpaint(clip(5), torch.ones(5, 16, 16, dtype=torch.bool)),
            r"mask is torch.bool of shape \(5, 16, 16\)",
        ),
        (lambda p: p.inpaint(clip(5), torch.full((5, 32, 32), 3.0)), "values from 3 to 3; give bool, or 0 to 1"),
        (lambda p: p.inpaint(clip(5), torch.zeros(32, 32, dtype=torch.bool)), "nothing is to be generated"),
        (lambda p: p.edit(clip(5), 1.2), "strength must be a noise level .* got 1.2"),
        (lambda p: p.edit(clip(5) * 127, 0.5), r"scale pixels to \[-1, 1\]"),
        (lambda p: p.edit(clip(5)[:, :2], 0.5), r"pixels are \(B, 3, F, H, W\)"),
        (lambda p: p.extend(clip(5), after=4, class_labels=["a", "b", "c"]), "3 class_labels for 2 clips"),
        (lambda p: p.extend(clip(5), after=4, blend=-1), "blend must be >= 0, got -1"),
        (lambda p: outpaint_canvas(clip(5), 32, 32), "leaves no room around"),
    ],
)
def test_impossible_tasks_are_refused_in_one_line(make, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(make())
    assert "\n" not in str(error.value)


def test_a_diffusers_scheduler_samples_clips_and_refuses_tasks(make):
    import diffusers

    pipe = make()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    assert pipe(["a"], num_frames=5, **FAST).shape == (1, 3, 5, 32, 32)
    with pytest.raises(ValueError, match="a noise level per frame.*FlowMatchEulerDiscreteScheduler: add solver"):
        pipe.extend(clip(5), after=4, **FAST)
    assert torch.isfinite(pipe.extend(clip(5), after=4, solver="euler", **FAST)).all()

"""Each option of a task has its effect on a tiny random model, and invalid options are refused before any work."""

import itertools

import pytest
import torch
from conftest import fill

from stdit.conditions import Guided
from stdit.data.shapes import draw, random_clip
from stdit.diffusion.masks import MASK_STRATEGIES
from stdit.diffusion.objective import ObjectiveConfig, build_objective
from stdit.diffusion.predictions import Estimate
from stdit.rng import keyed_rng
from stdit.sampling import windowed
from stdit.sampling.canvas import Canvas
from stdit.sampling.conditioning import clamp_to_bounds, latent_masks, pixel_guided
from stdit.sampling.guidance import Guidance, guided
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.sampling.windows import next_window
from stdit.vae import TinyVAE, load_vae

FAST = {"num_inference_steps": 2, "progress": False, "precision": "fp32"}


@pytest.fixture
def make(tiny_model):
    def build(schemes=tuple(MASK_STRATEGIES), **changes) -> STDiTPipeline:
        model = tiny_model(in_channels=16, num_classes=0, learn_sigma=False, sample_size=(3, 4, 4), **changes)
        vae = fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8)))
        return STDiTPipeline(model, vae, STDiTScheduler("flow"), 9, 32, 32, 8.0, "flow", mask_strategies=list(schemes))

    return build


def clip(frames, count=1, height=32, width=32):
    return torch.rand(count, 3, frames, height, width, generator=torch.Generator().manual_seed(frames)) * 2 - 1


def test_history_guidance_leads_away_from_the_prediction_without_known_frames():
    objective = build_objective(ObjectiveConfig())
    x, noised_context = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 4, 3, 4, 4)
    levels = torch.tensor([[0.0, 0.7, 0.7]])

    def model(hidden_states, timestep, **_):
        return hidden_states.mean(2, keepdim=True) * (1 + timestep.view(2, 1, -1, 1, 1) / 1000)

    def at(history):
        output = guided(model, objective, Guided({}), Guidance(history=history), noised_context=noised_context)
        return output(x, levels)[:, :, 1:]

    x_without = torch.cat([noised_context[:, :, :1], x[:, :, 1:]], 2)
    without = model(x_without, objective.timestep(torch.tensor([[1.0, 0.7, 0.7]])).expand(2, -1))[:, :, 1:]
    torch.testing.assert_close(at(3.0), at(1.0) + 2 * (at(1.0) - without))
    assert not torch.allclose(at(1.0), without)


@torch.no_grad()
def test_pixel_guidance_brings_known_pixels_of_partly_known_patches_into_the_estimate():
    vae = load_vae("tiny")
    shape = random_clip(keyed_rng("sample", 0), 0, 9, 32)
    pixels = torch.from_numpy(draw(shape)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    mask = torch.arange(9)[:, None, None] % 2 == 1
    latent_mask, boundary_mask = latent_masks(mask, vae, (1, 2, 2))
    assert boundary_mask.any()
    other = vae.encode(torch.full_like(pixels, 0.2))
    path = build_objective(ObjectiveConfig()).path

    def predict(x, levels, target=None):
        return Estimate(other, x)

    levels = torch.where(latent_mask, 0.5, 0.0).view(1, -1)
    helped = pixel_guided(predict, Canvas(pixels, mask), boundary_mask, vae=vae, path=path, decode=vae.decode)
    x = torch.randn(other.shape)
    known = ~mask.expand(9, 32, 32)
    error = [(vae.decode(f(x, levels).clean) - pixels)[:, :, known].square().mean() for f in (predict, helped)]
    assert error[1] < 0.5 * error[0]
    alpha, sigma = path.alpha_sigma(levels.view(1, 1, -1, 1, 1))
    estimate = helped(x, levels)
    torch.testing.assert_close((alpha * estimate.clean + sigma * estimate.noise)[:, :, 1:], x[:, :, 1:])


def test_pixels_slightly_out_of_bounds_are_clamped_and_others_are_not():
    bounds = torch.stack([torch.zeros(1, 3, 1, 1, 4), torch.full((1, 3, 1, 1, 4), 0.5)])
    decoded = torch.tensor([0.25, 0.7, -0.3, 1.0]).view(1, 1, 1, 1, 4).expand(1, 3, 1, 1, 4)
    assert clamp_to_bounds(decoded, bounds)[0, 0, 0, 0].tolist() == pytest.approx([0.25, 0.5, 0.0, 1.0])
    assert clamp_to_bounds(decoded, None) is decoded


def test_arrangement_window_and_overlap_have_an_effect(make, monkeypatch):
    pipe, arranged, windows = make(), [], []
    make_schedule, windows_of = windowed.make_schedule, windowed.windows_of

    def spy_schedule(levels, mask, arrangement, **steps):
        arranged.append((len(levels), arrangement, *steps.values()))
        return make_schedule(levels, mask, arrangement, **steps)

    def spy_windows(to_generate, size, stride):
        windows.append((*size, stride))
        return windows_of(to_generate, size, stride=stride)

    monkeypatch.setattr(windowed, "make_schedule", spy_schedule)
    monkeypatch.setattr(windowed, "windows_of", spy_windows)
    pipe.extend(clip(5), after=4, **FAST)
    pipe.extend(clip(5), after=12, arrangement="pyramid", stagger=2, overlap=1, **FAST)
    pipe.extend(clip(5), after=12, window=13, **FAST)
    assert set(arranged) == {(3, "together", 1, 1), (3, "pyramid", 1, 2)}
    assert [key for key, _ in itertools.groupby(windows)] == [(9, 5, 4), (9, 1, 4), (13, 5, 4)]


def test_known_pixels_near_the_seam_fade_only_with_blend(make):
    pipe = make()
    blended = pipe.extend(clip(5), after=4, blend=2, **FAST)
    changed = (blended[:, :, :5] != clip(5)).flatten(3).any(3)[0].any(0)
    assert changed.tolist() == [False, False, False, True, True]
    as_decoded = pipe.extend(clip(5), after=4, paste=False, **FAST)
    assert (as_decoded[:, :, :5] != clip(5)).all(2).float().mean() > 0.9


def test_tiles_bound_the_size_that_is_decoded_at_once_for_clips_and_tasks(make, monkeypatch):
    pipe, sizes = make(), []
    decode = pipe.video_vae._decode
    monkeypatch.setattr(pipe.video_vae, "_decode", lambda z: sizes.append(tuple(z.shape[3:])) or decode(z))
    hole = torch.zeros(64, 64, dtype=torch.bool)
    hole[3:50, 5:40] = True
    for call in (
        lambda: pipe(num_frames=1, height=64, width=64, tile=4, **FAST),
        lambda: pipe.inpaint(clip(5, height=64, width=64), hole, tile=4, **FAST),
    ):
        sizes.clear()
        assert torch.isfinite(call()).all()
        assert set(sizes) == {(4, 4)}


def given_micro_conditions(pipe):
    given = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs["micro_conditions"][:, 0]), with_kwargs=True
    )
    return given


def test_micro_conditions_are_the_rate_length_and_size_of_the_clip(make):
    pipe = make(micro_conditions=["fps", "seconds", "height", "width"])
    given = given_micro_conditions(pipe)
    pipe.extend(clip(5, height=64), after=4, **FAST)
    assert given.pop().tolist() == [[8.0, 9 / 8, 64.0, 32.0]]
    pipe.extend(clip(5), after=4, fps=16.0, **FAST)
    assert given.pop().tolist() == [[16.0, 9 / 16, 32.0, 32.0]]
    assert pipe.interpolate(clip(3), 4, **FAST).shape[2] == 9
    assert given.pop()[0, 0] == 32
    pipe.interpolate(clip(3), 4, fps=2.0, **FAST)
    assert given.pop()[0, 0] == 8


def test_a_stream_is_conditioned_on_its_frame_rate(make):
    pipe = make(causal=True, window=3, position_encoding="rope", micro_conditions=["fps"])
    given = given_micro_conditions(pipe)
    list(pipe.stream(clip(5), 8, num_inference_steps=1, precision="fp32", fps=4.0))
    assert {float(info) for info in given} == {4.0}


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_interpolated_clips_contain_the_original_frames(make, factor):
    made = make().interpolate(clip(5), factor, **FAST)
    assert torch.equal(made[:, :, ::factor], clip(5))


def test_pos_scaling_can_be_chosen_after_training(make):
    pipe = make(position_encoding="rope_3d")
    at = {}
    for positions in ("none", "interpolate"):
        pipe.transformer.set_pos_scaling(positions)
        at[positions] = [pipe(num_videos=1, num_frames=9, height=h, width=32, **FAST) for h in (32, 64)]
    assert torch.equal(at["none"][0], at["interpolate"][0])
    assert not torch.allclose(at["none"][1], at["interpolate"][1])
    with pytest.raises(ValueError, match="Did you mean 'interpolate'"):
        pipe.transformer.set_pos_scaling("interpolated")


def test_windows_of_one_group_make_progress(make):
    assert torch.equal(make().extend(clip(5), after=16, window=5, **FAST)[:, :, :5], clip(5))


@pytest.mark.parametrize("length", [9, 13, 17])
@pytest.mark.parametrize("stride", [1, 4])
def test_windows_end_for_every_pattern_of_known_frames(length, stride):
    for frames, overlap in itertools.product((length, 25, 41), (1, 5, length - stride)):
        for begin, end in ((0, 5), (0, 1), (frames - 4, frames), (8, 12), (0, 0), (5, frames)):
            open_frames = torch.ones(frames, dtype=torch.bool)
            open_frames[begin:end] = False
            while (window := next_window(open_frames, length, overlap=overlap, stride=stride)) is not None:
                assert open_frames[window.keep_from : window.keep_to].any()
                open_frames[window.keep_from : window.keep_to] = False


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.extend(clip(5), after=4, window=1), "window=1 does not hold .* use window=5"),
        (lambda p: p.extend(clip(4), before=9, window=5), "window=5 does not hold .* use window=9"),
        (lambda p: p.extend(clip(5), after=12, window=10), "window=10 does not hold .* use window=13"),
        (lambda p: p.extend(clip(5), after=4, window=0), "window must be >= 1, got 0"),
        (lambda p: p.extend(clip(5), after=4, seed=-1), "seed must be >= 0, got -1"),
        (lambda p: p.extend(clip(5), after=4, tile=2), "tile must be >= 3, got 2, since"),
        (lambda p: p.extend(clip(5), after=4, fps=-3.0), "fps must be a positive number, got -3.0"),
        (lambda p: p.extend(clip(5), after=4, fps=float("inf")), "fps must be a positive number, got inf"),
        (lambda p: p.extend(clip(5), after=4, guidance_scale=float("nan")), "guidance_scale must be >= 0, got nan"),
        (lambda p: p.extend(clip(5), after=4, history_guidance=-1.0), "history_guidance must be >= 0, got -1.0"),
        (lambda p: p.extend(clip(5), after=4, overlap=6), "overlap=6 leaves nothing .* use 1 to 5"),
        (lambda p: p.extend(clip(5), after=4, solver="eulr"), "Did you mean 'euler'"),
        (lambda p: p.extend(clip(5), after=4, arrangement="pyramyd"), "Did you mean 'pyramid'"),
        (lambda p: p.extend(clip(5), after=4, chunk_size=0), "chunk_size must be >= 1, got 0"),
        (lambda p: p.extend(clip(5), after=4, chunk_size=2), "chunk_size=2 has no meaning .*together.; leave it out"),
        (
            lambda p: p.extend(clip(5), after=4, guidance_interval=(0.9, 0.1)),
            r"0 <= low <= high <= 1, got \(0.9, 0.1\)",
        ),
    ],
)
def test_invalid_options_are_refused_before_the_model_runs(make, call, message):
    pipe = make()
    pipe.transformer.forward = None
    with pytest.raises(ValueError, match=message) as error:
        call(pipe)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"history_guidance": 3.0}, "leave out history_guidance=3.0"),
        ({"arrangement": "pyramid"}, "leave out arrangement=pyramid"),
        ({"tile": 8}, "leave out tile=8"),
        ({"guidance_interval": (0.0, 0.5)}, "leave out guidance_interval"),
    ],
)
def test_a_causal_model_refuses_options_that_a_stream_does_not_support(make, option, message):
    with pytest.raises(ValueError, match=message):
        make(causal=True, window=3, position_encoding="rope").extend(clip(5), after=4, **option, **FAST)


def test_a_causal_model_without_a_window_warns_beyond_its_length(make):
    with pytest.warns(UserWarning, match="trained on 9 frames without a window: for 13"):
        make(causal=True, position_encoding="rope").extend(clip(5), after=8, **FAST)


def test_a_model_without_per_patch_levels_accepts_masks_of_whole_frames_only(make):
    pipe = make(conditioning="in_context")
    last = torch.zeros(5, 32, 32, dtype=torch.bool)
    last[1:] = True
    assert torch.equal(pipe.inpaint(clip(5), last, **FAST)[:, :, :1], clip(5)[:, :, :1])
    with pytest.raises(ValueError, match="takes levels per frame; mask whole frames"):
        pipe.inpaint(clip(5), torch.ones(32, 32, dtype=torch.bool).tril(), **FAST)


@pytest.mark.parametrize(
    ("schemes", "call"),
    [
        (["suffix"], lambda p: p.extend(clip(5), after=4, **FAST)),
        (["prefix"], lambda p: p.extend(clip(4), before=5, **FAST)),
        (["ends"], lambda p: p.extend(clip(4), before=1, after=4, **FAST)),
        (["ends"], lambda p: p.interpolate(clip(5), 2, **FAST)),
        (["prefix", "suffix"], lambda p: p.connect(clip(5), clip(4), 4, **FAST)),
        (["prefix", "ends"], lambda p: p.inpaint(clip(5), torch.ones(32, 32, dtype=torch.bool).tril(), **FAST)),
    ],
)
def test_a_model_warns_of_known_frames_where_training_had_none(make, schemes, call):
    with pytest.warns(
        UserWarning, match=f"trained with objective.mask_strategy={', '.join(schemes)} but never with known"
    ) as said:
        call(make(schemes))
    assert said[0].filename == __file__  # it points at the caller


@pytest.mark.filterwarnings("error")
def test_a_model_does_not_warn_of_what_it_was_trained_for(make):
    make(schemes=["motion"]).extend(clip(5), after=4, **FAST)
    make(schemes=["suffix"]).extend(clip(4), before=5, **FAST)
    make(schemes=["ends"]).loop(clip(5), 4, **FAST)
    make(schemes=["per_frame"]).interpolate(clip(5), 2, **FAST)
    make(schemes=["prefix"]).edit(clip(5), 0.0, **FAST)
    make(causal=True, position_encoding="rope").edit(clip(17), 0.5, **FAST)
    make(schemes=["teacher_forcing"], causal=True, window=3, position_encoding="rope").extend(clip(5), after=4, **FAST)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"history_guidance": 2.0}, "history_guidance=2.0 has no effect without known frames"),
        ({"blend": 2}, "blend=2 has no effect without known frames"),
        ({"overlap": 4}, "overlap=4 has no effect without several windows"),
        (
            {"guidance_scale": 1, "guidance_interval": (0, 0.5)},
            r"guidance_interval=\(0, 0.5\) has no effect without guidance",
        ),
    ],
)
def test_an_option_that_changes_nothing_for_the_clip_warns(make, choices, message):
    with pytest.warns(UserWarning, match=message):
        make().edit(clip(5), 0.5, **{**FAST, **choices})


def test_a_guider_that_has_nothing_to_lead_away_from_warns(make):
    with pytest.warns(UserWarning, match="guider=cfg_zero has no effect without label, caption or actions"):
        make().edit(clip(5), 0.5, guider="cfg_zero", **FAST)


def test_a_guider_on_top_of_learnt_guidance_is_refused_as_such(make):
    with pytest.raises(ValueError, match="^guider='auto' on top of the 2 that this model has learnt; leave it out"):
        make(flow_map=True, distilled_guidance=2.0).edit(clip(5), 0.5, guider="auto", **FAST)

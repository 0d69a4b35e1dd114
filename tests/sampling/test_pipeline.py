import diffusers
import pytest
import torch
from conftest import fill

from stdit.conditions import Guided
from stdit.diffusion.objective import ObjectiveConfig, build_objective
from stdit.sampling.guidance import Guidance, guided
from stdit.sampling.options import SamplingOptions
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.vae import TinyVAE


@pytest.fixture
def make(tiny_model):
    def build(objective: str = "flow", scheduler=None, **changes) -> STDiTPipeline:
        changes = {"class_names": ["a", "b", "c"], **changes}
        model = tiny_model(in_channels=16, num_classes=3, learn_sigma=objective == "ddpm", **changes)
        vae = fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8)))
        scheduler = scheduler or STDiTScheduler(objective)
        return STDiTPipeline(model, vae, scheduler, 5, 32, 32, 8.0, objective, vae.fingerprint())

    return build


def sample(pipe, labels=(0, 2), **options):
    return pipe(list(labels), **{"num_inference_steps": 3, "progress": False, "precision": "fp32", **options})


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 32, 32), (9, 16, 48), (5, 32, 32)])
def test_any_size_that_vae_and_patch_support_can_be_sampled(make, objective, frames, height, width):
    clips = sample(make(objective), num_frames=frames, height=height, width=width)
    assert clips.shape == (2, 3, frames, height, width)
    assert torch.isfinite(clips).all()
    assert clips.abs().max() <= 1


@pytest.mark.parametrize("solver", ["euler", "heun", "ddim", "ddpm"])
def test_a_clip_depends_on_seed_and_index_and_not_on_its_batch(make, solver):
    pipe = make("ddpm")
    together = sample(pipe, (0, 1, 2), solver=solver)
    alone = sample(pipe, (0, 1, 2), solver=solver, batch_size=1)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-3)
    assert not torch.equal(sample(pipe, solver=solver), sample(pipe, solver=solver, seed=1))
    assert torch.equal(sample(pipe, solver=solver), sample(pipe, solver=solver))


def test_names_are_accepted_wherever_labels_are(make):
    pipe = make()
    assert torch.equal(sample(pipe, ["a", "c"]), sample(pipe, [0, 2]))
    assert torch.equal(pipe.labels("b"), torch.tensor([1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": [4]}, "class label 4 is out of range. Use 0 to 2, or 3 for no label"),
        ({"labels": [-1]}, "class label -1 is out of range"),
        ({"labels": ["d"]}, "class label 'd' is unknown. Choose one of: a, b, c"),
        ({"num_frames": 6}, "Use 5 or 9"),
        ({"height": 24}, "height=24 gives 3 latents, which patches of 2 do not divide. Use 16 or 32"),
        ({"width": 0, "height": -8}, "height=-8"),
        ({"num_inference_steps": 0}, "num_inference_steps must be >= 1, got 0"),
        ({"solver": "eular"}, "Did you mean 'euler'"),
    ],
)
def test_impossible_requests_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        sample(make(), **options)


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_what_is_saved_samples_the_same(make, objective, tmp_path):
    pipe = make(objective)
    pipe.save_pretrained(tmp_path)
    again = STDiTPipeline.from_pretrained(tmp_path)
    assert again.config.num_frames == 5
    assert torch.equal(sample(pipe), sample(again))


def test_a_folder_without_weights_is_refused_in_one_line(make, tmp_path):
    with pytest.raises(ValueError, match="no model_index.json"):
        STDiTPipeline.from_pretrained(tmp_path)
    make().save_pretrained(tmp_path)
    next((tmp_path / "transformer").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="has no weights"):
        STDiTPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        STDiTPipeline.from_pretrained("models/none")


def test_the_wrong_vae_is_refused(make):
    pipe = make()
    other = fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8)), 0.1)
    with pytest.raises(ValueError, match="has other weights"):
        STDiTPipeline(pipe.transformer, other, STDiTScheduler(), vae_fingerprint=pipe.config.vae_fingerprint)
    with pytest.raises(ValueError, match="takes latents of 16 channels, but VAE 'tiny' makes 4"):
        STDiTPipeline(pipe.transformer, TinyVAE(channels=4), STDiTScheduler())


@pytest.mark.parametrize(
    ("objective", "scheduler"),
    [
        ("flow", diffusers.FlowMatchEulerDiscreteScheduler()),
        ("flow", diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)),
        ("flow", diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)),
        ("ddpm", diffusers.DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")),
        (
            "ddpm",
            diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02, variance_type="learned_range", clip_sample=False),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_diffusers_schedulers_plug_in(make, objective, scheduler):
    clips = sample(make(objective, scheduler))
    assert torch.isfinite(clips).all()


def test_diffusers_euler_on_the_same_levels_gives_our_clip(make):
    ours = sample(make("flow"), num_inference_steps=8)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = make("flow", theirs)
    original = theirs.set_timesteps
    theirs.set_timesteps = lambda n, device=None: original(sigmas=[1 - i / n for i in range(n)], device=device)
    torch.testing.assert_close(sample(pipe, num_inference_steps=8), ours, atol=2e-3, rtol=1e-2)


def test_a_named_solver_replaces_the_scheduler_of_the_folder(make):
    theirs = make("ddpm", diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False))
    with pytest.raises(ValueError, match="'ddim50' is for stdit's solvers, but this model has scheduler DDIMScheduler"):
        sample(theirs, num_inference_steps="ddim50")
    ours = make("ddpm")
    same = {"num_inference_steps": "ddim10", "solver": "ddim"}
    assert torch.equal(sample(theirs, **same), sample(ours, **same))
    with pytest.raises(ValueError, match="flow takes a number"):
        sample(make(), num_inference_steps="ddim10")


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
def test_a_shift_of_the_call_takes_the_place_of_the_models(make, solver):
    plain, shifted = make(scheduler=STDiTScheduler(shift=2.0)), make(scheduler=STDiTScheduler(shift=4.0))
    options = {"solver": solver, "num_inference_steps": 4}
    expected = sample(shifted, **options)
    assert torch.equal(sample(plain, shift=4.0, **options), expected)
    assert not torch.equal(sample(plain, **options), expected)


@pytest.mark.parametrize("shift", [0.01, 0.2, 2.14, 4.03, 16.03, 100])
def test_any_shift_within_reason_is_taken(make, shift):
    assert torch.isfinite(sample(make(), shift=shift)).all()


def test_a_stagger_beyond_the_steps_of_a_frame_is_refused(make):
    options = SamplingOptions(arrangement="pyramid", stagger=4)  # of the default's 30 steps
    with pytest.raises(ValueError, match=r"stagger=4 is more than the 3 steps of a frame.*; give 1 to 3\."):
        sample(make(), options=options, num_inference_steps=3)
    assert torch.isfinite(sample(make(), options=options, num_inference_steps=4)).all()


@pytest.mark.parametrize("shift", [1e9, 1e-9])
def test_a_shift_that_leaves_no_levels_between_noise_and_data_is_refused(make, shift):
    with pytest.raises(ValueError, match=r"shift=\S+ \(--shift\) puts several of \d+ steps at one noise level"):
        sample(make(), shift=shift)


def test_a_shift_is_refused_where_levels_are_not_those_of_flow(make):
    with pytest.raises(ValueError, match=r"shift=2.0 .* levels of flow, but .* with ddpm; leave it out"):
        sample(make("ddpm"), shift=2.0)
    theirs = make("flow", diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(
        ValueError, match="scheduler FlowMatchEulerDiscreteScheduler; leave it out, or add solver=.euler"
    ):
        sample(theirs, shift=2.0)


def test_class_names_that_are_lists_match_each_name(make):
    pipe = make(class_names=["tench, Tinca tinca", "goldfish", "shark"])
    assert pipe.labels(["Tinca tinca", "tench, Tinca tinca", "shark"]).tolist() == [0, 0, 2]


def test_a_scheduler_for_another_prediction_is_refused(make):
    with pytest.raises(ValueError, match="expects prediction_type='epsilon', but this model was trained for 'flow'"):
        make("flow", diffusers.DDIMScheduler())


def test_guidance_is_linear_in_its_scale_and_keeps_to_its_interval(tiny_model):
    model, objective = tiny_model(), build_objective(ObjectiveConfig(name="ddpm"))
    x, labels = torch.randn(2, 4, 3, 8, 8), torch.tensor([1, 2])
    levels = torch.full((1, 3), 0.5)
    given = Guided({"label": labels[:, None]}, {"label": torch.full((2, 1), 5)})

    def output(scale, interval=(0.0, 1.0)):
        with torch.no_grad():
            return guided(model, objective, given, Guidance(scale, interval))(x, levels)

    one, zero, three = output(1.0), output(0.0), output(3.0)
    torch.testing.assert_close(three[:, :4], zero[:, :4] + 3 * (one - zero)[:, :4], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(three[:, 4:], one[:, 4:], atol=1e-5, rtol=1e-4)
    assert torch.equal(output(3.0, (0.6, 1.0)), one)
    assert torch.equal(output(3.0, (0.4, 0.6)), three)


def test_an_unconditional_model_takes_a_number_of_clips_and_no_labels(tiny_model):
    vae = fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8)))
    pipe = STDiTPipeline(tiny_model(in_channels=16, num_classes=0, learn_sigma=False), vae, STDiTScheduler(), 1, 16, 16)
    assert pipe(num_videos=3, num_inference_steps=1, progress=False).shape == (3, 3, 1, 16, 16)
    with pytest.raises(ValueError, match="the model is unconditional"):
        pipe([0], progress=False)

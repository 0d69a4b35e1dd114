"""Sampling does what its options say: counts, negative conditions, schedulers, devices, claims on outputs."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from stdit.files import claimed
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.text import HashedWordEncoder, _words, warn_of_length
from stdit.vae import as_video_vae
from stdit.vae.tiny import TinyVAE

CAUSAL = {"axes": ["joint"], "causal": True, "position_encoding": "rope_3d", "window": 2}
FAST = {"num_inference_steps": 2, "progress": False, "num_frames": 5, "height": 16, "width": 16}


def make_pipe(tiny_model, objective="flow", **model):
    arguments = {"in_channels": 16, "num_classes": 3, "learn_sigma": False, **model}
    vae = TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8))
    scheduler = STDiTScheduler(objective, learn_sigma=False)
    return STDiTPipeline(tiny_model(**arguments), vae, scheduler, 5, 16, 16, 8.0, objective)


@pytest.fixture
def pipe(tiny_model):
    return make_pipe(tiny_model)


def test_num_videos_of_one_label_are_so_many_clips_and_of_several_labels_as_many_as_these(pipe):
    many = pipe(1, num_videos=3, **FAST)
    assert len(many) == 3 and not torch.equal(many[0], many[1])
    assert torch.equal(pipe([1, 1, 1], **FAST), many)
    with pytest.raises(ValueError, match="num_videos=3 does not fit 2 labels"):
        pipe([0, 1], num_videos=3, **FAST)


def test_a_negative_label_is_what_guidance_leads_away_from(pipe):
    plain = pipe(0, guidance_scale=3.0, **FAST)
    null = pipe(0, negative_class_labels=3, guidance_scale=3.0, **FAST)
    away = pipe(0, negative_class_labels=1, guidance_scale=3.0, **FAST)
    assert torch.equal(plain, null) and not torch.equal(plain, away)
    same = pipe(0, negative_class_labels=0, guidance_scale=3.0, **FAST)
    assert torch.allclose(same, pipe(0, guidance_scale=1.0, **FAST), atol=1e-5)
    with pytest.warns(UserWarning, match="no effect at guidance_scale=1"):
        pipe(0, negative_class_labels=1, guidance_scale=1.0, **FAST)


def test_a_negative_caption_is_what_guidance_leads_away_from(tiny_model):
    pipe = make_pipe(tiny_model, num_classes=0, caption_channels=64)
    pipe._encoder = HashedWordEncoder()
    pipe.register_to_config(text_encoder="words")
    plain, away = (pipe(captions="red", guidance_scale=3.0, negative_captions=n, **FAST) for n in (None, "a blue one"))
    assert not torch.equal(plain, away)
    assert torch.allclose(plain, pipe(captions="red", guidance_scale=3.0, negative_captions="", **FAST), atol=1e-5)
    assert len(pipe(captions="red", num_videos=2, **FAST)) == 2


def test_known_frames_without_a_label_are_warned_of_and_with_one_are_not(pipe):
    image = torch.zeros(1, 3, 16, 16)
    with pytest.warns(UserWarning, match="no label is given"):
        pipe.animate(image, 5, num_inference_steps=1, progress=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe.animate(image, 5, class_labels=0, num_inference_steps=1, progress=False)
    assert not [one for one in caught if "no label" in str(one.message)]


def test_a_scheduler_of_another_parameterisation_is_refused_when_it_is_assigned(pipe, tiny_model):
    for wrong in (DDIMScheduler(), DPMSolverMultistepScheduler(prediction_type="flow_prediction")):
        with pytest.raises(ValueError, match="use_flow_sigmas=True"):
            pipe.scheduler = wrong
    assert isinstance(pipe.scheduler, STDiTScheduler)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    ddpm = make_pipe(tiny_model, "ddpm")
    for wrong in (
        FlowMatchEulerDiscreteScheduler(),
        DDIMScheduler(prediction_type="v_prediction"),
        DDIMScheduler(beta_schedule="scaled_linear"),
        DDIMScheduler(num_train_timesteps=500),
    ):
        with pytest.raises(ValueError, match="beta_schedule='linear', beta_start=0.0001, beta_end=0.02"):
            ddpm.scheduler = wrong
    ddpm.scheduler = DDIMScheduler()
    assert ddpm.engine.objective.config.learn_sigma is False  # what training did is known, whatever the scheduler


def test_the_statistics_of_an_adapted_vae_follow_the_autoencoder_to_its_device():
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    adapted = as_video_vae(vae)
    vae.to("meta")  # as a pipeline does with its component
    assert adapted.encode(torch.zeros(1, 3, 1, 8, 8, device="meta")).is_meta
    assert adapted.decode(torch.zeros(1, 4, 1, 8, 8, device="meta")).is_meta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, {"default": torch.bfloat16, "vae": torch.float32}])
def test_a_model_loads_in_half_precision_is_saved_so_and_loads_again(pipe, tmp_path, dtype):
    pipe.register_to_config(vae_fingerprint=pipe.video_vae.fingerprint())
    pipe.save_pretrained(tmp_path / "whole")
    expected = pipe(1, **FAST)
    half = STDiTPipeline.from_pretrained(tmp_path / "whole", dtype=dtype)
    assert half.transformer.dtype == (dtype["default"] if isinstance(dtype, dict) else dtype)
    assert (half(1, **FAST) - expected).abs().mean() < 0.02
    half.save_pretrained(tmp_path / "half")
    again = STDiTPipeline.from_pretrained(tmp_path / "half", dtype=dtype)
    assert torch.equal(again(1, **FAST), half(1, **FAST))


@pytest.mark.parametrize(("solver", "least"), [("ab2", 2), ("dpmpp_2m", 4)])
def test_a_multistep_solver_serves_tasks_and_streams_and_refuses_fewer_steps_than_it_needs(
    pipe, tiny_model, solver, least
):
    clip, given = torch.rand(1, 3, 5, 16, 16), {"solver": solver, "num_inference_steps": 4, "progress": False}
    for arrangement in ("together", "autoregressive", "pyramid"):
        extended = pipe.extend(clip, after=4, class_labels=0, arrangement=arrangement, **given)
        assert torch.equal(extended[:, :, :5], clip) and torch.isfinite(extended).all()
    mask = torch.zeros(5, 16, 16, dtype=torch.bool)
    mask[:, 4:9, 2:7] = True
    assert torch.equal(pipe.inpaint(clip, mask, class_labels=0, **given)[:, :, ~mask], clip[:, :, ~mask])
    causal = make_pipe(tiny_model, **CAUSAL)
    streamed = torch.cat(list(causal.stream(clip, 8, 0, **given)), 2)
    assert torch.equal(causal.extend(clip, after=8, class_labels=0, **given)[:, :, 5:], streamed)
    with pytest.raises(
        ValueError,
        match=f"'{solver}' needs at least {least} steps, got num_inference_steps={least - 1} .--steps.; use e",
    ):
        pipe(0, solver=solver, num_inference_steps=least - 1)


@pytest.mark.parametrize(
    ("objective", "solver", "steps", "enough"),
    [
        ("flow", "ab2", np.int64(1), 2),
        ("flow", "ab2", "1", "2"),
        ("flow", "dpmpp_2m", "3", "4"),
        ("ddpm", "ab2", "1", "2"),
        ("ddpm", "ab2", "ddim1", "ddim2"),
        ("ddpm", "dpmpp_2m", np.int64(2), 3),
        ("ddpm", "dpmpp_2m", "ddim2", "ddim3"),
    ],
)
def test_too_few_steps_are_refused_however_they_are_written(tiny_model, objective, solver, steps, enough):
    pipe, causal = (
        make_pipe(tiny_model, objective, **more)
        for more in ({}, {**CAUSAL, "extra_conditions": {"actions": {"stride": 4, "count": 5}}})
    )
    given = {**FAST, "solver": solver, "num_inference_steps": enough}
    assert torch.isfinite(pipe(0, **given)).all()
    causal.world(class_labels=0, solver=solver, num_inference_steps=enough)
    pipe.transformer.forward = None
    message = (
        f"'{solver}' needs at least [2-4] steps, got num_inference_steps={steps} .--steps.; use euler, or more steps"
    )
    with pytest.raises(ValueError, match=message):
        pipe(0, **{**given, "num_inference_steps": steps})
    with pytest.raises(ValueError, match=message):
        causal.world(class_labels=0, solver=solver, num_inference_steps=steps)


def test_what_a_model_cannot_do_is_refused_before_its_text_encoder_is_loaded(tiny_model):
    text = {"num_classes": 0, "caption_channels": 64}
    pipe = make_pipe(tiny_model, **text)
    causal = make_pipe(tiny_model, **CAUSAL, **text)
    clip, given = torch.rand(1, 3, 5, 16, 16), {"captions": "a red one", "num_inference_steps": 1, "solver": "ab2"}
    calls = [
        (lambda: pipe(**given), "needs at least 2 steps"),
        (lambda: pipe.extend(clip, after=4, **given), "needs at least 2 steps"),
        (lambda: causal.stream(clip, after=4, **given), "needs at least 2 steps"),
        (lambda: pipe(captions="a red one", latents=torch.randn(1, 1, 1, 1, 1)), "this call needs"),
    ]
    for call, message in calls:  # neither pipeline has an encoder: one that is asked for is an error of another kind
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="names no text encoder"):
        pipe(captions="a red one", **FAST)


def test_a_model_with_learnt_guidance_is_sampled_without_and_refuses_more(tiny_model, tmp_path):
    made = make_pipe(tiny_model, flow_map=True, distilled_guidance=3.0)
    assert torch.equal(made(1, **FAST), made(1, guidance_scale=1, **FAST))
    with pytest.raises(ValueError, match=r"guidance_scale=2.0 .--guidance. on top of the 3 that this model has learnt"):
        made(1, guidance_scale=2.0, **FAST)
    made.save_pretrained(tmp_path)
    again = STDiTPipeline.from_pretrained(tmp_path)
    assert again.transformer.config.distilled_guidance == 3.0
    assert torch.equal(again(1, **FAST), made(1, **FAST))


def test_the_default_guidance_of_other_models_is_two(pipe):
    assert torch.equal(pipe(1, **FAST), pipe(1, guidance_scale=2.0, **FAST))


def test_a_flow_map_serves_tasks_arrangements_and_streams_and_other_models_refuse_it(pipe, tiny_model):
    made = make_pipe(tiny_model, flow_map=True)
    clip, given = torch.rand(1, 3, 5, 16, 16), {"solver": "flow_map", "num_inference_steps": 2, "progress": False}
    for arrangement in ("together", "autoregressive", "pyramid"):
        extended = made.extend(clip, after=4, class_labels=0, arrangement=arrangement, **given)
        assert torch.equal(extended[:, :, :5], clip) and torch.isfinite(extended).all()
    assert torch.isfinite(made.interpolate(clip[:, :, :3], 2, class_labels=0, **given)).all()
    mask = torch.zeros(5, 16, 16, dtype=torch.bool)
    mask[:, 3:9, 2:7] = True  # a boundary inside patches, where pixels guide
    assert torch.equal(made.inpaint(clip, mask, class_labels=0, **given)[:, :, ~mask], clip[:, :, ~mask])
    causal = make_pipe(tiny_model, flow_map=True, **CAUSAL)
    streamed = torch.cat(list(causal.stream(clip, 8, 0, **given)), 2)
    assert torch.equal(causal.extend(clip, after=8, class_labels=0, **given)[:, :, 5:], streamed)
    with pytest.raises(ValueError, match=r"'flow_map' needs a model .* objective.flow_map=true"):
        pipe(0, solver="flow_map", num_inference_steps=2)


def test_parts_in_both_half_precisions_are_refused(pipe):
    pipe.transformer.to(torch.bfloat16)
    pipe.vae.to(torch.float16)
    with pytest.raises(ValueError, match=r"torch.bfloat16 and torch.float16; load all of them in one"):
        pipe(1, **FAST)


class CountedHook(ModelHook):
    """Counts how often a module is put on its device, as offloading does."""

    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def test_an_offloaded_vae_is_put_on_its_device_before_it_encodes_and_decodes(pipe):
    hook = CountedHook()
    add_hook_to_module(pipe.vae, hook)
    pipe.extend(torch.rand(1, 3, 1, 16, 16), after=4, class_labels=0, num_inference_steps=1, progress=False)
    assert hook.calls >= 2
    assert pipe.model_cpu_offload_seq == "guide->transformer->vae"


def test_words_are_letters_with_their_marks_in_one_form_and_single_letters_where_scripts_have_no_blanks():
    assert _words("cafe\u0301") == _words("caf\u00e9") == ["caf\u00e9"]
    assert len(_words("हिन्दी में")) == 2
    assert _words("红色的圆 moves") == ["红", "色", "的", "圆", "moves"]
    assert len(_words("สวัสดี")) == 4  # marks stay on their letters
    assert _words("A red-circle, don't") == ["a", "red", "circle", "don", "t"]


def test_captions_longer_than_the_encoder_takes_are_counted():
    with pytest.warns(UserWarning, match="1 of 2 captions are longer than the 32 tokens"):
        warn_of_length(HashedWordEncoder(), ["short", "long " * 40])


def test_an_output_that_another_process_writes_is_refused_and_freed_by_its_death(tmp_path):
    script = "import sys, os; from pathlib import Path; from stdit.files import claimed\nwith claimed([Path(sys.argv[1])]): print('held', flush=True); input()\n"
    file = tmp_path / ("é" * 120 + ".mp4")
    with subprocess.Popen(
        [sys.executable, "-c", script, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ
    ) as other:
        assert other.stdout.readline()
        with pytest.raises(ValueError, match="being written by another process"), claimed([file]):
            pass
        other.kill()
    with claimed([file]):
        pass
    assert not list(tmp_path.iterdir())

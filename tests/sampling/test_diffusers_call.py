"""A pipeline takes the arguments of diffusers' video pipelines and gives their outputs."""

import inspect

import diffusers
import numpy as np
import pytest
import torch
from conftest import fill
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback
from PIL import Image

from stdit.sampling.call import ELSEWHERE
from stdit.sampling.options import SamplingOptions
from stdit.sampling.output import STDiTPipelineOutput
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.text import HashedWordEncoder
from stdit.vae import TinyVAE

pytestmark = pytest.mark.filterwarnings("ignore:this model")
FAST = {"num_inference_steps": 3, "progress": False, "precision": "fp32"}
CAUSAL = {"axes": ["joint"], "causal": True, "position_encoding": "rope_3d", "window": 2}


@pytest.fixture
def make(tiny_model):
    def build(scheduler=None, **model) -> STDiTPipeline:
        arguments = {"in_channels": 16, "num_classes": 3, "learn_sigma": False, "class_names": ["a", "b", "c"], **model}
        vae = fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8)))
        pipe = STDiTPipeline(
            tiny_model(**arguments), vae, scheduler or STDiTScheduler("flow", learn_sigma=False), 9, 16, 16
        )
        if model.get("caption_channels"):
            pipe.register_to_config(text_encoder="words")
            pipe._encoder = HashedWordEncoder()
        return pipe

    return build


@pytest.fixture
def pipe(make):
    return make()


@pytest.fixture
def texts(make):
    """A pipeline of a model with captions and without classes."""
    return make(num_classes=0, class_names=None, caption_channels=64)


def clip(frames: int = 5, count: int = 1) -> torch.Tensor:
    """Clips of whole 8-bit values, so that every form of them holds the same numbers."""
    generator = torch.Generator().manual_seed(frames)
    return torch.randint(256, (count, 3, frames, 16, 16), generator=generator) / 127.5 - 1


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Signatures and outputs


@pytest.mark.parametrize("theirs", [diffusers.LattePipeline, diffusers.WanPipeline])
def test_every_argument_of_diffusers_pipelines_is_taken_or_refused_with_what_serves_instead(theirs, pipe):
    taken = {*inspect.signature(STDiTPipeline.__call__).parameters, *SamplingOptions.__dataclass_fields__}
    for name in set(inspect.signature(theirs.__call__).parameters) - {"self"} - taken:
        with pytest.raises(
            TypeError, match=f"{name} is an argument of other pipelines of diffusers; here it is"
        ) as error:
            pipe(**{name: 1}, **FAST)
        assert "\n" not in str(error.value)
    assert set(ELSEWHERE).isdisjoint(taken)


def theirs(kind: str):
    """A tiny LattePipeline or WanPipeline, and the arguments of a call that gives 5 frames of 16 x 16."""
    torch.manual_seed(0)
    given = {
        "height": 16,
        "width": 16,
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
        "prompt_embeds": torch.zeros(1, 4, 8),
    }
    if kind == "wan":
        vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        transformer = diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=16, ffn_dim=16, num_layers=1
        )
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        return diffusers.WanPipeline(None, None, vae, scheduler, transformer), {**given, "num_frames": 5}
    vae = diffusers.AutoencoderKL(block_out_channels=[8], norm_num_groups=4, latent_channels=4)
    transformer = diffusers.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, cross_attention_dim=16,
        caption_channels=8, sample_size=16, patch_size=2, activation_fn="gelu-approximate", norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6, attention_bias=True, video_length=5,
    )  # fmt: skip
    made = diffusers.LattePipeline(None, None, vae, transformer, diffusers.DDIMScheduler())
    return made, {**given, "video_length": 5, "mask_feature": False}


@pytest.mark.parametrize("kind", ["latte", "wan"])
def test_outputs_have_the_types_shapes_and_ranges_of_diffusers_pipelines(kind, pipe):
    other, given = theirs(kind)
    other.set_progress_bar_config(disable=True)
    for output_type in ("pil", "np", "pt", "latent"):
        expected = other(**given, output_type=output_type)
        found = pipe(0, num_frames=5, output_type=output_type, **FAST)
        assert list(found.keys()) == list(expected.keys()) == ["frames"]
        assert found[0] is found.frames and type(found.frames) is type(expected.frames)
        (tupled,) = pipe(0, num_frames=5, output_type=output_type, return_dict=False, **FAST)
        assert type(other(**given, output_type=output_type, return_dict=False)) is tuple
        if output_type == "latent":
            assert found.frames.ndim == expected.frames.ndim and torch.equal(tupled, found.frames)
        elif output_type == "pil":
            assert [len(frames) for frames in found.frames] == [len(frames) for frames in expected.frames] == [5]
            assert (found.frames[0][0].mode, found.frames[0][0].size) == ("RGB", expected.frames[0][0].size)
        else:
            assert found.frames.shape == expected.frames.shape and found.frames.dtype == expected.frames.dtype
            assert found.frames.min() >= 0 and found.frames.max() <= 1


def test_all_output_types_show_the_tensor_that_a_call_without_them_gives(pipe):
    plain = pipe([0, 1], **FAST)
    assert isinstance(plain, torch.Tensor)
    pictures, arrays, tensors = (pipe([0, 1], output_type=kind, **FAST).frames for kind in ("pil", "np", "pt"))
    assert torch.equal(tensors.transpose(1, 2), plain * 0.5 + 0.5)
    assert np.array_equal(arrays, tensors.permute(0, 1, 3, 4, 2).numpy())
    assert np.array_equal(np.asarray(pictures[1][8]), (arrays[1, 8] * 255).round().astype(np.uint8))
    assert isinstance(pipe([0], return_dict=True, **FAST), STDiTPipelineOutput)
    assert isinstance(pipe([0], return_dict=False, **FAST)[0][0][0], Image.Image)


def test_frames_are_written_by_diffusers_export_to_video(pipe, tmp_path):
    pytest.importorskip("imageio_ffmpeg", reason="diffusers writes videos by imageio, which is not installed")
    from diffusers.utils import export_to_video

    from stdit.data import VideoReader

    for kind in ("pil", "np"):
        result = pipe(0, height=64, width=64, output_type=kind, **FAST)
        export_to_video(result.frames[0], str(tmp_path / f"{kind}.mp4"), fps=8)
        with VideoReader(tmp_path / f"{kind}.mp4") as reader:
            assert (len(reader), reader.size, round(reader.fps)) == (9, (64, 64), 8)


# Noise


def test_a_generator_gives_its_initial_seed_and_is_not_used_up(pipe):
    given = generator(7)
    torch.randn(3, generator=given)  # whatever was drawn from it before
    state = given.get_state()
    assert torch.equal(pipe([0, 1], generator=given, **FAST), pipe([0, 1], seed=7, **FAST))
    assert torch.equal(given.get_state(), state)


def test_of_several_generators_each_decides_one_clip(pipe):
    many = pipe([0, 1], generator=[generator(3), generator(4)], **FAST)
    for i in range(2):
        alone = pipe(i, generator=generator(3 + i), **FAST)
        torch.testing.assert_close(many[i], alone[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(many, pipe([0, 1], seed=[3, 4], **FAST))
    with pytest.raises(ValueError, match="2 seeds .or generators. for 3 clips"):
        pipe([0, 1, 2], generator=[generator(3), generator(4)], **FAST)


@pytest.mark.parametrize("model", [{}, CAUSAL], ids=["window", "stream"])
def test_latents_are_the_noise_of_a_call(make, model):
    pipe = make(**model)
    drawn = pipe.engine.draw([(5, 0), (5, 1)], 0, (3, 2, 2))
    if model:  # a stream draws each frame by its own key
        drawn = torch.cat([pipe.engine.draw([(5, i, frame) for i in range(2)], 0, (1, 2, 2)) for frame in range(3)], 2)
    assert torch.equal(pipe([0, 1], latents=drawn, batch_size=1, **FAST), pipe([0, 1], seed=5, batch_size=1, **FAST))
    assert not torch.equal(pipe([0, 1], latents=drawn, **FAST), pipe([0, 1], **FAST))


@pytest.mark.parametrize("model", [{}, CAUSAL], ids=["window", "stream"])
def test_latents_that_a_call_gives_decode_to_its_pixels(make, model):
    pipe = make(**model)
    latents = pipe([0, 1], output_type="latent", **FAST).frames
    assert latents.shape == (2, 16, 3, 2, 2)
    torch.testing.assert_close(pipe.decode(latents), pipe([0, 1], **FAST), atol=1e-5, rtol=1e-5)
    known = clip(5)
    latents = pipe.extend(known, after=4, output_type="latent", **FAST).frames
    assert torch.equal(latents[:, :, :2], pipe.video_vae.encode(known))


def test_latents_decode_to_the_pixels_of_a_call_at_its_precision(pipe):
    given = {**FAST, "precision": "bf16"}
    latents, expected = pipe(0, output_type="latent", **given).frames, pipe(0, **given)
    torch.testing.assert_close(pipe.decode(latents, precision="bf16"), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(pipe.decode(latents), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scheduler", [None, diffusers.FlowMatchEulerDiscreteScheduler()])
def test_latents_hold_for_stdits_and_diffusers_schedulers(make, scheduler):
    pipe = make(scheduler)
    noise = torch.randn(1, 16, 3, 2, 2)
    assert torch.equal(pipe(0, latents=noise, **FAST), pipe(0, latents=noise, seed=4, **FAST))
    assert not torch.equal(pipe(0, latents=noise, **FAST), pipe(0, latents=-noise, **FAST))


def test_several_videos_of_a_prompt_are_next_to_each_other(pipe, texts):
    labels = pipe([0, 2], num_videos_per_prompt=2, **FAST)
    assert torch.equal(labels, pipe([0, 0, 2, 2], **FAST))
    prompts = texts(prompt=["red", "a blue one"], num_videos_per_prompt=2, **FAST)
    assert torch.equal(prompts, texts(captions=["red", "red", "a blue one", "a blue one"], **FAST))
    for task in (lambda x, **given: pipe.animate(x[:, :, 0], 5, **given), pipe.interpolate):
        made = task(clip(3, count=2), class_labels=["a", "b"], num_videos_per_prompt=2, **FAST)
        four = clip(3, count=2).repeat_interleave(2, 0)
        assert torch.equal(made, task(four, class_labels=["a", "a", "b", "b"], **FAST))


# Texts


def test_a_prompt_is_a_caption_and_may_come_first(texts):
    expected = texts(captions="a red one", negative_captions="blue", guidance_scale=3.0, **FAST)
    again = texts(prompt="a red one", negative_prompt="blue", guidance_scale=3.0, **FAST)
    assert torch.equal(again, expected)
    assert torch.equal(texts("a red one", **FAST), texts(captions=["a red one"], **FAST))
    assert len(texts(["red", "blue"], **FAST)) == 2
    with pytest.raises(ValueError, match="prompt and captions .or prompt. are the same; give one of them"):
        texts(prompt="red", captions="blue", **FAST)


def test_tokens_of_a_prompt_are_taken_in_place_of_the_prompt(texts):
    encode = texts.encoder.encode
    red, blue, dull = (encode([text]).tokens[:, : len(text.split()) + 1] for text in ("a red one", "blue", "dull"))
    expected = texts(prompt="a red one", negative_prompt="dull", guidance_scale=3.0, **FAST)
    texts._encoder = None  # which is not needed then
    texts.register_to_config(text_encoder=None)
    given = {"prompt_embeds": red, "negative_prompt_embeds": dull, "guidance_scale": 3.0, **FAST}
    torch.testing.assert_close(texts(**given), expected, atol=1e-5, rtol=1e-5)
    many = texts(**{**given, "prompt_embeds": torch.cat([red[:, :2], blue])}, num_videos_per_prompt=2)
    assert len(many) == 4
    with pytest.raises(ValueError, match=r"tokens of texts are \(1, 4, 63\); this model takes \(1, length, 64\)"):
        texts(**{**given, "prompt_embeds": red[..., :63]})
    with pytest.raises(ValueError, match="prompt_embeds and captions .or prompt. are the same"):
        texts(prompt="red", **given)


def test_padded_tokens_of_prompts_give_the_clips_of_the_prompts(texts):
    encoded = texts.encoder.encode(["a red one", "blue"])
    assert not encoded.mask.all()
    expected = texts(prompt=["a red one", "blue"], guidance_scale=3.0, **FAST)
    again = texts(prompt_embeds=encoded.tokens, guidance_scale=3.0, **FAST)
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)
    noisy = encoded.tokens + (~encoded.mask[..., None]).float()  # as T5 leaves it
    masked = texts(prompt_embeds=noisy, prompt_attention_mask=encoded.mask.long(), guidance_scale=3.0, **FAST)
    torch.testing.assert_close(masked, expected, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(texts(prompt_embeds=torch.zeros(1, 4, 64), **FAST)).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt_attention_mask": torch.ones(1, 4)}, "^prompt_attention_mask belongs to prompt_embeds"),
        (
            {"prompt_embeds": torch.ones(1, 4, 64), "prompt_attention_mask": torch.ones(1, 3)},
            r"mask is \(1, 3\); .* \(1, 4\)",
        ),
        ({"prompt_embeds": torch.ones(1, 4, 64), "prompt_attention_mask": torch.zeros(1, 4)}, "leaves no token"),
    ],
)
def test_a_mask_that_does_not_fit_its_tokens_is_refused(texts, given, message):
    with pytest.raises(ValueError, match=message):
        texts(**given, **FAST)


def test_a_prompt_for_a_model_without_text_is_refused_with_its_classes(pipe, make):
    for call in (pipe, lambda **given: pipe.extend(clip(), after=4, **given)):
        with pytest.raises(
            ValueError,
            match="^prompt='a cat' but the model was trained without captions; choose of its classes, class_labels= ",
        ) as error:
            call(prompt="a cat", **FAST)
        assert str(error.value).endswith("(--class-label): a, b, c.") and "\n" not in str(error.value)
    with pytest.raises(
        ValueError,
        match="^prompt_embeds=a tensor but the model was trained without captions; choose of its classes, class_labels=",
    ):
        pipe(prompt_embeds=torch.zeros(1, 4, 64), **FAST)
    with pytest.raises(
        ValueError, match="^negative_prompt='dull' but .* classes, negative_class_labels= .--negative-class-label."
    ):
        pipe(0, negative_prompt="dull", **FAST)
    with pytest.raises(ValueError, match=r"class_labels= .--class-label.: 0 to 2."):
        make(class_names=None)(prompt="a cat", **FAST)
    with pytest.raises(ValueError, match="without captions; leave them out"):
        make(num_classes=0, class_names=None)(prompt="a cat", **FAST)


# Callbacks


class Recorder(PipelineCallback):
    """An official callback, which says itself which tensors it needs."""

    tensor_inputs = ["latents"]

    def __init__(self):
        super().__init__()
        self.calls = []

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        self.calls.append((step_index, float(timesteps), callback_kwargs["latents"].clone(), pipeline.num_timesteps))
        return callback_kwargs


@pytest.mark.parametrize("scheduler", [None, diffusers.FlowMatchEulerDiscreteScheduler()])
def test_a_callback_sees_every_step_and_changes_nothing_by_itself(make, scheduler):
    pipe, seen = make(scheduler), Recorder()
    made = pipe([0, 1], callback_on_step_end=seen, output_type="latent", **FAST).frames
    assert [step for step, *_ in seen.calls] == [0, 1, 2]
    timesteps = [timestep for _, timestep, *_ in seen.calls]
    assert timesteps[0] == 1000 and timesteps == sorted(timesteps, reverse=True)
    assert pipe.current_timestep is None and pipe.guidance_scale == 2 and pipe.do_classifier_free_guidance
    assert torch.equal(seen.calls[-1][2], made) and {steps for *_, steps in seen.calls} == {3}
    assert torch.equal(made, pipe([0, 1], output_type="latent", **FAST).frames)
    both = MultiPipelineCallbacks([seen, Recorder()])
    assert torch.equal(made, pipe([0, 1], callback_on_step_end=both, output_type="latent", **FAST).frames)
    assert len(seen.calls) == 6


def test_latents_that_a_callback_returns_are_gone_on_with_but_known_frames_stay(pipe):
    def halve(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] * 0.5}

    known = clip(5)
    plain, changed = (
        pipe.extend(known, after=4, output_type="latent", callback_on_step_end=callback, **FAST).frames
        for callback in (None, halve)
    )
    assert torch.equal(plain[:, :, :2], changed[:, :, :2])
    assert not torch.equal(plain[:, :, 2:], changed[:, :, 2:])


def test_latents_changed_in_place_are_gone_on_with_but_known_frames_stay(make):
    for model in ({}, CAUSAL):
        pipe, known = make(**model), clip(5)
        given = {"after": 4, "output_type": "latent", **FAST}
        plain = pipe.extend(known, **given).frames
        zeroed = pipe.extend(
            known, callback_on_step_end=lambda p, i, t, x: {"latents": x["latents"] * 0}, **given
        ).frames

        def in_place(pipe, step, timestep, tensors):
            tensors["latents"].zero_()

        def in_place_returned(pipe, step, timestep, tensors):
            return {"latents": tensors["latents"].zero_()}

        for callback in (in_place, in_place_returned):
            found = pipe.extend(known, callback_on_step_end=callback, **given).frames
            assert torch.equal(found, zeroed) and torch.equal(found[:, :, :2], plain[:, :, :2])
            assert not torch.equal(found, plain)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"latents": torch.zeros(1, 16, 1, 1, 1)}, r"latents of shape \(1, 16, 1, 1, 1\); .* \(2, 16, 3, 2, 2\)"),
        ({"latents": torch.zeros(2, 16, 3, 2)}, r"latents of shape \(2, 16, 3, 2\)"),
        ({"prompt_embeds": torch.zeros(1, 4, 64)}, r"prompt_embeds of shape \(1, 4, 64\); .* \(2, 4, 64\)"),
        ({"prompt_embeds": torch.zeros(2, 4, 63)}, r"prompt_embeds of shape \(2, 4, 63\)"),
        ({"prompt_embeds": torch.zeros(2, 64)}, r"prompt_embeds of shape \(2, 64\)"),
        ({"latent": torch.zeros(2, 16, 3, 2, 2)}, "returned 'latent'; this call has latents, prompt_embeds, neg"),
        ({"latents": None}, "returned a NoneType as latents; return a tensor"),
        ({"latents": np.zeros((2, 16, 3, 2, 2))}, "returned a ndarray as latents; return a tensor"),
        (torch.zeros(2, 16, 3, 2, 2), "returned a Tensor; return a dict"),
        ([1], "returned a list; return a dict"),
        ("latents", "returned a str; return a dict"),
        (3, "returned a int; return a dict"),
    ],
)
def test_what_a_callback_cannot_return_is_refused_in_one_line(texts, result, message):
    with pytest.raises(ValueError, match=message) as error:
        texts(["a red one", "blue"], callback_on_step_end=lambda *given: result, **FAST)
    assert "\n" not in str(error.value)


def test_tokens_from_a_callback_of_a_model_without_captions_are_refused(pipe):
    with pytest.raises(ValueError, match="returned 'prompt_embeds'; this call has latents.$"):
        pipe(0, callback_on_step_end=lambda *given: {"prompt_embeds": torch.zeros(1, 4, 64)}, **FAST)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "2", None, [1.0]])
def test_a_scale_of_guidance_that_is_no_number_is_refused(pipe, scale):
    def change(pipe, step, timestep, tensors):
        pipe._guidance_scale = scale

    with pytest.raises(ValueError, match="a callback set _guidance_scale to .*; set a number, 1 for no guidance"):
        pipe(0, callback_on_step_end=change, **FAST)


@pytest.mark.parametrize("kind", ["classes", "texts"])
def test_diffusers_callback_that_cuts_guidance_off_leaves_each_clip_its_condition(pipe, texts, kind):
    pipe, given = (pipe, [0, 2]) if kind == "classes" else (texts, ["a red one", "blue"])

    def off(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = 0.0

    cut = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    both = MultiPipelineCallbacks([Recorder(), cut])
    expected = pipe(given, callback_on_step_end=off, guidance_scale=3.0, **FAST)
    for callback in (cut, both):
        assert torch.equal(pipe(given, callback_on_step_end=callback, guidance_scale=3.0, **FAST), expected)
    assert not torch.equal(expected, pipe(given, guidance_scale=3.0, **FAST))


def test_a_callback_interrupts_a_call_and_an_error_in_it_ends_one(pipe):
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append((step, tensors["latents"]))
        pipe._interrupt = step == 1
        return tensors

    result = pipe(0, callback_on_step_end=stop, output_type="latent", **{**FAST, "num_inference_steps": 5})
    assert [step for step, _ in steps] == [0, 1] and torch.equal(result.frames, steps[-1][1])

    def cancel(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(0, callback_on_step_end=cancel, **FAST)
    assert not pipe(0, **FAST).isnan().any()  # the next call is a whole one
    assert len(pipe(0, callback_on_step_end=lambda *given: None, **FAST)) == 1


@pytest.mark.parametrize("model", [{}, CAUSAL], ids=["window", "stream"])
def test_a_callback_turns_guidance_off_as_diffusers_callbacks_do(make, model):
    pipe, scales = make(**model), []

    def off(pipe, step, timestep, tensors):
        scales.append(pipe.guidance_scale)
        pipe._guidance_scale = 0.0
        return tensors

    made = pipe(0, guidance_scale=3.0, callback_on_step_end=off, **FAST)
    assert scales[:3] == [3.0, 1.0, 1.0]  # diffusers' 0 is no guidance, not guidance to the null
    first = pipe(0, guidance_scale=3.0, guidance_interval=(0.9, 1.0), **FAST) if not model else None
    assert first is None or torch.equal(made, first)
    assert not torch.equal(made, pipe(0, guidance_scale=3.0, **FAST))


def test_a_callback_replaces_the_tokens_of_a_prompt(texts):
    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    shapes = []

    def replace(pipe, step, timestep, tensors):
        shapes.append({name: tuple(value.shape) for name, value in tensors.items()})
        return {"prompt_embeds": tensors["negative_prompt_embeds"]}

    given = {"callback_on_step_end_tensor_inputs": names, "guidance_scale": 2.0, **FAST}
    changed = texts(prompt="a red one", callback_on_step_end=replace, **given)
    assert shapes[0] == {"latents": (1, 16, 3, 2, 2), "prompt_embeds": (1, 4, 64), "negative_prompt_embeds": (1, 4, 64)}
    assert not torch.equal(changed, texts(prompt="a red one", guidance_scale=2.0, **FAST))
    kept = texts(prompt="a red one", callback_on_step_end=lambda pipe, i, t, tensors: tensors, **given)
    assert torch.equal(kept, texts(prompt="a red one", guidance_scale=2.0, **FAST))


def test_a_stream_takes_the_arguments_group_by_group(make):
    pipe, seen = make(**CAUSAL), Recorder()
    plain = list(pipe.stream(clip(), 8, 1, seed=6, **FAST))
    given = {"generator": generator(6), "callback_on_step_end": seen, "output_type": "pt"}
    parts = list(pipe.stream(clip(), 8, 1, **given, **FAST))
    assert all(
        torch.equal(part.frames.transpose(1, 2), group * 0.5 + 0.5) for part, group in zip(parts, plain, strict=True)
    )
    assert len(seen.calls) == 2 * 3
    for after in ("8", 8.0, True):
        with pytest.raises(ValueError, match="after must be a whole number, got"):
            pipe.stream(clip(), after, 1, **FAST)
    with pytest.raises(ValueError, match="a stream takes no latents; leave it out"):
        pipe.stream(clip(), 8, 1, latents=torch.zeros(1, 16, 4, 2, 2), **FAST)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"generator": generator(1), "seed": 1}, "generator and seed both decide the noise"),
        ({"generator": generator(1), "options": SamplingOptions(seed=2)}, "generator and seed both decide the noise"),
        ({"latents": torch.zeros(1, 16, 3, 2, 3)}, r"latents are \(1, 16, 3, 2, 3\); this call needs \(1, 16, 3, 2, 2\)"),
        ({"latents": torch.full((1, 16, 3, 2, 2), torch.nan)}, "latents have numbers that are not finite"),
        ({"latents": torch.zeros(1, 16, 5, 2, 2), "num_frames": 17, "window": 9}, "latents are those of one window, but 17"),
        ({"output_type": "latents"}, "Unknown output_type 'latents'. Did you mean 'latent'"),
        ({"output_type": "latent", "num_frames": 17, "window": 9}, "latents are those of one window"),
        ({"callback_on_step_end_tensor_inputs": ["mask"]}, "has 'mask'; a callback of this model can have latents"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "has 'prompt_embeds'; a callback of this model can"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt must be >= 1, got 0"),
        ({"num_videos": 0}, "num_videos must be >= 1, got 0"),
        ({"num_frames": 0}, "num_frames must be >= 1, got num_frames=0; use 1 for an image"),
        ({"num_frames": "blurry"}, "num_frames must be a whole number, got 'blurry'"),
        ({"height": 0}, "height=0"),
        ({"height": 64.0}, "height must be a whole number, got 64.0"),
        ({"width": True}, "width must be a whole number, got True"),
        ({"num_videos_per_prompt": True}, "num_videos_per_prompt must be a whole number, got True"),
        ({"window": 9.0}, "window must be a whole number, got 9.0"),
        ({"guidance_scale": "2"}, "guidance_scale must be a number, got '2'"),
        ({"guidance_interval": ("0", 1)}, "guidance_interval must be a number, got '0'"),
        ({"seed": "1"}, "seed must be a whole number, got '1'"),
        ({"output_type": 3}, "Unknown output_type 3. Choose one of"),
        ({"output_type": []}, "Unknown output_type .*. Choose one of"),
        ({"generator": 3}, "generator is a int; give a torch.Generator"),
        ({"generator": [None]}, "generator is a NoneType; give a torch.Generator"),
        ({"generator": np.random.default_rng(0)}, "generator is a Generator; give a torch.Generator"),
        ({"latents": [1]}, "latents is a list; give a tensor"),
        ({"latents": np.zeros((1, 16, 3, 2, 2))}, "latents is a ndarray; give a tensor"),
        ({"negative_class_labels": 1.5}, "class label 1.5 is neither a whole number nor a name"),
        ({"seed": [1, 2]}, "2 seeds .or generators. for 1 clips"),
        ({"seed": [1, -2]}, "seed must be >= 0"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_are_refused_in_one_line(pipe, given, message):
    with pytest.raises(ValueError, match=message) as error:
        pipe(0, **given, **FAST)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "fits"),
    [
        (lambda pipe, count: pipe(0, num_frames=count, **FAST), 5),
        (lambda pipe, count: pipe.animate(clip()[:, :, 0], count, **FAST), 5),
        (lambda pipe, count: pipe.extend(clip(), after=count, before=0, **FAST), 4),
        (lambda pipe, count: pipe.connect(clip(), clip(), count, **FAST), 4),
        (lambda pipe, count: pipe.loop(clip(), count, **FAST), 4),
        (lambda pipe, count: pipe.interpolate(clip(), count, **FAST), 2),
    ],
    ids=["call", "animate", "extend", "connect", "loop", "interpolate"],
)
def test_a_count_is_any_whole_number_and_nothing_else(pipe, call, fits):
    for count in (0, -4, 4.0, "4", True, torch.tensor(4.0), [4]):
        with pytest.raises(
            ValueError, match="must be a whole number, got|must be >= |>= 2|add no frames|new frames, 0"
        ) as error:
            call(pipe, count)
        assert "\n" not in str(error.value)
    assert torch.equal(call(pipe, np.int64(fits)), call(pipe, fits))


def test_a_label_is_any_whole_number_or_name_and_nothing_else(pipe):
    expected = pipe("b", **FAST)
    for one in (1, np.int64(1), np.uint8(1), torch.tensor(1), np.array(1), 1.0, [1], (np.int64(1),), torch.tensor([1])):
        assert torch.equal(pipe(one, **FAST), expected)
        assert pipe.labels(one).tolist() == [1]
        negative = pipe(0, negative_class_labels=one, **FAST)
        assert torch.equal(negative, pipe(0, negative_class_labels="b", **FAST))
    assert torch.equal(pipe(np.array(["a", "c"]), **FAST), pipe([0, 2], **FAST))
    for one in (
        1.5,
        True,
        float("nan"),
        b"b",
        None,
        object(),
        [1],
        torch.tensor(True),
        np.bool_(True),
        torch.tensor(1.5),
    ):
        for given in ([one], *([] if one is None or isinstance(one, list) else [one])):
            with pytest.raises(ValueError, match="is neither a whole number nor a name"):
                pipe(given, **FAST)


def test_a_text_is_a_text_a_list_of_texts_or_a_tensor(texts):
    for given in (3, b"red", [1], ["red", None], np.zeros((1, 4, 64))):
        for name in ("prompt", "negative_prompt", "prompt_embeds", "captions"):
            more = {"prompt": "red"} if name.startswith("negative") else {}
            with pytest.raises(ValueError, match=f"{name} is a .*; give a text, a list of texts, or a tensor"):
                texts(**{name: given}, **more, **FAST)
    with pytest.raises(ValueError, match="num_frames must be a whole number, got 'blurry'"):
        texts("circle left", "blurry", **FAST)


def test_a_loop_of_no_whole_groups_has_no_latents(pipe):
    with pytest.raises(
        ValueError, match="the 8 frames of the result are not whole groups of VAE 'tiny', so they have no"
    ):
        pipe.loop(clip(4), 4, output_type="latent", window=13, **FAST)

"""Conditions of a pipeline's calls: per clip, per latent frame, and those that follow from the clip."""

import pytest
import torch
from conftest import fill

from stdit.conditions import Label
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.vae import TinyVAE

FAST = {"num_inference_steps": 1, "guidance_scale": 1.0, "progress": False, "precision": "fp32"}
ALL = ["prefix", "suffix", "ends", "teacher_forcing", "every_kth"]


@pytest.fixture
def make(tiny_model):
    def build(num_classes=5, **changes) -> STDiTPipeline:
        model = tiny_model(in_channels=16, num_classes=num_classes, learn_sigma=False, sample_size=(3, 4, 4), **changes)
        vae = fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8)))
        return STDiTPipeline(model, vae, STDiTScheduler("flow"), 9, 32, 32, 8.0, "flow", mask_strategies=ALL)

    return build


def clip(frames):
    return torch.rand(1, 3, frames, 32, 32, generator=torch.Generator().manual_seed(frames)) * 2 - 1


def labels_of_calls(pipe):
    given = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    return given


@pytest.mark.parametrize("causal", [{}, {"causal": True, "window": 3, "position_encoding": "rope"}])
def test_equal_labels_per_latent_frame_are_one_label_of_the_clip(make, causal):
    pipe = make(**causal)
    whole = pipe.extend(clip(5), after=4, class_labels=[2], **FAST)
    per_frame = pipe.extend(clip(5), after=4, class_labels=torch.full((1, 3), 2), **FAST)
    assert torch.equal(whole, per_frame)
    assert not torch.equal(whole, pipe.extend(clip(5), after=4, class_labels=torch.tensor([[2, 2, 4]]), **FAST))


def test_each_window_gets_the_conditions_of_its_own_latent_frames(make):
    pipe = make()
    given = labels_of_calls(pipe)
    pipe.extend(clip(5), after=12, class_labels=torch.tensor([[0, 1, 2, 3, 4]]), **FAST)  # 17 frames, windows of 9
    assert given == [[[0, 1, 2]], [[1, 2, 3]], [[2, 3, 4]]]


def test_each_frame_of_a_stream_gets_its_own_condition(make):
    pipe = make(causal=True, window=3, position_encoding="rope")
    given = labels_of_calls(pipe)
    parts = list(
        pipe.stream(clip(5), 8, class_labels=torch.tensor([[0, 1, 2, 3]]), num_inference_steps=1, guidance_scale=1.0)
    )
    assert sum(part.shape[2] for part in parts) == 8
    assert given == [[[0]], [[1]], [[2]], [[2]], [[3]], [[3]]]  # known frames enter the cache; others also take a step


def test_frames_outside_the_output_take_its_first_and_last_condition():
    labels = torch.arange(5)[None]

    def at(frames, total):
        return Label(8).at(labels, frames, total, stride=4, starts=True)[0].tolist()

    assert at([-4, 0, 4, 8], 9) == [0, 0, 1, 2]
    assert at([8, 12, 16, 20], 14) == [2, 3, 4, 4]
    assert at([1, 5, 9], 9) == [1, 2, 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.extend(clip(5), after=4, class_labels=torch.tensor([[1, 2]]), **FAST), "has 2 values .* 3 latent"),
        (lambda p: p.extend(clip(5), after=4, captions="red", **FAST), "captions='red' but the model was trained wit"),
        (lambda p: p.extend(clip(5), after=4, micro_conditions=[8.0], **FAST), "micro_conditions is given but"),
        (lambda p: p.stream(clip(5), 4, window=9), "this model is not causal"),
    ],
)
def test_conditions_that_a_model_does_not_have_are_refused(make, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(make())
    assert "\n" not in str(error.value)


def test_conditions_that_follow_from_the_clip_cannot_be_given(make):
    with pytest.raises(ValueError, match="micro_conditions follow from the clip to generate and from fps"):
        make(micro_conditions=["fps"]).extend(clip(5), after=4, micro_conditions=[[8.0]], **FAST)


def test_a_stream_refuses_unused_options_at_the_call(make):
    pipe = make(causal=True, window=3, position_encoding="rope")
    with pytest.raises(ValueError, match="a stream takes no window and no blend; leave them out, or use extend"):
        pipe.stream(clip(5), 4, window=9, blend=1)
    assert pipe.can_stream(clip(5))
    assert not pipe.can_stream(clip(4))
    assert not make().can_stream(clip(5))


def test_size_and_rate_condition_every_clip_of_a_batch_under_guidance(make):
    pipe = make(micro_conditions=["fps", "height"])
    given = []
    pipe.transformer.register_forward_pre_hook(lambda _, a, k: given.append(k["micro_conditions"]), with_kwargs=True)
    pipe([0, 1, 2], num_inference_steps=1, fps=4.0, progress=False)
    assert [value.tolist() for value in given] == [[[[4.0, 32.0]]]]

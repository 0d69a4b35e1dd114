"""A world goes on as one acts, and is the same as a stream with the same actions."""

import pytest
import torch
from conftest import fill

from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.vae import TinyVAE

FAST = {"num_inference_steps": 2, "precision": "fp32"}
KEYS = {"actions": {"stride": 4, "count": 5, "names": ["stay", "up", "down", "left", "right"]}}
WHEEL = {"actions": {"stride": 4, "width": 2}}


@pytest.fixture
def make(tiny_model):
    def build(conditions=KEYS, **changes) -> STDiTPipeline:
        changes = {"causal": True, "window": 3, "position_encoding": "rope", "num_classes": 0, **changes}
        model = tiny_model(
            in_channels=16, learn_sigma=False, sample_size=(5, 4, 4), extra_conditions=conditions, **changes
        )
        vae = fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8)))
        return STDiTPipeline(
            model, vae, STDiTScheduler("flow"), 17, 32, 32, 8.0, "flow", mask_strategies=["teacher_forcing"]
        )

    return build


def clip(frames=5, count=1):
    return torch.rand((count, 3, frames, 32, 32), generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.mark.parametrize("changes", [{}, {"num_classes": 3}, {"sink": 1}], ids=str)
@pytest.mark.parametrize(("guidance", "history"), [(1.0, 0.0), (2.5, 0.0), (1.0, 0.3)])
def test_a_world_equals_a_stream_with_the_same_actions_to_the_last_bit(make, changes, guidance, history):
    pipe = make(**changes)
    actions = [1, 1, 1, 1, 2, 3, "left", 0, None, None, 4, 4]
    given = {"class_labels": [1, 2]} if changes.get("num_classes") else {}
    options = {**FAST, "guidance_scale": guidance, "history_noise": history, "seed": 7, **given}
    whole = torch.cat(list(pipe.stream(clip(count=2), 12, actions=actions, **options)), dim=2)
    world = pipe.world(clip(count=2), **options)
    parts = [world.step("up"), world.step([2, 3, 3, 0]), world.step([None, None, 4, 4])]
    assert torch.equal(torch.cat(parts, dim=2), whole)
    assert world.frames == 17


def test_actions_that_a_world_would_drop_are_refused(make):
    with pytest.raises(ValueError, match="takes no negative_actions"):
        make().world(clip(), negative_actions=[2] * 4, guidance_scale=2.5, **FAST)
    with pytest.raises(ValueError, match="give a clip, or give an action to each step"):
        make().world(None, actions=[3] * 4, **FAST)


def test_a_world_of_a_model_without_a_window_warns_that_memory_grows(make):
    with pytest.warns(UserWarning, match="in a world without end its cache grows"):
        make(window=None).world(clip(), **FAST)


def test_a_world_without_a_clip_begins_with_one_frame(make):
    world = make().world(**FAST)
    assert (world.frames, world.group) == (0, 1)
    assert world.step().shape == (1, 3, 1, 32, 32) and (world.frames, world.group) == (1, 4)
    assert world.step(1).shape == (1, 3, 4, 32, 32) and world.frames == 5


def test_an_image_is_a_clip_of_one_frame_and_known_actions_count(make):
    pipe = make()
    image = clip(1)
    assert torch.equal(pipe.world(image[:, :, 0], **FAST).step(1), pipe.world(image, **FAST).step(1))
    told = pipe.world(clip(5), actions=[4] * 4, **FAST).step(1)
    assert not torch.equal(told, pipe.world(clip(5), **FAST).step(1))


def test_a_fork_goes_another_way_from_the_same_past_and_a_rewound_world_goes_on_as_before(make):
    world = make().world(clip(), **FAST)
    world.step(1)
    other = world.fork()
    first, second = world.step(2), world.step(3)
    elsewhere = other.step(4)
    assert not torch.equal(first, elsewhere)
    assert torch.equal(other.fork().step(0), other.step(0))
    world.rewind(2)
    assert torch.equal(world.step(2), first) and torch.equal(world.step(3), second)
    world.rewind(3)
    assert world.frames == 5 and not world.rewindable
    with pytest.raises(ValueError, match="1 steps cannot be taken back; 0 are remembered"):
        world.rewind()


def test_clips_of_one_world_have_their_own_actions(make):
    world = make().world(clip(count=2), **FAST)
    both = world.step(torch.tensor([[1, 1, 1, 1], [3, 3, 3, 3]]))
    for i, action in enumerate((1, 3)):
        alone = make().world(clip(count=2), **FAST).step(action)
        torch.testing.assert_close(both[i], alone[i])


def test_numbers_are_held_or_given_for_each_frame(make):
    pipe = make(WHEEL)
    held = pipe.world(clip(), **FAST).step([0.5, -1.0])
    assert torch.equal(held, pipe.world(clip(), **FAST).step([[0.5, -1.0]] * 4))


def test_frames_are_remembered_with_noise_but_for_those_of_the_sink_and_known_pixels_stay(make):
    pipe = make(sink=1)
    clean, noisy = (pipe.world(clip(1), **FAST, history_noise=level) for level in (0.0, 0.5))
    assert torch.equal(clean.step(1), noisy.step(1))  # only the first frame is remembered so far
    assert not torch.equal(clean.step(1), noisy.step(1))
    longer = pipe.extend(clip(), after=4, history_noise=0.5, progress=False, **FAST)
    assert torch.equal(longer[:, :, :5], clip())
    pipe.register_to_config(history_noise=0.5)
    assert torch.equal(pipe.extend(clip(), after=4, progress=False, **FAST), longer)
    with pytest.raises(ValueError, match="is for causal models"):
        make(causal=False, window=None).extend(clip(), after=4, history_noise=0.5, progress=False, **FAST)


def test_memory_stays_constant_however_long_a_world_goes_on(make):
    world = make(sink=1).world(clip(), **FAST)
    sizes = []
    for _ in range(12):
        world.step(1)
        sizes.append(world._rollout.cache.bytes())
    assert len(set(sizes[4:])) == 1


@pytest.mark.parametrize("action", [9, "jump", 1.5, [1, 2], [[1.0, 2.0]] * 4, torch.ones(1, 3)])
def test_what_is_no_action_is_refused_and_the_world_is_as_before(make, action):
    world, untouched = (make().world(clip(), **FAST) for _ in range(2))
    with pytest.raises(ValueError, match="action"):
        world.step(action)
    assert world.frames == 5 and not world.rewindable and torch.equal(world.step(2), untouched.step(2))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"causal": False, "window": None}, {}, "not causal"),
        ({"conditions": None}, {}, "takes no actions"),
        ({}, {"window": 9}, "takes no window"),
        ({}, {"history_noise": 1.0}, "nothing of the frames before"),
        ({}, {"history_noise": -0.1}, "history_noise"),
        ({}, {"guider": "auto"}, "guider"),
        ({}, {"solver": "flow_map"}, "flow_map"),
    ],
)
def test_a_world_that_cannot_be_is_refused_in_one_line(make, changes, options, message):
    with pytest.raises(ValueError, match=message):
        make(**changes).world(clip(), **{**FAST, **options})

"""Measurements of worlds: right on the truth itself, and sensitive to what is wrong."""

import json

import numpy as np
import pytest
import torch
from conftest import fill

from stdit.conditions import ActionSpace
from stdit.evaluation import minigrid, motion, room
from stdit.evaluation.worlds import DreamedEpisode, Episode, Play, fidelity, fidelity_by_horizon, play_episode
from stdit.recipes import evaluate, sample
from stdit.recipes.entry import run
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.vae import TinyVAE
from stdit.worlds.environments import make_environment, steps_of_group
from stdit.worlds.policies import make_policy


def episodes(name, state, count=4, groups=16, size=(64, 64)):
    env = make_environment(name)
    how = Play(env, make_policy("sticky", env.space), groups, group=4, size=size, state=state)
    return [play_episode(how, seed) for seed in range(count)]


@pytest.fixture(scope="module")
def played():
    return episodes("room", room.state)


def test_the_truth_of_the_room_is_measured_as_right(played):
    report = room.measure_rollouts([DreamedEpisode(one.lasts, one) for one in played], 4)
    assert report["moves as its action says"] == 1 and report["walls hold"] == 1
    assert report["shape and colour right at the end"] == 1 and report["attempts to pass a wall"] > 5
    assert max(report["distance from the truth after so many actions, px"].values()) < 0.5


def test_a_player_that_stands_still_goes_through_walls_or_changes_is_found(played):
    still = [DreamedEpisode(np.repeat(one.lasts[:1], len(one.lasts), 0), one) for one in played]
    assert room.measure_rollouts(still, 4)["moves as its action says"] < 0.7
    moved = [DreamedEpisode(np.roll(one.lasts, (8, 8), (1, 2)), one) for one in played]  # half into walls
    report = room.measure_rollouts(moved, 4)
    assert report["walls hold"] < 0.6 and report["distance from the truth after so many actions, px"][8] > 4
    recoloured = [DreamedEpisode(one.lasts[..., [1, 2, 0]], one) for one in played]
    assert room.measure_rollouts(recoloured, 4)["shape and colour right at the end"] < 0.6


def test_a_group_that_the_end_of_an_episode_cuts_short_does_not_count():
    class Short:
        calls = 0

    env = make_environment("room")
    real = env.env.step

    def step(action):
        Short.calls += 1
        observation, reward, _, _, info = real(action)
        return observation, reward, Short.calls >= 10, False, info

    env.env.step = step
    how = Play(env, make_policy("random", env.space), 9, group=4, size=(64, 64), state=room.state)
    one = play_episode(how, 0)
    assert len(one.lasts) == 3 and len(one.actions) == 2 and len(one.clip) == 9 and len(one.states) == 3


def test_a_policy_may_name_its_actions_and_one_that_is_unknown_is_refused():
    env = make_environment("room")
    how = Play(env, lambda: lambda *_: "left", 2, group=4, size=(32, 32), state=room.state)
    assert play_episode(how, 0).actions == [3, 3]
    with pytest.raises(ValueError, match="'jump' is unknown"):
        play_episode(how._replace(policy=lambda: lambda *_: "jump"), 0)


@pytest.mark.parametrize(("repeat", "steps"), [(1, 4), (2, 2), (4, 1)])
def test_the_steps_that_a_key_takes_in_turns_are_counted(repeat, steps):
    env = make_environment("room")._replace(turn_based=True)
    space = ActionSpace(count=5, repeat=repeat, environment={"name": "room", "turn_based": True})
    taken, step = [], env.env.step
    env.env.step = lambda action: taken.append(action) or step(action)
    list(env.act(1, 4, repeat=repeat))
    assert len(taken) == steps == steps_of_group(space, 4)


def test_pictures_equal_to_the_truth_have_no_error_and_brighter_ones_drift(played):
    frames = played[0].lasts
    same, brighter = (
        fidelity(frames, frames),
        fidelity(np.clip(frames.astype(int) + 20, 0, 255).astype(np.uint8), frames),
    )
    assert same.psnr > 100 and same.ssim == pytest.approx(1) and same.drift == 0
    assert 15 < brighter.psnr < 30 and 0.03 < brighter.drift < 0.09
    assert list(fidelity_by_horizon([DreamedEpisode(one.lasts, one) for one in played])) == [1, 4, 8, 16]


@pytest.mark.parametrize("by", [(3, 0), (-5, 0), (0, 4), (0, 0)])
def test_the_shift_of_a_picture_is_found(by):
    rng = np.random.default_rng(0)
    picture = np.repeat(rng.integers(0, 255, (16, 20, 3), np.uint8).repeat(4, 0).repeat(4, 1), 1, 0)
    moved = np.roll(picture, (by[1], by[0]), (0, 1))
    assert np.abs(motion.shift(picture, moved) - by).max() < motion.LEAST / 2
    assert np.sign(np.round(motion.shift(blurred(picture), blurred(moved)))).tolist() == np.sign(by).tolist()


def blurred(picture):
    """A picture without structure below eight pixels, as a VAE may leave it."""
    height, width = picture.shape[:2]
    means = picture.reshape(height // 8, 8, width // 8, 8, 3).mean((1, 3))
    return means.repeat(8, 0).repeat(8, 1).astype(np.uint8)


def test_the_agent_of_minigrid_is_found_with_its_heading():
    pytest.importorskip("minigrid", reason="the extra [worlds] is not installed")
    for name in ("MiniGrid-Empty-8x8-v0", "MiniGrid-DoorKey-8x8-v0"):
        found = episodes(name, minigrid.state, count=3, groups=24)
        report = minigrid.measure_rollouts([DreamedEpisode(one.lasts, one) for one in found], 4)
        assert set(report["cell and heading right after so many actions"].values()) == {1.0}


@pytest.fixture
def model(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    about = {"name": "room", "options": {"size": 32}}
    actions = {
        "stride": 4,
        "count": 5,
        "names": ["stay", "up", "down", "left", "right"],
        "repeat": 4,
        "environment": about,
    }
    net = tiny_model(
        in_channels=16, num_classes=0, learn_sigma=False, sample_size=(3, 4, 4), causal=True, window=2,
        position_encoding="rope", extra_conditions={"actions": actions},
    )  # fmt: skip
    vae = fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8)))
    pipe = STDiTPipeline(net, vae, STDiTScheduler("flow"), 9, 32, 32, 8.0, "flow", mask_strategies=["teacher_forcing"])
    pipe.save_pretrained("models/t")
    return tmp_path


def test_a_world_is_measured_and_shown_beside_its_truth(model):
    arguments = ["--world", "--model", "models/t", "--episodes", "3", "--actions", "4", "--steps", "1"]
    assert evaluate.main(arguments) == 0
    folder = model / "output/t/world"
    report = json.loads((folder / "report.json").read_text())
    assert report["environment"]["name"] == "room"
    assert report["PSNR of the VAE's round trip, dB"] > 0
    assert list(report["PSNR after so many actions, dB"]) == ["1", "4"]
    assert abs(report["loss under the actions of other clips, times as large"] - 1) < 0.5
    assert (folder / "report.png").stat().st_size > 1000 and (folder / "dream-2.mp4").is_file()


def test_a_model_without_a_known_environment_or_with_too_little_to_measure_is_refused(model, capsys):
    assert run(evaluate.main, ["--world", "--model", "models/t", "--episodes", "1"]) == 1
    assert "--episodes 1 is too few" in capsys.readouterr().err
    config = json.loads((model / "models/t/transformer/config.json").read_text())
    del config["extra_conditions"]["actions"]["environment"]
    (model / "models/t/transformer/config.json").write_text(json.dumps(config))
    assert run(evaluate.main, ["--world", "--model", "models/t"]) == 1
    assert "does not know its environment" in capsys.readouterr().err
    assert torch.is_grad_enabled()


def test_actions_can_be_given_on_the_command_line(model, capsys):
    one = ["--model", "models/t", "--steps", "1", "--num-videos", "1", "--output"]
    assert sample.main([*one, "up.mp4", "--actions", "up", "1"]) == 0
    assert sample.main([*one, "left.mp4", "--actions", "left", "left"]) == 0
    clips = [(model / f"{name}.mp4").read_bytes() for name in ("up", "left")]
    assert clips[0] != clips[1]
    assert json.loads((model / "up.json").read_text())["actions"] == ["up", "1"]
    assert run(sample.main, [*one, "no.mp4", "--actions", "jump"]) == 1
    assert "'jump' is unknown" in capsys.readouterr().err


def test_the_direction_of_motion_is_counted_by_horizon():
    rng = np.random.default_rng(1)
    picture = rng.integers(0, 255, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    truth = np.stack([np.roll(picture, 2 * i, 1) for i in range(9)])
    other_way = np.stack([*truth[:5], *(np.roll(truth[4], -2 * i, 1) for i in range(1, 5))])
    episode = Episode(truth, truth, actions=[0] * 8, states=[None] * 9)
    found = motion.measure_rollouts([DreamedEpisode(other_way, episode)], 4)
    assert found["groups that move"] == 8
    assert found["moves in the direction of the truth within so many actions"] == {1: 1.0, 4: 1.0, 8: 0.5}

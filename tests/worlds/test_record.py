"""Recordings: clips, actions and seeds of episodes, from which the frames can be had again."""

import json
import sys
import types

import numpy as np
import pytest

from stdit.conditions import ActionSpace
from stdit.data.config import DataConfig
from stdit.data.datasets import build_dataset
from stdit.data.video_io import VideoReader
from stdit.evaluation.metrics import psnr
from stdit.pixels import to_float
from stdit.recipes import record
from stdit.recipes.entry import run
from stdit.worlds.environments import environment_of, make_environment
from stdit.worlds.record import Recording, frames_hash, replay

gymnasium = pytest.importorskip("gymnasium", reason="the extra [worlds] is not installed")
SHORT = ["--episodes", "3", "--frames", "9", "--size", "32", "--workers", "1", "--output", "out"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(folder="out"):
    with open(f"{folder}/manifest.jsonl") as lines:
        return [json.loads(line) for line in lines]


def frames_of(path):
    with VideoReader(path) as reader:
        return reader.get_frames(range(len(reader)))


class Line(gymnasium.Env):
    """A dot on a line that a number moves; an episode ends after twelve steps."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    observation_space = gymnasium.spaces.Box(0, 32, (1,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.time = self.np_random.uniform(8, 24), 0
        return np.array([self.at], np.float32), {"at": self.at}

    def step(self, action):
        self.at, self.time = float(np.clip(self.at + action[0], 0, 31)), self.time + 1
        return np.array([self.at], np.float32), 1.0, self.time >= 12, False, {"at": self.at}

    def render(self):
        frame = np.zeros((32, 32, 3), np.uint8)
        frame[12:20, int(self.at)] = 255
        return frame


class Many(Line):
    action_space = gymnasium.spaces.MultiDiscrete([3, 3])


class Blind(Line):
    metadata = {"render_modes": []}

    def render(self):
        return None


class Unfit(Line):
    def reset(self, *, seed=None, options=None):
        raise gymnasium.error.DependencyNotInstalled("pygame is not installed, run `pip install pygame`")


class Fails(Line):
    def step(self, action):
        raise RuntimeError("no GL context")


class Huge(Line):
    action_space = gymnasium.spaces.Box(-3.4e38, 3.4e38, (1,), np.float32)


for name, kind in (
    ("Line", Line),
    ("Unfit", Unfit),
    ("Fails", Fails),
    ("Huge", Huge),
    ("Many", Many),
    ("Blind", Blind),
):
    gymnasium.register(f"{name}-v0", entry_point=kind)


@pytest.mark.parametrize("environment", ["room", "Line-v0"])
def test_recorded_actions_and_the_seed_give_the_recorded_frames(environment):
    assert record.main([environment, "--repeat", "4", *SHORT]) == 0
    for row in rows():
        assert len(row["actions"]) == row["frames"] == len(row["reward"]) and row["actions"][0] is None
        about = row["action_space"]["environment"]
        how = Recording(99, row["action_space"]["repeat"], tuple(about["size"]), 8.0)
        again = replay(environment_of(about), row["actions"], how, seed=row["seed"])
        assert frames_hash(again.frames) == row["frames_sha256"]
        assert psnr(to_float(frames_of(f"out/{row['path']}"))[None], to_float(again.frames)[None]) > 40


def test_the_largest_numbers_are_no_bounds():
    assert make_environment("Huge-v0").space == ActionSpace(width=1)
    assert make_environment("Line-v0").space == ActionSpace(width=1, low=[-1], high=[1])


def test_lossless_clips_have_exactly_the_frames():
    assert record.main(["room", "--lossless", *SHORT]) == 0
    for row in rows():
        assert frames_hash(frames_of(f"out/{row['path']}")) == row["frames_sha256"]


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (32, 48)])
def test_play_and_evaluation_see_the_pictures_that_training_has(size):
    record.main(["room", "--lossless", *SHORT[:4], "--size", "32x64", *SHORT[6:]])
    row = rows()[0]
    clips = build_dataset(
        DataConfig(
            source="videos", root="out", manifest="out/manifest.jsonl", num_frames=9, height=size[0], width=size[1]
        )
    )
    trained = clips.load(0, np.random.default_rng(0))["pixels"].numpy()
    env = environment_of(row["action_space"]["environment"])
    env.reset(row["seed"])
    seen = np.stack([env.picture(size), *(one.picture for one in env.act(row["actions"][1], 4, size))])
    differ = np.abs(seen.astype(int) - trained[:5]).mean()
    assert differ < 3 if size[0] > 32 else differ == 0  # decoders scale in another way


@pytest.mark.parametrize("size", [[0, 64], [64], "64", [10**9, 10**9], [64.0, 64]])
def test_a_size_that_no_recording_has_is_refused(size):
    with pytest.raises(ValueError, match="give .height, width."):
        environment_of({"name": "room", "size": size})


def test_an_action_lasts_so_many_frames_and_in_turns_it_is_one_step():
    record.main(["Line-v0", "--repeat", "4", "--info", "at", *SHORT[:-1], "frames"])
    record.main(["Line-v0", "--repeat", "4", "--turn-based", "--info", "at", *SHORT[:-1], "turns"])
    for by_frames, by_turns in zip(rows("frames"), rows("turns"), strict=True):
        assert by_frames["actions"][1:5] == [by_frames["actions"][1]] * 4
        assert by_frames["actions"] == by_turns["actions"]
        start, moved = by_turns["info"]["at"][0], by_turns["info"]["at"][1]
        assert by_turns["info"]["at"][1:5] == [moved] * 4
        assert by_frames["info"]["at"][4] - start == pytest.approx(4 * (moved - start), abs=1e-5)
        assert by_turns["reward"][1:5] == [1.0, 0.0, 0.0, 0.0]


def test_a_recording_goes_on_where_it_was_stopped_and_is_the_same_with_several_processes():
    record.main(["room", *SHORT])
    record.main(["room", "--episodes", "5", *SHORT[2:]])
    first = rows()
    record.main(["room", "--episodes", "5", "--frames", "9", "--size", "32", "--workers", "2", "--output", "whole"])
    assert first == rows("whole") and len(first) == 5


def test_a_policy_of_ones_own_chooses_the_actions(monkeypatch):
    module = types.ModuleType("mine")
    module.up = lambda observation, info, rng: 1
    monkeypatch.setitem(sys.modules, "mine", module)
    record.main(["room", "--policy", "mine:up", *SHORT])
    assert all(row["actions"][1:] == [1] * 8 for row in rows())


def test_the_rest_of_an_episode_that_ends_is_not_invented():
    record.main(["Line-v0", "--episodes", "2", "--frames", "40", "--workers", "1", "--output", "out"])
    assert [row["frames"] for row in rows()] == [13, 13]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Many-v0"], "neither one of several (Discrete) nor a vector (Box)"),
        (["Blind-v0"], "draws"),
        (["Unfit-v0"], "cannot begin an episode: pygame is not installed"),
        (["Fails-v0"], "cannot take a step: no GL context"),
        (["room", "--fps", "inf"], "--fps must be a number above 0"),
        (["NoSuchWorld-v0"], "NoSuchWorld"),
        (["room", "--policy", "clever"], "--policy 'clever' is unknown"),
        (["room", "--policy", "no_such_module:f"], "no_such_module"),
        (["room", "--info", "score"], "'score' is neither"),
        (["room", "--option", "colour=red"], "options of environment 'room'"),
        (["room", "--repeat", "0"], "--repeat must be >= 1"),
    ],
)
def test_what_cannot_be_recorded_is_refused_in_one_line_before_any_work(arguments, message, capsys, home):
    assert run(record.main, [*arguments, *SHORT]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said
    assert not (home / "out" / "manifest.jsonl").exists()


def test_a_folder_of_other_settings_is_left_as_it_is(capsys):
    record.main(["room", *SHORT])
    before = rows()
    assert run(record.main, ["room", "--policy", "random", *SHORT]) == 1
    assert "episodes of other settings (policy)" in capsys.readouterr().err
    assert rows() == before


def test_minigrid_is_turn_based_and_its_actions_have_names():
    pytest.importorskip("minigrid", reason="the extra [worlds] is not installed")
    env = make_environment("MiniGrid-Empty-8x8-v0")
    assert env.turn_based and env.space.count == 7 and env.space.names[:3] == ["left", "right", "forward"]


def test_dooms_engine_leaves_nothing_in_the_current_folder(tmp_path, monkeypatch):
    pytest.importorskip("vizdoom", reason="the extra [worlds] is not installed")
    monkeypatch.chdir(tmp_path)
    env = make_environment("VizdoomBasic-v1", {"max_buttons_pressed": 1})
    env.reset(0)
    assert env.picture((32, 40)).std() > 1
    env.env.close()
    assert list(tmp_path.iterdir()) == []

"""Actions: one for every pixel frame, grouped for latent frames, in training and in every way of sampling."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fill

from stdit.conditions import Actions, ActionSpace, ClipFacts
from stdit.data.actions import actions_of_rows
from stdit.data.clips import TableDataset
from stdit.data.config import DataConfig
from stdit.data.manifest import Row, Table
from stdit.recipes import cache_latents, index, train
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.vae import TinyVAE

KEYS = Actions(stride=4, count=5, names=["stay", "up", "down", "left", "right"], repeat=4)
WHEEL = Actions(stride=4, width=2, low=[-1, 0], high=[1, 10])
FAST = {"num_inference_steps": 1, "progress": False, "precision": "fp32"}
TRUNKS = [
    {},
    {"trunk": "long_skip"},
    {"conditioning": "in_context"},
    {"conditioning": "cross_attention"},
    {"conditioning": "adaln"},
    {"axes": ("spatial", "temporal")},
    {"causal": True, "window": 3, "position_encoding": "rope"},
]


def make_pipe(tiny_model, space=KEYS, **changes) -> STDiTPipeline:
    actions = {"stride": 4, **space.space.plain}
    model = tiny_model(
        in_channels=16,
        num_classes=0,
        learn_sigma=False,
        sample_size=(5, 4, 4),
        extra_conditions={"actions": actions},
        **changes,
    )
    vae = fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8)))
    strategies = ["prefix", "suffix", "ends", "teacher_forcing"]
    return STDiTPipeline(model, vae, STDiTScheduler("flow"), 17, 32, 32, 8.0, "flow", mask_strategies=strategies)


def clip(frames):
    return torch.rand((1, 3, frames, 32, 32), generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_a_latent_frame_has_the_actions_of_its_four_frames_in_order_and_the_first_has_none():
    raw = KEYS.collate([[None, 1, 2, 3, 4, 0, 0, None, 1]])
    assert KEYS.encode(raw, 4).tolist() == [[[5, 5, 5, 5], [1, 2, 3, 4], [0, 0, 5, 1]]]


def test_numbers_are_scaled_by_their_bounds_and_missing_ones_are_nan():
    raw = WHEEL.collate([[None, [1.0, 5.0], [-1.0, 0.0], None, [0.0, 10.0]]])
    grouped = WHEEL.encode(raw, 4)
    assert grouped[0, 0].isnan().all() and grouped[0, 1, 2].isnan().all()
    assert grouped[0, 1, [0, 1, 3]].tolist() == [[1, 0], [-1, -1], [0, 1]]


@pytest.mark.parametrize("bound", [float("inf"), 3.4028235e38, float("nan"), -2.0])
def test_bounds_that_are_none_are_refused_with_the_remedy(bound):
    with pytest.raises(ValueError, match="leave both out for numbers without bounds"):
        Actions(stride=4, width=2, low=[0, -1], high=[1, bound])


@pytest.mark.parametrize("action", ["12", {"1": 0, "2": 0}, b"12"])
def test_texts_and_objects_are_no_lists_of_numbers(action):
    with pytest.raises(ValueError, match="no list of 2 numbers"):
        Actions(stride=4, width=2).number(action)


def test_a_number_that_is_always_the_same_is_zero_and_missing_ones_stay_missing():
    same = Actions(stride=1, width=1, low=[0.1], high=[0.1])
    found = same.encode(same.collate([[None, [0.1], [0.1000003], None]]), 1)[0, :, 0, 0]
    assert found[1:3].tolist() == [0, 0] and found[[0, 3]].isnan().all()


@pytest.mark.parametrize("condition", [KEYS, WHEEL])
def test_a_fresh_embedder_adds_nothing_and_a_trained_one_knows_the_order_of_actions(condition):
    embedder = condition.embedder(32)
    embedder.reset()
    drawn = torch.rand(1, 4, 2) if condition.width else torch.tensor([[1, 2, 3, 4]])
    assert not embedder(drawn).any()
    fill(embedder)
    assert not torch.allclose(embedder(drawn), embedder(drawn.flip(1)))
    assert embedder(condition.null(3)).isfinite().all()


def test_all_actions_of_a_clip_are_dropped_together_and_by_its_key():
    keys = [(0, step, 0) for step in range(200)]
    raw = KEYS.collate([[None, 1, 2, 3, 4]] * 200)
    dropped = KEYS.drop(raw, keys, 0.25)
    gone = (dropped == -1).all(1)
    assert 30 < gone.sum() < 70 and torch.equal(dropped[~gone], raw[~gone])
    assert torch.equal(dropped, KEYS.drop(raw, keys, 0.25))


def test_fewer_actions_than_frames_are_those_of_the_last_frames():
    given = KEYS.parse([1, 2, 3, 4], 2)
    assert KEYS.at(given, [0, 4, 8], 9, stride=4, starts=True)[0].tolist() == [[5] * 4, [5] * 4, [1, 2, 3, 4]]


def test_windows_whose_groups_are_not_those_of_the_output_get_the_actions_of_their_own_frames():
    given = KEYS.parse([None, *(i % 5 for i in range(1, 9))], 1)
    assert KEYS.at(given, [-1, 3, 7, 11], 9, stride=4, starts=True)[0].tolist() == [
        [5] * 4, [5, 1, 2, 3], [4, 0, 1, 2], [3, 5, 5, 5],
    ]  # fmt: skip


@pytest.mark.parametrize("changes", TRUNKS, ids=str)
def test_every_trunk_is_told_an_action_and_no_action_is_the_same_as_none_given(tiny_model, changes):
    pipe = make_pipe(tiny_model, **changes)
    plain = pipe(num_videos=1, num_frames=9, **FAST)
    told = pipe(num_frames=9, actions=[None, 1, 1, 1, 1, 3, 3, 3, 3], **FAST)
    assert not torch.allclose(plain, told)
    assert torch.equal(plain, pipe(num_frames=9, actions=[None] * 9, **FAST))
    assert not torch.allclose(told, pipe(num_frames=9, actions=[1] * 4 + [3] * 4, guidance_scale=3.0, **FAST))


@pytest.mark.parametrize("causal", [False, True])
def test_the_tasks_are_told_actions_by_name_or_number(tiny_model, causal):
    changes = {"causal": True, "window": 3, "position_encoding": "rope"} if causal else {}
    pipe = make_pipe(tiny_model, **changes)
    one = pipe.extend(clip(5), after=8, actions=["up"] * 4 + ["left"] * 4, **FAST)
    other = pipe.extend(clip(5), after=8, actions=[1] * 4 + [4] * 4, **FAST)
    assert torch.equal(one[:, :, :5], clip(5))
    if causal:  # what is told later changes nothing before
        assert torch.equal(one[:, :, :9], other[:, :, :9])
    assert not torch.allclose(one[:, :, 9:], other[:, :, 9:])
    if not causal:
        joined = [pipe.connect(clip(5), clip(5), 8, actions=[i] * 18, **FAST) for i in (0, 1)]
        assert not torch.allclose(joined[0], joined[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(num_frames=9, actions=[7] * 9, **FAST), "action 7 is out of range; use 0 to 4"),
        (lambda p: p(num_frames=9, actions=["jump"] * 9, **FAST), "'jump' is unknown"),
        (lambda p: p(num_frames=9, actions=[1.5] * 9, **FAST), "action 1.5"),
        (lambda p: p(num_frames=9, actions=torch.full((9,), 5), **FAST), "action 5 is out of range"),
        (lambda p: p(num_frames=9, actions=[[0.1, 0.2]] * 9, **FAST), "action"),
        (lambda p: p(num_frames=9, actions=[1] * 12, **FAST), "12 actions for 9 frames"),
        (lambda p: p(num_frames=9, num_videos=2, actions=[[1] * 9] * 3, **FAST), "num_videos=2"),
        (lambda p: p.extend(clip(5), after=4, actions=torch.ones(1, 4), **FAST), "whole numbers"),
    ],
)
def test_actions_that_do_not_fit_are_refused_in_one_line(tiny_model, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(make_pipe(tiny_model))
    assert "\n" not in str(error.value)


def test_numbers_of_another_width_or_out_of_range_are_refused(tiny_model):
    pipe = make_pipe(tiny_model, WHEEL)
    assert pipe(num_frames=5, actions=[[0.0, 3.0]] * 5, **FAST).isfinite().all()
    assert pipe(num_frames=5, actions=np.zeros((5, 2), np.float32), **FAST).isfinite().all()
    for actions, message in (([[0.0]] * 5, "1 numbers"), ([[2.0, 1.0]] * 5, "out of range"), ([1] * 5, "actions")):
        with pytest.raises(ValueError, match=message):
            pipe(num_frames=5, actions=actions, **FAST)


def test_a_model_without_actions_refuses_them(tiny_model):
    model = tiny_model(in_channels=16, num_classes=0, learn_sigma=False, sample_size=(3, 4, 4))
    vae = fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8)))
    pipe = STDiTPipeline(model, vae, STDiTScheduler("flow"), 9, 32, 32, 8.0, "flow")
    with pytest.raises(ValueError, match="actions is given but the model was trained without it"):
        pipe(num_frames=9, actions=[1] * 9, **FAST)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"actions": [None, 1]}, {}], "row 2 of the manifest has no actions"),
        ([{"actions": [None, -1]}], "no whole number from 0"),
        ([{"actions": [None, [1.0]]}, {"actions": [None, 2]}], "several kinds"),
        ([{"actions": "up"}], "are no list"),
        ([{"actions": [0], "action_space": {"count": 2, "width": 2}}], "give one of them"),
        ([{"actions": [0], "action_space": {"cuont": 2}}], "cuont"),
        ([{"actions": [0], "action_space": {"count": 10**9}}], "whole number from 1"),
        ([{"actions": [None, 5], "action_space": {"count": 2}}], "row 1 of the manifest: action 5 is out of range"),
        ([{"actions": [[float("nan"), 1.0]], "action_space": {"width": 2}}], "not finite"),
        ([{"actions": [[3.0]], "action_space": {"width": 1, "low": [0], "high": [1]}}], "out of range"),
        ([{"actions": [0], "action_space": "{"}], "is no object"),
        ([{"actions": [0], "action_space": {"count": 2, "names": 5}}], "no list of texts"),
        ([{"actions": [[1.0]], "action_space": {"width": 2}}], "1 numbers; give 2"),
        ([{"actions": [0], "action_space": {"count": 2}}, {"actions": [0], "action_space": {"count": 3}}], "differ"),
    ],
)
def test_rows_whose_actions_make_no_space_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        actions_of_rows(rows)


def test_the_space_is_found_from_rows_without_one_also_in_csv():
    assert actions_of_rows([{"actions": [None, 3, 0]}, {"actions": "[null, 1]"}]) == ActionSpace(count=4)
    assert actions_of_rows([{"actions": [None, [0.5, 1.0]]}]) == ActionSpace(width=2)
    assert actions_of_rows([{"caption": "a"}]) is None


@pytest.mark.parametrize("actions", [[None, "left", "right", "left"], [None, 0.0, 1.0, 0.0], "[null, 0, 1, 0]"])
def test_actions_in_the_data_may_be_names_or_whole_floats(actions):
    row = Row(Path("a.mp4"), None, "", {"actions": actions, "action_space": {"count": 2, "names": ["left", "right"]}})
    found = TableDataset(Table([row], 0, None), DataConfig())
    raw = Actions.read(found.record(0), ClipFacts((4, 8, 8), 4.0))
    assert Actions(**found.action_space.plain).encode(Actions.collate([raw]), 1)[0, :, 0].tolist() == [2, 0, 1, 0]


def test_frames_that_are_skipped_or_repeated_have_no_actions():
    for frames in ([0, 2, 4], [0, 0, 1], [7, 8, 9]):
        assert Actions.read({"actions": [0] * 9}, ClipFacts((3, 8, 8), 4.0, frames)) is None
    assert Actions.read({"actions": [0] * 9}, ClipFacts((3, 8, 8), 4.0, [6, 7, 8])) == [None, 0, 0]


CONFIG = """
name: t
data: {root: world, manifest: manifest.jsonl, source: videos, num_frames: 9, height: 32, width: 32, workers: 0}
model: {size: S/2, depth: 2, hidden_size: 32, num_heads: 2, position_encoding: rope, causal: true, window: 2, actions: true}
objective: {mask_strategy: teacher_forcing}
train: {steps: 3, batch_size: 2, lr: 1.0e-2, checkpoint_every: 3, log_every: 1, preview_every: 2, samples: 2, sample_steps: 2,
        precision: fp32}
"""


def test_a_model_learns_actions_from_clips_and_from_cached_latents_and_carries_their_space(
    tmp_path, monkeypatch, capsys
):
    from stdit.recipes import record

    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.yaml").write_text(CONFIG)
    record.main(["room", "--episodes", "3", "--frames", "13", "--size", "32", "--output", "world", "--workers", "1"])
    assert train.run(["t.yaml"]) == 0
    assert cache_latents.main(["t.yaml", "--output", "latents"]) == 0
    assert train.run(["t.yaml", "name=cached", "data.source=latents", "data.root=latents", "data.manifest=null"]) == 0
    for name in ("t", "cached"):
        pipe = STDiTPipeline.from_pretrained(f"models/{name}")
        space = pipe.transformer.conditioners["actions"].space
        assert (space.count, space.repeat, space.names[1]) == (5, 4, "up") and space.environment["name"] == "room"
        assert pipe.transformer.action_embedder.mlp[2].weight.abs().max() > 0
    row = json.loads(next((tmp_path / "latents").glob("latents-*.json")).read_text())["conditions"][0]
    assert len(row["actions"]) == 9 and row["actions"][0] is None
    capsys.readouterr()
    assert train.run(["t.yaml", "name=flipped", "data.flip=true"]) == 1
    assert "mirrors the clips but not their actions" in capsys.readouterr().err
    arguments = ["data.flip=true", "--freeze-augmentation", "--output", "mirrored"]
    with pytest.raises(ValueError, match="mirrors the clips but not their actions"):
        cache_latents.main(["t.yaml", *arguments])
    assert not (tmp_path / "mirrored").exists()
    info = json.loads((tmp_path / "latents/cache.json").read_text())
    (tmp_path / "before").mkdir()
    for part in (tmp_path / "latents").glob("*-*"):
        (tmp_path / "before" / part.name).write_bytes(part.read_bytes())
    (tmp_path / "before/cache.json").write_text(json.dumps({**info, "flip": True}))  # by an earlier version
    assert train.run(["t.yaml", "name=before", "data.source=latents", "data.root=before", "data.manifest=null"]) == 1
    assert "'before' were made with data.flip=true" in capsys.readouterr().err
    assert train.run(["t.yaml", "name=faster", "data.fps=12"]) == 1
    assert "data.fps=12 takes some of the frames" in capsys.readouterr().err
    assert train.run(["t.yaml", "name=untold", "model.actions=false", "data.fps=12"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "world/manifest.jsonl").read_text().splitlines()]
    rows[0]["actions"] = "walks"  # a column of that name in other data
    (tmp_path / "world/manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert train.run(["t.yaml", "name=other", "model.actions=false"]) == 0
    assert train.run(["t.yaml", "name=held", "model.actions=false", "train.holdout=0.4"]) == 0
    assert cache_latents.main(["t.yaml", "--windows", "2", "--output", "walks"]) == 0
    assert json.loads((tmp_path / "walks/cache.json").read_text())["action_space"] is None
    assert index.main(["world/manifest.jsonl", "--output", "walks.index"]) == 0
    assert train.run(["t.yaml", "name=none"]) == 1
    assert "row 1 of the manifest: actions 'walks' are no list" in capsys.readouterr().err

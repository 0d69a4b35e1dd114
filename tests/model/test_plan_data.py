"""A plan knows the clips of an index and of cached latents, and the steps that they make up."""

from argparse import Namespace
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from index_files import write_clips

from stdit.config import Config, load_typed
from stdit.data.indexed import build_indexed
from stdit.recipes import index, plan
from stdit.recipes.order import build_order
from stdit.recipes.planned import _choices
from stdit.recipes.planned_steps import known_data, step_kinds
from stdit.vae import load_vae

SIZED = ["train.tokens=48", "train.micro_batch=null", "data.sizes=[[5,32,32],[9,32,48],[1,32,32]]"]
SMALL = [
    "vae.name=tiny", "data.root=clips", "data.fps=null", "data.source=videos", "model.size=S/2", "model.patch_size=[1,2,2]",
    "data.num_frames=9", "data.height=32", "data.width=32",
]  # fmt: skip


@pytest.fixture
def clips(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_clips(tmp_path / "clips")


@pytest.mark.parametrize("further", [[], ["data.packing=true", "model.axes=[joint]"]])
def test_a_plan_counts_the_steps_that_training_takes(clips, further):
    assert index.main(["clips", "--output", "data/clips.index", "--workers", "0", "data.sizes=[[1,1,1]]"]) == 0
    config = load_typed(Config, "video", [*SMALL, *SIZED, *further, "data.index=data/clips.index"])
    vae, dataset = load_vae("tiny"), build_indexed(config.data)
    order = build_order(config, dataset, vae, patch=(1, 2, 2), processes=1)
    kinds = step_kinds(config, vae, patch=(1, 2, 2), processes=1, dataset=known_data(config).trained)
    assert sum(kind.known for kind in kinds) == 5  # one cannot be read
    drawn = [[ref.size for ref in order.batch(step)] for step in range(600)]
    tokens = {kind.size: kind.tokens for kind in kinds}
    if not further:
        assert kinds[0].clips * kinds[0].tokens == max(kind.clips * kind.tokens for kind in kinds)
    if further:  # of what is in a pack, in proportion to its tokens
        counts = Counter(size for batch in drawn for size in batch)
        total = sum(tokens[size] * count for size, count in counts.items())
        shares = {size: tokens[size] * count / total for size, count in counts.items()}
    else:
        assert all({len(batch)} == {kind.clips for kind in kinds if kind.size == batch[0]} for batch in drawn)
        shares = {size: count / len(drawn) for size, count in Counter(batch[0] for batch in drawn).items()}
    assert shares == pytest.approx({kind.size: kind.share for kind in kinds}, abs=0.02)


def test_a_plan_says_what_an_index_knows_and_reads_no_manifest(clips, monkeypatch, capsys):
    assert index.main(["clips/manifest.jsonl", "--output", "data/manifest.index", "--workers", "0"]) == 0
    capsys.readouterr()
    monkeypatch.setattr("stdit.data.datasets.read_manifest", None)
    arguments = [
        "video",
        *SMALL,
        "data.manifest=manifest.jsonl",
        "data.source=auto",
        "data.index=data/manifest.index",
        "train.steps=100",
        "train.batch_size=8",
    ]
    assert plan.main([*arguments, "train.micro_batch=8"]) == 0
    said = capsys.readouterr().out
    hours = (19 / 12 + 7 / 24 + 11 / 12 + 29 / 24 + 19 / 24) / 3600
    assert f"6 clips of data/manifest.index, {hours:.1f} hours; 1 cannot be read; 1 are shorter than 9 frames" in said
    assert "each of the others is drawn 200.0 times in 100 steps" in said and "GB on disk for 4 clips" in said
    (clips / "manifest.jsonl").write_text((clips / "manifest.jsonl").read_text() + "\n")
    assert plan.main([*arguments, "train.micro_batch=8"]) == 0
    assert "for 1,000,000 clips" in capsys.readouterr().out  # the index is older than its manifest
    with pytest.warns(UserWarning, match="training refuses these data: .*older than its files"):
        assert plan.main([*arguments, "data.manifest=data/manifest.index", "train.micro_batch=8"]) == 0


def test_a_plan_of_several_sizes_is_of_the_one_with_most_tokens_and_says_the_mean_speed(clips, capsys):
    given = [*SMALL, *SIZED, "train.tokens=54"]
    assert plan.main(["video", *given]) == 0
    said = capsys.readouterr().out
    assert "9 frames of 32 x 48" in said and "of 3 sizes the one with the most tokens in a step" in said
    assert "  5 x 32 x 32 " in said and "33% of steps" in said  # which comes how often is not known
    config, vae = load_typed(Config, "video", given), load_vae("tiny")
    device = Namespace(
        gpu="H100", count=1, utilisation=0.4, tflops=None, memory=None, bandwidth=50.0, host_bandwidth=25.0
    )
    run, choice = plan.planned(device, config, plan.arguments_of(config, vae), vae)
    each = [replace(run, latent=kind.latent, clips=kind.clips, kinds=()).computation(choice) for kind in run.kinds]
    assert run.computation(choice) == pytest.approx(np.mean(each)) and len(set(each)) == 3
    assert run.clips_of_steps == pytest.approx(np.mean([kind.clips for kind in run.kinds]))


def test_a_plan_leaves_out_the_clips_that_are_held_out(clips, capsys):
    assert index.main(["clips/manifest.jsonl", "--output", "clips.index", "--workers", "0"]) == 0
    given = ["video", *SMALL, "data.manifest=clips.index", "data.num_frames=5", "train.steps=100", "train.batch_size=8"]
    capsys.readouterr()
    assert plan.main([*given, "train.micro_batch=8", "train.holdout_column=label", "train.holdout_values=[a]"]) == 0
    said = capsys.readouterr().out
    assert "3 are held out; each of the others is drawn 400.0 times" in said and "for 5 clips" in said


def test_a_plan_takes_the_number_of_clips_that_it_is_given_before_that_of_an_index(clips, capsys):
    assert index.main(["clips/manifest.jsonl", "--output", "clips.index", "--workers", "0"]) == 0
    arguments = ["video", *SMALL, "data.manifest=clips.index", "--clips", "70"]
    assert plan.main(arguments) == 0
    assert "GB on disk for 70 clips" in capsys.readouterr().out


def test_a_plan_warns_of_sizes_that_training_refuses_and_says_when_no_clip_is_left(clips, capsys):
    assert index.main(["clips/manifest.jsonl", "--output", "clips.index", "--workers", "0"]) == 0
    for further, said in (
        (["train.micro_batch=8"], "needs train.tokens, and train.micro_batch=null"),
        (
            ["data.packing=true", "model.axes=[joint]", "train.tokens=10"],
            "a clip of 18 tokens does not fit into a pack of 10",
        ),
    ):
        with pytest.warns(UserWarning, match=f"training refuses these settings: .*{said}"):
            assert plan.main(["video", *SMALL, *SIZED, *further]) == 0
    capsys.readouterr()
    assert plan.main(["video", *SMALL, "data.manifest=clips.index", "data.num_frames=97"]) == 0
    assert "5 are shorter than 97 frames; none is left to train on" in capsys.readouterr().out


def test_proposals_of_other_contexts_have_all_clips_of_a_process_with_several_sizes(clips):
    given = [*SMALL, *SIZED, "train.tokens=288", "data.sizes=[[9,32,32],[9,32,48]]"]
    config, vae = load_typed(Config, "video", given), load_vae("tiny")
    device = Namespace(
        gpu="H100", count=4, utilisation=0.4, tflops=None, memory=None, bandwidth=50.0, host_bandwidth=25.0
    )
    run, current = plan.planned(device, config, plan.arguments_of(config, vae), vae)
    assert {choice.micro for choice in _choices(run, current)} == {
        current.micro
    }  # no context divides three latent frames
    halved = replace(run, latent=(4, *run.latent[1:]))
    assert {c.context: c.micro for c in _choices(halved, current)} == {n: n * current.micro for n in (1, 2, 4)}
    assert not any("micro_batch" in one for choice in _choices(run, current) for one in run.overrides(choice))

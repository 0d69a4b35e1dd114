"""What `stdit plan --fit` proposes."""

import argparse
import dataclasses
import re
from dataclasses import replace

import pytest
import torch

from stdit.config import Config, load_typed
from stdit.model.stdit import STDiT
from stdit.recipes import plan
from stdit.recipes.planned import GIB, Choice, PlannedRun, _Checks, _choices, find_fit, parse_memory, smallest

CONFIG = """
name: p
vae: {name: Wan-AI/Wan2.1-T2V-1.3B-Diffusers/vae}
data: {num_frames: 29, height: 64, width: 64}
model: {size: S/2, depth: 2}
train: {batch_size: 32}
"""
ARGUMENTS = {"depth": 2, "hidden_size": 96, "num_heads": 4, "in_channels": 16, "num_classes": 0, "sample_size": (8, 8, 8),
             "patch_size": (1, 2, 2)}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "p.yaml"
    file.write_text(CONFIG)
    return str(file)


def planned(path: str, count: int, *overrides: str) -> PlannedRun:
    return PlannedRun(
        load_typed(Config, path, overrides), ARGUMENTS, (8, 8, 8), count, bf16=True, fused=True, on_cpu=False, peak=165.0,
        utilisation=0.4, bandwidth=50.0,
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 4])
def test_what_is_proposed_fits_and_less_room_never_takes_less_time(path, count):
    run, current = planned(path, count), Choice(False, 32 // count)
    how = {"path": path, "overrides": []}
    least = run.need(*[c := smallest(run, current, **how), run.memory(c)])
    most = run.need(current, run.memory(current))
    times = []
    for share in (1.0, 0.6, 0.0):
        room = least + share * (most - least)
        found = find_fit(run, current, room, **how)
        assert found is not None and run.need(found, run.memory(found)) <= room
        times.append(run.seconds(found))
    assert times == sorted(times) and times[0] < times[-1]
    assert find_fit(run, current, most, **how) == current
    assert find_fit(run, current, least - 1, **how) is None


def test_the_memory_of_many_clips_is_estimated_from_that_of_two(path):
    run = planned(path, 4)
    for choice in (Choice("selective", 16), Choice(True, 8, True, True, 2)):
        assert run.estimate(choice).peak == pytest.approx(run.memory(choice).peak, rel=0.01)


def test_settings_that_training_refuses_are_not_proposed(path):
    for overrides, refused in (
        (["train.compile=true"], lambda c: c.checkpointing == "selective" or c.context > 1),
        (["train.holdout=0.1"], lambda c: c.sharded),
        (["train.batch_size=12"], lambda c: 12 % (c.micro * 4 // c.context)),
    ):
        run, current = planned(path, 4, *overrides), Choice(False, 3 if "12" in overrides[0] else 8)
        how = {"path": path, "overrides": overrides}
        needs = run.need(current, run.memory(current))
        found = find_fit(run, current, 0.98 * needs, **how)
        assert found is None or not refused(found)


def test_processes_beyond_those_that_can_share_heads_form_a_ring_which_sends_more(path):
    def arranged(run):
        return {(c.context, c.ring) for c in _choices(run, Choice(False, 4))}

    six = {**ARGUMENTS, "num_heads": 6}
    run = replace(planned(path, 8, "model.axes=[joint]"), arguments=six)
    assert arranged(run) == {(1, 1), (2, 1), (4, 2), (8, 4)}
    factorized = replace(planned(path, 8, "model.axes=[spatial,temporal]"), arguments=six)
    assert arranged(factorized) == {(1, 1), (2, 1), (4, 1), (8, 1)}
    sent = [run.traffic(Choice(False, 4, context=4, ring=ring)).tokens for ring in (1, 2, 4)]
    assert 0 < sent[0] < sent[1] < sent[2]
    within = replace(factorized, arguments={**six, "axes": ["spatial", "temporal"]})
    assert within.traffic(Choice(False, 4, context=2)).tokens == run.traffic(Choice(False, 4, context=2)).tokens / 2
    in_32_bits = replace(run, bf16=False)
    assert in_32_bits.traffic(Choice(False, 4, context=4)).tokens == 2 * sent[0]
    assert Choice(False, 4, context=8, ring=4).overrides(Choice(False, 4)) == [
        "train.parallel.context=8",
        "train.parallel.ring=4",
    ]


def test_the_proposed_overrides_make_the_plan_fit(path, capsys):
    assert plan.main([path, "--gpu", "4090", "--count", "4", "--fit", "1.6GB"]) == 0
    said = capsys.readouterr().out
    overrides = re.search(r"^  ((?:model|train)\..*)$", said, re.MULTILINE)[1].split()
    assert plan.main([path, *overrides, "--gpu", "4090", "--count", "4"]) == 0
    assert float(re.search(r"peak +([\d.]+)", capsys.readouterr().out)[1]) <= 1.6


def test_a_choice_is_accepted_under_flags_as_it_is_under_settings(path):
    parser = argparse.Namespace(overrides=[], shard="fsdp", context=2, ring=None)
    overrides = plan.with_flags(parser)
    assert overrides == ["train.parallel.shard=fsdp", "train.parallel.context=2"]
    run = planned(path, 2, *overrides)
    checks = _Checks(run, run.configured, path=path, overrides=overrides)
    for choice in (run.configured._replace(offload=True), run.configured._replace(context=1, micro=16)):
        assert checks.accept(choice)
        config = load_typed(Config, path, [*overrides, *run.overrides(choice)])
        assert replace(run, config=config).configured == choice


def test_micro_batches_that_all_clips_of_a_process_are_need_no_override(path):
    run = planned(path, 4)
    assert run.overrides(Choice(False, 16, context=2)) == ["train.parallel.context=2"]
    assert run.overrides(Choice(False, 8, context=2)) == ["train.micro_batch=8", "train.parallel.context=2"]


def test_nothing_fits_is_said_with_what_the_least_takes(path, capsys):
    assert plan.main([path, "--gpu", "4090", "--fit", "1.55GB"]) == 1
    said = capsys.readouterr().out
    assert "nothing fits: the least is" in said and "use a smaller model.size" in said


def test_an_amount_of_memory_is_that_of_a_cards_label():
    assert parse_memory("24GB") == parse_memory("24") == parse_memory("24 gib") == 24 * GIB
    for text in ("24TB", "0GB", "-1", "GB", "1e3"):
        with pytest.raises(ValueError, match="no amount of memory; give one such as 24GB"):
            parse_memory(text)


def needs(run: PlannedRun, choice: Choice) -> float:
    return run.need(choice, run.memory(choice))


def of_weights(path: str, *overrides: str) -> PlannedRun:
    """A run of one device whose weights take most of its memory, and which one clip at a time makes least."""
    deep = {**ARGUMENTS, "depth": 8, "hidden_size": 384}
    run = planned(path, 1, "train.batch_size=4", *overrides)
    return dataclasses.replace(run, arguments=deep)


def test_the_host_keeps_all_but_two_blocks_and_what_is_no_block(path):
    run, choice = of_weights(path), Choice(True, 1)
    with torch.device("meta"):
        model = STDiT(**run.arguments)
    block = 4 * sum(p.numel() for p in model.blocks[0].parameters())
    rest = 4 * sum(p.numel() for name, p in model.named_parameters() if not name.startswith("blocks."))
    here, away = run.memory(choice), run.memory(choice._replace(sharded=True, offload=True))
    assert away.weights == pytest.approx(rest + 2 * block) and away.optimizer == away.ema == 0
    assert (away.activations, away.recomputed) == (here.activations, here.recomputed)
    written = here.weights + here.optimizer + here.ema  # a checkpoint's copy
    everything = here.weights + here.gradients + here.optimizer + here.ema + written
    assert run.on_host(choice._replace(sharded=True, offload=True)) == pytest.approx(everything)
    assert needs(run, choice._replace(sharded=True, offload=True)) < needs(run, choice)


def test_the_whole_model_that_is_sampled_stands_beside_the_shards_and_the_moments(path):
    deep = {**ARGUMENTS, "depth": 8, "hidden_size": 384}
    choice = Choice(True, 1, sharded=True)

    def beyond(*overrides: str, offload: bool = False) -> float:
        """What sampling takes beside what stays on the device, in whole models."""
        run = replace(planned(path, 8, "train.batch_size=8", *overrides), arguments=deep)
        way = choice._replace(offload=offload)
        memory = replace(run.memory(way), activations=0.0, gradients=0.0, recomputed=0.0, working=0.0)
        stays = 0.0 if offload else memory.persistent
        return (run.need(way, memory) - run.other(way) - stays) / (4 * run.trained)

    nothing = ["train.samples=0", "train.steps=9", "train.preview_every=9"]
    assert beyond() == beyond(*nothing[:2], "train.preview_every=8") == pytest.approx(1)
    assert beyond("train.guide_step=5") == beyond("train.guide_step=5", offload=True) == pytest.approx(2)
    assert beyond(*nothing, "train.guide_step=5") == pytest.approx(0)


@pytest.mark.parametrize(
    ("settings", "decides"),
    [
        (["--count", "64", "--shard", "fsdp", "model.size=L/2", "model.depth=8", "train.batch_size=64"], "whole model"),
        (["--count", "4", "train.batch_size=4", "model.depth=8", "model.gradient_checkpointing=true"], "gradients"),
        ([], "activations"),
        (["--gpu", "cpu", "train.batch_size=1", "model.depth=8", "model.gradient_checkpointing=true"], "copy"),
    ],
)
def test_the_printed_parts_of_the_peak_add_up_to_it(path, capsys, settings, decides):
    assert plan.main([path, *settings]) == 0
    said = capsys.readouterr().out
    peak, names = re.search(r"^  peak +([\d.]+).*: (.*)$", said, re.MULTILINE).groups()
    said = re.sub(r"^  activations .*(?<!configured)$\n", "", said, flags=re.MULTILINE)
    parts = {part: float(re.search(rf"^  {part} +([\d.]+)", said, re.MULTILINE)[1]) for part in names.split(" + ")}
    assert decides in parts and sum(parts.values()) == pytest.approx(float(peak), abs=0.01 * len(parts) / 2 + 0.01)


def test_the_largest_clip_leaves_room_for_the_whole_model_that_is_sampled(path, capsys):
    how = [path, "model.size=L/2", "model.depth=24", "train.batch_size=4", "--count", "4", "--shard", "fsdp"]
    how += ["--tflops", "900", "--memory", "4.5"]
    assert plan.main(how) == 0
    said = capsys.readouterr().out
    assert "largest       micro-batch 0" in said and "Set train.samples=0 and train.preview_every above" in said
    assert plan.main([*how, "train.samples=0", "train.preview_every=1000000"]) == 0
    assert re.search(r"largest +micro-batch [1-9]", capsys.readouterr().out)


def test_shards_hold_whole_gradients_while_they_add_up_micro_batches_unless_the_host_does(path):
    run = planned(path, 4)
    one, several = Choice(True, 8, sharded=True), Choice(True, 4, sharded=True)
    assert run.other(several) - run.other(one) == 4 * run.trained
    assert run.other(several._replace(offload=True)) == run.other(one._replace(offload=True)) == run.other(one)
    for way in (one, several):  # DDP holds them twice in any case
        assert run.other(way._replace(sharded=False)) == run.other(several)


def test_moments_of_8_bits_take_a_quarter_and_nothing_else_changes(path):
    run, choice = of_weights(path), Choice("selective", 2)
    exact, coarse = run.memory(choice), run.memory(choice._replace(coarse=True))
    assert 0.25 < coarse.optimizer / exact.optimizer < 0.27
    assert dataclasses.replace(coarse, optimizer=exact.optimizer) == exact


def test_savers_are_proposed_one_after_the_other_as_room_becomes_less(path):
    run, current = of_weights(path), Choice(False, 4)
    how = {"path": path, "overrides": ["train.batch_size=4"]}
    smallest_of = [
        min(needs(run, Choice(True, 1, **way)) for way in ways)
        for ways in ([{}], [{"coarse": True}], [{"sharded": True, "offload": True}])
    ]
    assert smallest_of == sorted(smallest_of, reverse=True) and len(set(smallest_of)) == 3
    for room, (coarse, offload) in zip(smallest_of, ((False, False), (True, False), (False, True)), strict=True):
        found = find_fit(run, current, room, **how)
        assert (found.coarse, found.offload, found.sharded) == (coarse, offload, offload)
    assert find_fit(run, current, smallest_of[-1] - 1, **how) is None


def test_the_host_takes_time_for_every_micro_batch_and_less_with_a_faster_link(path):
    run, choice = of_weights(path), Choice(True, 4, sharded=True, offload=True)
    parameters = run.trained
    assert run.traffic(choice).host == 12 * parameters and run.traffic(choice._replace(micro=1)).host == 48 * parameters
    assert run.traffic(choice._replace(sharded=False, offload=False)).host == 0
    fast = dataclasses.replace(run, host_bandwidth=50.0)
    assert run.seconds(choice) - fast.seconds(choice) == pytest.approx(12 * parameters / 50e9)


def test_every_micro_batch_gathers_weights_and_exchanges_tokens_and_gradients_are_reduced_once(path):
    run = planned(path, 4)
    once, four = (Choice(False, micro, sharded=True) for micro in (8, 2))
    for overrides, passes in (([], 2), (["train.parallel.shard=fsdp", "train.parallel.reshard=false"], 1)):
        given = planned(path, 4, *overrides)
        assert given.traffic(once).weights == (passes + 1) * 4 * run.trained
        assert given.traffic(four).weights == (4 * passes + 1) * 4 * run.trained
    assert run.traffic(four._replace(offload=True)).weights == 4 * run.traffic(once).weights
    assert run.traffic(Choice(False, 2)).weights == run.traffic(Choice(False, 8)).weights
    whole, parts = (run.traffic(Choice(False, micro, context=2)).tokens for micro in (16, 4))
    assert whole == parts > 0


@pytest.mark.parametrize(
    ("overrides", "coarse", "offload"),
    [(["train.optimizer=muon"], False, True), (["train.lora.rank=4", "init_from.path=m"], True, False)],
)
def test_savers_that_training_refuses_are_not_proposed(path, overrides, coarse, offload):
    run, current = of_weights(path, *overrides), Choice(False, 4)
    how = {"path": path, "overrides": ["train.batch_size=4", *overrides]}
    found = {(c.coarse, c.offload) for c in _choices(run, current) if _Checks(run, current, **how).accept(c)}
    assert found == {(False, False)} | ({(True, False)} if coarse else set()) | ({(False, True)} if offload else set())


def test_a_proposal_says_what_it_needs_and_the_plan_of_it_fits(path, capsys):
    size = ["model.depth=12", "model.hidden_size=768", "model.num_heads=12", "train.batch_size=2"]
    given = [path, *size, "--gpu", "4090", "--host-bandwidth", "10"]
    for room, words in (("3.5GB", "bitsandbytes"), ("2.25GB", "of the host's memory")):
        assert plan.main([*given, "--fit", room]) == 0
        said = capsys.readouterr().out
        assert words in said
        overrides = re.search(r"^  ((?:model|train)\..*)$", said, re.MULTILINE)[1].split()
        assert plan.main([*given, *overrides]) == 0
        again = capsys.readouterr().out
        assert float(re.search(r"peak +([\d.]+)", again)[1]) <= float(room[:-2])
    assert "train.parallel.offload=true" in overrides and "at 10 GB/s" in again
    with pytest.raises(ValueError, match="--host-bandwidth must be > 0"):
        plan.main([path, "--host-bandwidth", "0"])

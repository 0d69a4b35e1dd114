"""What `stdit plan --fit` proposes."""

import re

import pytest

from stdit.config import Config, load_typed
from stdit.recipes import plan
from stdit.recipes.planned import GIB, Choice, PlannedRun, find_fit, parse_memory, smallest

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


def test_the_proposed_overrides_make_the_plan_fit(path, capsys):
    assert plan.main([path, "--gpu", "4090", "--count", "4", "--fit", "1.6GB"]) == 0
    said = capsys.readouterr().out
    overrides = re.search(r"^  ((?:model|train)\..*)$", said, re.MULTILINE)[1].split()
    assert plan.main([path, *overrides, "--gpu", "4090", "--count", "4"]) == 0
    assert float(re.search(r"peak +([\d.]+)", capsys.readouterr().out)[1]) <= 1.6


def test_nothing_fits_is_said_with_what_the_least_takes(path, capsys):
    assert plan.main([path, "--gpu", "4090", "--fit", "1.55GB"]) == 1
    said = capsys.readouterr().out
    assert "nothing fits: the least is" in said and "use a smaller model.size" in said


def test_an_amount_of_memory_is_that_of_a_cards_label():
    assert parse_memory("24GB") == parse_memory("24") == parse_memory("24 gib") == 24 * GIB
    for text in ("24TB", "0GB", "-1", "GB", "1e3"):
        with pytest.raises(ValueError, match="no amount of memory; give one such as 24GB"):
            parse_memory(text)

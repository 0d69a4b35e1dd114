"""The checks of `stdit gpu-check` run and hold with tiny models on the CPU, and the command goes on where it stopped."""

import json

import pytest
import torch
from other_device import other_device

from stdit.recipes import gpu_check, gpu_compile, gpu_core, gpu_long, gpu_speed
from stdit.recipes.machine import Machine

CPU = Machine(torch.device("cpu"), full=False)
ALL = [*gpu_core.CHECKS, *gpu_compile.CHECKS, *gpu_long.CHECKS]
# Those that compile, or train by the command, take seconds each.
SLOW = {
    "run_resumes_to_the_bit",
    "outputs_match",
    "steps_match",
    "runs_compiled",
    "fit_stays_under",
    "host_memory_stays_under",
}


def marked(check):
    return pytest.param(check, marks=[pytest.mark.slow] if check.__name__ in SLOW else [], id=check.__name__)


@pytest.mark.parametrize("check", [marked(check) for check in ALL if check is not gpu_compile.image_speed])
def test_a_check_runs_and_holds_on_the_cpu(check):
    assert check(CPU)


@pytest.mark.slow
def test_the_speed_of_compiled_blocks_is_measured():
    assert "Tflop/s" in gpu_compile.image_speed(CPU)


def test_a_check_fails_where_numbers_differ(monkeypatch):
    packed = gpu_core.STDiT.packed
    monkeypatch.setattr(gpu_core.STDiT, "packed", lambda self, *given: [1.01 * x for x in packed(self, *given)])
    with pytest.raises(AssertionError, match="float32"):
        gpu_core.packed_equals_unpacked(CPU)
    monkeypatch.setattr(gpu_core, "orthogonalize", lambda matrices: matrices)
    with pytest.raises(AssertionError, match="singular values"):
        gpu_core.muon_is_orthogonal(CPU)


def test_nothing_of_a_training_step_stays_behind_on_another_device(monkeypatch):
    for module in (gpu_speed, gpu_core):
        monkeypatch.setattr(module, "autocast", lambda precision, device: torch.autocast("cpu", enabled=False))
    with other_device() as device:
        machine = Machine(device, full=False)
        arguments = {
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "patch_size": (1, 2, 2),
            "in_channels": 4,
            "num_classes": 5,
        }
        gpu_speed.training_step(machine, arguments, (2, (1, 8, 8)))()
        assert gpu_core.forward_matches_cpu(machine) and gpu_core.cached_rollout_equals_uncached(machine)


@pytest.fixture
def sections(monkeypatch, tmp_path):
    """Three checks in place of a section, of which one fails; and the names of those that ran."""
    ran = []

    def first(machine):
        ran.append("first")
        return "3 of 3"

    def second(machine):
        ran.append("second")
        raise AssertionError("differs by 0.1")

    def third(machine):
        ran.append("third")
        return "all"

    monkeypatch.setattr(gpu_core, "CHECKS", [first, second, third])
    monkeypatch.setattr(gpu_check, "code_hash", lambda: "code")
    arguments = ["--section", "core", "--device", "cpu", "--output", str(tmp_path / "results/core.json")]
    return arguments, ran


def test_a_second_call_does_only_what_has_not_passed(sections, tmp_path, capsys):
    arguments, ran = sections
    assert gpu_check.main(arguments) == 1
    said = capsys.readouterr().out
    assert "ok    core: first: 3 of 3" in said and "FAIL  core: second: AssertionError: differs by 0.1" in said
    assert gpu_check.main(arguments) == 1
    assert ran == ["first", "second", "third", "second"]
    assert "ok    core: first: 3 of 3 (before)" in capsys.readouterr().out
    assert gpu_check.main([*arguments, "--again"]) == 1
    assert ran[4:] == ["first", "second", "third"]


def test_a_check_that_a_user_ended_is_tried_again(sections, tmp_path, monkeypatch):
    arguments, _ = sections

    def ended(machine):
        raise KeyboardInterrupt

    checks = gpu_core.CHECKS
    monkeypatch.setattr(gpu_core, "CHECKS", [checks[0], ended])
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(arguments)
    assert list(json.loads((tmp_path / "results/core.json").read_text())["checks"]) == ["core: first"]


def test_again_keeps_the_results_of_other_sections(sections, tmp_path, monkeypatch):
    arguments, _ = sections
    monkeypatch.setattr(gpu_long, "CHECKS", [gpu_core.CHECKS[2]])
    gpu_check.main(arguments)
    gpu_check.main(["--section", "long", *arguments[2:], "--again"])
    kept = json.loads((tmp_path / "results/core.json").read_text())["checks"]
    assert sorted(kept) == ["core: first", "core: second", "core: third", "long: third"]


def test_results_of_other_code_are_not_believed(sections, monkeypatch):
    arguments, ran = sections
    gpu_check.main(arguments)
    monkeypatch.setattr(gpu_check, "code_hash", lambda: "other code")
    gpu_check.main(arguments)
    assert ran == 2 * ["first", "second", "third"]


def test_a_check_that_ended_the_command_is_not_tried_for_ever(sections, tmp_path, capsys):
    arguments, ran = sections
    gpu_check.main(arguments)
    file = tmp_path / "results/core.json"
    kept = json.loads(file.read_text())
    kept["checks"]["core: second"] = {"result": "begun", "said": "", "seconds": 350.0}
    kept["checks"]["core: third"] = {"result": "begun", "said": "", "seconds": 20.0}  # there was little time for it
    file.write_text(json.dumps(kept))
    assert gpu_check.main(arguments) == 1
    assert ran[3:] == ["third"] and "it ended the command the last time" in capsys.readouterr().out


def test_what_no_time_is_left_for_is_left_for_another_call(sections, monkeypatch, capsys):
    arguments, ran = sections
    clock = iter([0.0, 0.0, 0.0, 0.0, 340.0, 341.0, 342.0])
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: next(clock))
    assert gpu_check.main(arguments) == 1
    assert ran == ["first"] and capsys.readouterr().out.count("left  core") == 2


def test_results_that_are_damaged_are_refused_in_one_line(sections, tmp_path):
    arguments, ran = sections
    file = tmp_path / "results/core.json"
    file.parent.mkdir()
    for text in ("{", '{"of": 3, "checks": {}}', '{"of": {}, "checks": {"x": 1}}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="give another --output"):
            gpu_check.main(arguments)
    assert ran == []


def test_peers_without_sources_are_refused_before_anything_is_run(sections, tmp_path):
    arguments, ran = sections
    with pytest.raises(ValueError, match=r"lacks DiT and Latte.*git clone .*/DiT && git clone .*/Latte"):
        gpu_check.main([*arguments[2:], "--peers", str(tmp_path)])
    assert ran == []


def test_a_machine_without_a_gpu_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--section", "core"]) == 2
    assert "no CUDA device" in capsys.readouterr().out

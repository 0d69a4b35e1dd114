"""Whole runs of `stdit train` on tiny models."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from media import write_barcodes
from safetensors.torch import load_file

from stdit.conditions import CONDITIONERS, LearntGuidance
from stdit.data.shapes import CLASS_NAMES
from stdit.model.stdit import STDiT
from stdit.recipes import train
from stdit.sampling.pipeline import STDiTPipeline
from stdit.training import signals
from stdit.training.metrics import MetricsLogger
from stdit.training.run import RunFolders
from stdit.training.state import damage, list_checkpoints

ROOT = Path(__file__).resolve().parents[2]
TINY = """
name: t
data: {source: shapes, num_frames: 5, height: 32, width: 32, num_shapes: 40, workers: 0}
model: {size: S/2, depth: 2, hidden_size: 32, num_heads: 2}
train: {steps: 6, decay_steps: 20, batch_size: 4, optimizer: muon, lr: 1.0e-3, ema_decay: 0.9, checkpoint_every: 3,
        log_every: 2, preview_every: 100, samples: 2, sample_steps: 2, precision: fp32}
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.yaml").write_text(TINY)
    return tmp_path


def go(*overrides: str) -> int:
    return train.run(["t.yaml", *overrides])


def tensors(name: str, step: int) -> dict:
    folder = Path("checkpoints") / name / f"step-{step}"
    return {
        f"{file.stem}/{key}": value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()
    }


def losses(name: str) -> list[tuple]:
    with open(f"output/{name}/training_metrics.csv", newline="") as stream:
        return [
            tuple(row[key] for key in ("step", "loss", "lr", "grad_norm", "skipped")) for row in csv.DictReader(stream)
        ]


def assert_same_run(a: str, b: str, step: int) -> None:
    one, two = tensors(a, step), tensors(b, step)
    assert one.keys() == two.keys()
    assert [key for key in one if not torch.equal(one[key], two[key])] == []
    assert losses(a) == losses(b)


def test_a_run_writes_metrics_curves_samples_summary_and_model(home):
    assert go("objective.sampling_shift=4") == 0
    output = home / "output" / "t"
    for name in (
        "training_metrics.csv",
        "training_curves.png",
        "generated_samples.pt",
        "target_samples.pt",
        "summary.json",
        "config.yaml",
    ):
        assert (output / name).stat().st_size > 0
    assert (output / "samples" / "contact_sheet.png").is_file()
    assert torch.load(output / "generated_samples.pt", weights_only=True).shape == (2, 3, 5, 32, 32)
    assert torch.load(output / "target_samples.pt", weights_only=True).shape == (2, 3, 5, 32, 32)
    assert json.loads((output / "summary.json").read_text())["step"] == 6
    from stdit import STDiTPipeline

    pipe = STDiTPipeline.from_pretrained("models/t")
    assert pipe.scheduler.config.shift == 4
    clips = pipe(class_labels=["circle left"], num_inference_steps=2, progress=False)
    assert clips.shape == (1, 3, 5, 32, 32)
    assert len(list_checkpoints(home / "checkpoints" / "t")) == 2


@pytest.mark.parametrize(
    "extra",
    [
        ["train.optimizer=muon"],
        ["train.optimizer=adamw"],
        ["train.optimizer=adamw", "objective.name=ddpm"],
        ["train.optimizer=muon", "objective.mask_strategy=per_frame", "train.micro_batch=2"],
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(home, extra):
    extra = [*extra, "train.samples=0"]
    assert go("name=whole", *extra) == 0
    for steps in (2, 5, 6):  # stopped between checkpoints and at one
        assert go("name=parts", f"train.steps={steps}", *extra) == 0
    assert_same_run("whole", "parts", 6)


def test_workers_and_micro_batches_do_not_change_a_run(home):
    assert go("name=a", "train.samples=0") == 0
    assert go("name=b", "train.samples=0", "train.steps=3", "data.workers=2") == 0
    assert go("name=b", "train.samples=0", "data.workers=2") == 0
    assert_same_run("a", "b", 6)


def test_a_signal_finishes_the_step_saves_and_exits_with_128_and_its_number(home, monkeypatch):
    import stdit.training.fit as fit

    monkeypatch.setattr(MetricsLogger, "curves", lambda self, last=False: None)  # not what is tested here
    assert go("name=whole", "train.steps=5", "train.samples=0", "train.decay_steps=50") == 0
    real = fit.to_latents
    endless = ["train.steps=4000", "train.samples=0", "train.decay_steps=50", "train.checkpoint_every=100000"]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):

        def interrupted(batch, vae, number=number):
            if batch.keys[0][1] == 4:
                os.kill(os.getpid(), number)
            return real(batch, vae)

        monkeypatch.setattr(fit, "to_latents", interrupted)
        assert go(f"name={number.name}", *endless) == 128 + number
        [saved] = list_checkpoints(home / "checkpoints" / number.name)
        assert saved.name == "step-5" and damage(saved) is None
        assert json.loads((home / "output" / number.name / "summary.json").read_text())["step"] == 5
        assert losses(number.name) == losses("whole")


def test_a_process_whose_launcher_is_gone_says_so_saves_and_stops_as_after_sigterm(home, monkeypatch, capfd):
    import stdit.training.fit as fit

    real, parent = fit.to_latents, [os.getppid()]

    def left(batch, vae):
        if batch.keys[0][1] == 4:
            parent[0] = 1
        return real(batch, vae)

    monkeypatch.setattr(fit, "to_latents", left)
    monkeypatch.setattr(os, "getppid", lambda: parent[0])
    settings = ["train.samples=0", "train.checkpoint_every=100000"]
    assert go("name=alone", *settings) == 0  # no launcher: a shell that ends leaves its command to go on
    parent[0] = signals._PARENT
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "0")
    assert go("name=left", *settings) == 128 + signal.SIGTERM
    [saved] = list_checkpoints(home / "checkpoints/left")
    assert saved.name == "step-5" and damage(saved) is None
    assert capfd.readouterr().err.count("the launcher of this process is gone") == 1


@pytest.mark.slow
def test_a_signal_to_the_group_of_a_launcher_with_loader_processes_saves_the_run(home):
    (home / "clips").mkdir()
    for i in range(4):
        write_barcodes(home / "clips" / f"{i}.mp4", 8)
    settings = ["data.root=clips", "data.source=videos", "data.workers=1", "train.steps=100000", "train.decay_steps=null",
                "train.checkpoint_every=100000", "train.preview_every=100000", "train.log_every=1"]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "stdit", "train"]
    process = subprocess.Popen(
        [sys.executable, *launcher, "t.yaml", *settings], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    record = home / "output/t/training_metrics.csv"
    while not record.is_file() or record.read_text().count("\n") < 4:
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.1)
    assert list_checkpoints(home / "checkpoints/t") == []
    os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=90)[0]
    assert process.returncode
    [saved] = list_checkpoints(home / "checkpoints/t")
    assert damage(saved) is None and f"stopped at {saved.name.replace('-', ' ')}, and saved" in said
    assert len(losses("t")) == int(saved.name.removeprefix("step-"))


def test_a_non_finite_step_is_never_applied(home, monkeypatch):
    import stdit.training.fit as fit

    real = fit.diffusion_losses

    def poisoned(model, objective, clips, conditions, keys, **options):
        result = real(model, objective, clips, conditions, keys, **options)
        return result._replace(clips=result.clips * float("nan")) if keys[0][1] == 3 else result

    assert go("name=clean", "train.steps=3", "train.samples=0") == 0
    monkeypatch.setattr(fit, "diffusion_losses", poisoned)
    assert go("name=bad", "train.steps=5", "train.samples=0", "train.checkpoint_every=1") == 0
    before, after = tensors("clean", 3), tensors("bad", 4)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((home / "output/bad/summary.json").read_text())["skipped_steps"] == 1


def test_a_run_whose_last_step_was_skipped_is_not_finished(home, monkeypatch, capsys):
    import stdit.training.fit as fit

    real = fit.diffusion_losses

    def poisoned(model, objective, clips, conditions, keys, **options):
        result = real(model, objective, clips, conditions, keys, **options)
        return result._replace(clips=result.clips * float("nan")) if keys[0][1] == 3 else result

    monkeypatch.setattr(fit, "diffusion_losses", poisoned)
    assert go("train.steps=4", "train.samples=0", "train.checkpoint_every=3") == 1
    assert "not finished" in capsys.readouterr().err
    assert not (home / "models" / "t").exists()
    assert list_checkpoints(home / "checkpoints" / "t")[0].name == "step-3"


def test_non_finite_weights_are_never_saved(home, monkeypatch, capsys):
    import stdit.training.fit as fit

    assert go("train.steps=3", "train.samples=0") == 0
    real = fit.TrainingLoop._one_step

    def broken(self, *args):
        measured = real(self, *args)
        if self.step == 5:
            next(self.model.parameters()).data[0] = float("inf")
        return measured

    monkeypatch.setattr(fit.TrainingLoop, "_one_step", broken)
    assert go("train.steps=6", "train.samples=0") == 1
    assert "not finite in" in capsys.readouterr().err
    assert [path.name for path in list_checkpoints(home / "checkpoints" / "t")] == ["step-3"]


def test_a_preview_that_fails_does_not_end_the_run(home, monkeypatch, capsys):
    import stdit.recipes.train as recipe

    def broken(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(recipe, "preview", broken)
    assert go("train.steps=6", "train.samples=0", "train.preview_every=2") == 0
    assert "the preview of step 2 failed (CUDA out of memory.); training goes on" in capsys.readouterr().err


def test_a_command_that_resumes_from_a_checkpoint_resumes_its_own_run_when_repeated(home, capsys):
    options = ["train.samples=0", "train.checkpoint_every=2"]
    assert go("train.steps=2", *options) == 0
    (home / "checkpoints/t/step-2").rename(home / "start")
    (home / "start").rename(home / "step-2")
    assert go("train.steps=4", "train.resume=step-2", *options) == 0
    capsys.readouterr()
    assert go("train.steps=6", "train.resume=step-2", *options) == 0
    assert "resumed from checkpoints/t/step-4" in capsys.readouterr().out


def test_a_command_that_resumes_from_its_own_checkpoint_resumes_after_that_was_removed(home, capsys):
    options = ["train.samples=0", "train.checkpoint_every=2"]
    again = "train.resume=checkpoints/t/step-2"
    assert go("train.steps=2", *options) == 0
    assert go("train.steps=6", again, *options) == 0
    assert [path.name for path in list_checkpoints(home / "checkpoints" / "t")] == ["step-6", "step-4"]
    capsys.readouterr()
    assert go("train.steps=7", "train.resume=checkpoints/t/step-3", *options) == 1  # from which nothing went on
    assert "train.resume='checkpoints/t/step-3' is damaged or not a checkpoint" in capsys.readouterr().err
    assert go("train.steps=8", again, *options) == 0
    assert "resumed from checkpoints/t/step-6" in capsys.readouterr().out
    assert go("name=whole", "train.steps=8", *options) == 0
    assert_same_run("whole", "t", 8)


def test_resuming_from_an_older_checkpoint_keeps_the_newer_ones(home, capsys):
    options = ["train.samples=0", "train.checkpoint_every=2"]
    assert go("train.steps=6", "train.keep_checkpoints=3", *options) == 0
    assert go("train.steps=4", "train.resume=checkpoints/t/step-2", *options) == 0
    assert [path.name for path in list_checkpoints(home / "checkpoints" / "t")] == ["step-4", "step-2"]
    assert sorted(path.name for path in (home / "checkpoints/t.before-1").iterdir()) == ["step-4", "step-6"]
    assert "t.before-1" in capsys.readouterr().err


def test_starting_again_keeps_samples_and_model_of_the_previous_run(home):
    assert go("train.steps=3", "train.samples=1") == 0
    assert go("train.steps=3", "train.samples=1", "train.resume=never") == 0
    for kind, file in (
        ("output", "samples/contact_sheet.png"),
        ("models", "model_index.json"),
        ("checkpoints", "step-3"),
    ):
        assert (home / kind / "t" / file).exists() and (home / kind / "t.before-1" / file).exists()


def test_too_many_bad_steps_stop_the_run_in_one_line(home, monkeypatch, capsys):
    import stdit.training.fit as fit

    real = fit.diffusion_losses
    monkeypatch.setattr(
        fit, "diffusion_losses", lambda *a, **k: (r := real(*a, **k))._replace(clips=r.clips * float("inf"))
    )
    assert go("train.max_skipped=2") == 1
    assert "2 steps in a row" in capsys.readouterr().err


def test_a_changed_config_does_not_resume_silently(home, capsys):
    assert go("train.samples=0", "train.steps=3") == 0
    assert go("train.samples=0", "train.lr=0.5") == 1
    assert "train.lr: 0.001 -> 0.5" in capsys.readouterr().err
    assert go("train.samples=0", "train.lr=0.5", "train.allow_changes=true") == 0
    assert go("train.samples=0", "train.steps=1", "train.resume=never") == 0
    assert (home / "checkpoints" / "t.before-1" / "step-6").is_dir()


def start(**options) -> STDiT:
    """A model that a run of `FLOW_MAP` can start from, unless the options are others."""
    fits = {
        "in_channels": 16, "num_classes": 12, "depth": 1, "hidden_size": 16, "num_heads": 2, "axes": ["joint"],
        "sample_size": (2, 4, 4), "patch_size": (1, 2, 2), "learn_sigma": False,
    }  # fmt: skip
    return STDiT(**{**fits, **options})


FLOW_MAP = ["train.samples=0", "train.guidance=1", "train.steps=1", "objective.flow_map=true", "objective.mask_strategy=shared",
            "model.depth=1", "model.hidden_size=16", "model.axes=[joint]"]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "index", "overrides", "message"),
    [
        ({"learn_sigma": True}, {}, (), "was trained with ddpm, whose output is no velocity"),
        ({}, {"objective": "ddpm"}, (), "was trained with ddpm, whose output is no velocity"),
        ({}, {"objective": "flow", "vae_fingerprint": "another"}, (), "vae.name='tiny' has other weights than the VAE of"),
        ({"flow_map": True, "distilled_guidance": 2.0}, {}, (),
         "objective.distilled_guidance=1, but the model of init_from.path='m' was trained with 2; set objective.distilled_guidance=2"),
        ({"flow_map": True, "distilled_guidance": 1.0000001}, {}, (),
         "objective.distilled_guidance=1, but the model of init_from.path='m' was trained with 1.0000001; set objective.distilled_guidance=1.0000001"),
        ({"flow_map": True}, {}, ["objective.flow_map=false"], "is a flow map, which learns where its steps end; set objective."),
    ],
)  # fmt: skip
def test_a_start_from_which_no_flow_map_can_learn_is_refused(home, capsys, model, index, overrides, message):
    start(**model).save_pretrained("m/transformer")
    (home / "m/model_index.json").write_text(json.dumps(index))
    assert go("init_from.path=m", *FLOW_MAP, *overrides) == 1
    assert message in capsys.readouterr().err
    assert not Path("output/t/training_metrics.csv").exists()


@pytest.mark.parametrize("path", ["m", "m/transformer"])
def test_the_vae_that_a_refusal_advises_is_there(home, capsys, path):
    start().save_pretrained("m/transformer")
    (home / "m/model_index.json").write_text(json.dumps({"vae_fingerprint": "another"}))
    assert go(f"init_from.path={path}", *FLOW_MAP) == 1
    assert "set vae.name to the VAE that it was trained with, which is not in 'm'." in capsys.readouterr().err
    (home / "m/vae").mkdir()
    assert go(f"init_from.path={path}", *FLOW_MAP) == 1
    assert "set vae.name to 'm/vae', or to the VAE that it was trained with." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "overrides", "message"),
    [
        ({"num_classes": 0}, [], "takes no 'label'; set model.num_classes=0."),
        ({"num_classes": 5}, [], "has 5 classes, but this run 12; leave out clips of further classes, or go without labels"),
        ({"num_classes": 5}, ["init_from.classes=replace"], "has 5 classes, but this run 12; leave out"),
        ({"num_classes": 20}, ["init_from.classes=replace"], "has 20 classes, but this run 12; set model.num_classes=20, or"),
        ({"class_names": [*CLASS_NAMES[1:], CLASS_NAMES[0]]}, [], f"calls class 0 {CLASS_NAMES[1]!r}, but the data calls it {CLASS_NAMES[0]!r}; number the classes as it does (stdit info m --labels)"),
        ({"class_names": ["word", *CLASS_NAMES[2:], CLASS_NAMES[1]]}, [], f"calls class 1 {CLASS_NAMES[2]!r}, but the data calls it {CLASS_NAMES[1]!r}"),
        ({"num_classes": 20, "class_names": [*map(str, range(10)), *CLASS_NAMES[:10]]}, ["model.num_classes=20"], "calls class 0 '0', but the data"),
        ({}, ["model.micro_conditions=[fps]"], "takes no 'micro'; set model.micro_conditions=[]."),
        ({}, ["model.extra_conditions={camera: {}}"], "takes no 'camera'; leave model.extra_conditions.camera out."),
        ({}, ["text.encoder=words"], "takes no 'caption'; set text.encoder=null."),
    ],
)  # fmt: skip
def test_a_teacher_of_other_conditions_or_classes_is_refused_before_captions_are_encoded(
    home, capsys, monkeypatch, model, overrides, message
):
    class Camera(LearntGuidance):
        name, keywords = "camera", ("camera",)

        def __init__(self):
            super().__init__({"cfg": 2.0})

    monkeypatch.setitem(CONDITIONERS, "camera", Camera)
    monkeypatch.setattr(train, "build_captions", None)
    start(**model).save_pretrained("m")
    assert go("init_from.path=m", *FLOW_MAP, *overrides) == 1
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said


@pytest.mark.parametrize(
    ("model", "override"),
    [
        ({"num_classes": 20}, "model.num_classes=20"),
        ({"num_classes": 5, "class_names": [*"abcde"]}, "model.num_classes=0"),
        ({"class_names": list(CLASS_NAMES)}, "model.num_classes=null"),
    ],
)
def test_a_flow_map_has_the_classes_of_its_teacher_or_none(home, model, override):
    start(**model).save_pretrained("m")
    assert go("init_from.path=m", *FLOW_MAP, override) == 0


def test_a_flow_map_of_a_larger_table_has_the_names_of_its_teacher(home):
    names = [*CLASS_NAMES, *(f"class {i}" for i in range(12, 20))]
    start(num_classes=20, class_names=names).save_pretrained("m")
    assert go("init_from.path=m", *FLOW_MAP, "model.num_classes=20") == 0
    assert json.loads((home / "models/t/transformer/config.json").read_text())["class_names"] == names


def test_a_teacher_whose_classes_have_other_words_is_a_warning_and_a_run_that_had_begun_goes_on(home, monkeypatch):
    start(class_names=[f"a {name}" for name in CLASS_NAMES]).save_pretrained("words")
    with pytest.warns(
        UserWarning, match=f"class 0 is {CLASS_NAMES[0]!r} in the data, and 'a {CLASS_NAMES[0]}' in the model"
    ):
        assert go("init_from.path=words", *FLOW_MAP) == 0
    start(num_classes=20).save_pretrained("m")
    with monkeypatch.context() as earlier:
        earlier.setattr(train, "check_same_conditions", lambda *args: None)
        assert go("init_from.path=m", *FLOW_MAP, "init_from.classes=replace", "name=before") == 0
    assert go("init_from.path=m", *FLOW_MAP, "init_from.classes=replace", "name=before", "train.steps=4") == 0


def test_a_flow_map_learns_on_at_the_scale_that_it_has_learnt(home):
    start(flow_map=True, distilled_guidance=2.0).save_pretrained("m")
    assert go("init_from.path=m", *FLOW_MAP, "objective.distilled_guidance=2") == 0


def test_a_flow_map_does_not_go_on_with_another_teacher_silently(home, capsys):
    teacher = start()
    teacher.save_pretrained("one")
    teacher.save_pretrained("moved")
    with torch.no_grad():
        next(teacher.parameters()).add_(0.1)
    teacher.save_pretrained("other")
    assert go("init_from.path=one", *FLOW_MAP) == 0
    assert go("init_from.path=other", *FLOW_MAP) == 1
    assert "teacher_fingerprint: " in capsys.readouterr().err
    assert go("init_from.path=moved", *FLOW_MAP) == 0


def test_a_flow_map_trains_from_scratch_and_its_model_samples_in_two_steps(home):
    assert go("objective.flow_map=true", "objective.mask_strategy=mixed", "train.guidance=1", "train.samples=0") == 0
    assert all(math.isfinite(float(row[1])) for row in losses("t")) and len(losses("t")) == 6
    moved = tensors("t", 6)["model/r_embedder.mlp.2.weight"]  # zero where it is fresh
    assert moved.abs().max() > 0
    pipe = STDiTPipeline.from_pretrained(home / "models/t")
    given = {"num_inference_steps": 2, "progress": False}
    few, euler = (pipe(1, solver=solver, **given) for solver in (None, "euler"))
    assert few.shape == (1, 3, 5, 32, 32) and torch.isfinite(few).all() and not torch.equal(few, euler)
    assert torch.equal(few, pipe(1, solver="flow_map", **given))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.holdout=0.99", "leaves no clip to train on"),
        ("train.parallel.context=2", "does not divide 1 process"),
        ("name=busy", "output/busy is in use"),
    ],
)
def test_what_needs_no_captions_is_refused_before_they_are_encoded(home, monkeypatch, capsys, override, message):
    def encoded(*args, **options):
        raise AssertionError("captions were encoded")

    monkeypatch.setattr(train, "build_captions", encoded)
    holder = RunFolders("busy")
    holder.lock()
    assert go(override, "text.encoder=words") == 1
    assert message in capsys.readouterr().err
    holder.unlock()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=0.5", "train.lr: 0.001 -> 0.5"),
        ("train.resume=checkpoints/t/step-1", "is damaged or not a checkpoint"),
        ("train.steps=2", "No undamaged checkpoint"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_captions_are_encoded(
    home, monkeypatch, capsys, override, message
):
    assert go("train.steps=1", "train.samples=0") == 0
    if "lr" not in override:
        (home / "checkpoints/t/step-1/info.json").write_text("{}")

    def encoded(*args, **options):
        raise AssertionError("captions were encoded")

    monkeypatch.setattr(train, "build_captions", encoded)
    assert go(override) == 1
    assert message in capsys.readouterr().err


def test_a_run_that_cannot_start_again_leaves_the_earlier_one_in_its_place(home, capsys):
    assert go("train.steps=1", "train.samples=0") == 0
    assert go("train.resume=never", "model.num_classes=3") == 1
    assert "the data has labels up to 11" in capsys.readouterr().err
    assert (home / "checkpoints/t/step-1").is_dir() and not (home / "checkpoints/t.before-1").exists()


def test_two_runs_do_not_share_a_folder(home, capsys):
    holder = RunFolders("t")
    holder.lock()
    assert go() == 1
    assert f"output/t is in use by process {os.getpid()}" in capsys.readouterr().err
    holder.unlock()
    assert go("train.steps=1", "train.samples=0") == 0


def test_a_full_disk_ends_in_one_line_and_the_run_resumes_when_there_is_space(home, capsys, monkeypatch):
    import stdit.training.state as state

    assert go("train.steps=3", "train.samples=0") == 0
    real = state.save_file

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "save_file", full)
    assert go("train.samples=0") == 1
    error = capsys.readouterr().err
    assert "No space left" in error
    assert "earlier checkpoints are untouched" in error
    monkeypatch.setattr(state, "save_file", real)
    assert go("train.samples=0") == 0
    assert go("name=whole", "train.samples=0") == 0
    assert_same_run("whole", "t", 6)


def test_unreadable_files_are_named_in_the_summary_and_too_many_stop_the_run(home, capsys):
    (home / "clips").mkdir()
    for i in range(5):
        write_barcodes(home / "clips" / f"{i}.mp4", 8)
    (home / "clips" / "bad.mp4").write_bytes(b"broken")
    clips = ["data.root=clips", "data.source=videos", "train.steps=4", "train.samples=0"]
    assert go(*clips, "data.max_bad_fraction=0.2") == 0
    assert list(json.loads((home / "output/t/summary.json").read_text())["unreadable_files"]) == ["clips/bad.mp4"]
    assert go(*clips, "name=strict", "data.max_bad_fraction=0.1") == 1
    assert "1 of 6 files cannot be read, more than data.max_bad_fraction=0.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.lrr=1"], "train.lrr: Unknown key 'lrr'. Did you mean 'lr'?"),
        (["train.lr=fast"], "'fast'"),
        (["train.steps"], "is not an override; write key=value"),
        (
            ["data.height=40", "data.width=40"],
            "height=40 gives 5 latents, which patches of 2 do not divide. Use 32 or 48",
        ),
        (["data.height=33", "data.width=33"], "Use 32 or 40"),
        (["data.num_frames=6"], "Use 5 or 9"),
        (["data.num_frames=-1"], "data.num_frames must be >= 1, got -1"),
        (["train.batch_size=0"], "train.batch_size must be >= 1, got 0"),
        (["train.batch_size=5", "train.micro_batch=2"], "train.batch_size=5 is not a multiple"),
        (["model.num_classes=3"], "the data has labels up to 11"),
        (["data.source=videos", "data.root=none"], "data.root='none' does not exist"),
        (["data.source=videos", "data.root=empty"], "holds no videos"),
        (["data.source=videos", "data.manifest=none.csv"], "data.manifest='none.csv' does not exist"),
        (["data.source=latents", "data.root=empty"], "holds no cached latents"),
        (["vae.name=tinny"], "vae.name 'tinny' is not a folder"),
        (["name=../x"], "is not a folder name"),
        (["train.resume=elsewhere"], "holds no checkpoints"),
        (["model.axes=[spacial]"], "'spacial'"),
        (["model.caption_axes=[spacial]", "text.encoder=words"], "Did you mean 'spatial'?"),
        (["model.micro_conditions=[fsp]"], "Did you mean 'fps'?"),
        (["model.extra_conditions={label: {}}"], "which other config keys turn on"),
        (["model.extra_conditions={camra: {}}"], "Unknown condition in model.extra_conditions 'camra'"),
        (["model.trunk=joint", "model.time_entry=rotary", "model.position_encoding=rope"], "two names of one setting"),
        (["model.activation=gelu_tan"], "Unknown model.activation 'gelu_tan'. Did you mean 'gelu_tanh'?"),
        (["model.trunk=stak"], "Did you mean 'stack'?"),
        (["model.position_encoding=rop"], "Unknown model.position_encoding 'rop'. Did you mean 'rope'?"),
        (["text.encoder=wrds"], "'wrds'"),
        (["objective.name=edm"], "edm"),
        (["name=${oc.env:HOME}"], "interpolation"),
        (["train.keep_checkpoints=1"], "train.keep_checkpoints must be >= 2, got 1"),
    ],
)
def test_bad_settings_end_in_one_line_before_training(home, capsys, overrides, message):
    (home / "empty").mkdir()
    assert go(*overrides) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not list(home.glob("checkpoints/*/step-*"))


def test_the_error_for_a_missing_config_lists_the_available_ones(home, capsys):
    (home / "configs").mkdir()
    (home / "configs" / "real.yaml").touch()
    assert train.run(["configs/none.yaml"]) == 1
    assert "there are: configs/real.yaml" in capsys.readouterr().err


def test_a_read_only_output_folder_is_refused_before_training(home, capsys):
    (home / "output").write_text("a file where the folder should be")
    assert go() == 1
    assert "cannot be written" in capsys.readouterr().err


def test_latents_of_another_vae_are_refused(home, capsys):
    from stdit.recipes import cache_latents

    assert cache_latents.main(["t.yaml", "--output", "latents"]) == 0
    assert go("data.source=latents", "data.root=latents", "train.steps=2", "train.samples=0") == 0
    info = json.loads((home / "latents/cache.json").read_text())
    (home / "latents/cache.json").write_text(json.dumps({**info, "vae_fingerprint": "0" * 16}))
    assert go("data.source=latents", "data.root=latents", "name=other") == 1
    assert "were made with VAE 'tiny', whose weights differ" in capsys.readouterr().err
    assert go("data.source=latents", "data.root=latents", "data.num_frames=9", "name=other") == 1
    assert "cache again" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["model.trunk=dual_stream", "text.encoder=words"],
        ["model.trunk=masked", "model.depth=3", "model.num_decoder_blocks=1", "objective.mask_ratio=0.3"],
    ],
    ids=["stack", "joint", "masked"],
)
def test_one_and_two_processes_agree_on_the_loss(home, extra):
    assert go("name=one", "train.samples=0", "train.steps=5", *extra) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517", str(ROOT / "tools/train.py"),
               "t.yaml", "name=two", "train.samples=0", "train.steps=5", *extra]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[:3000]
    for a, b in zip(losses("one"), losses("two"), strict=True):
        assert float(a[1]) == pytest.approx(float(b[1]), rel=1e-6)


def test_a_rate_that_reaches_zero_before_the_end_is_said(home, capsys):
    assert go("train.steps=4", "train.decay_steps=2", "train.samples=0") == 0
    assert "train.steps=4 goes beyond train.decay_steps=2" in capsys.readouterr().out


@pytest.mark.parametrize("free", ["model.label_std=0.3", "objective.sampling_shift=4"])
def test_a_run_goes_on_with_another_setting_that_changes_no_step(home, free):
    assert go("train.steps=1", "train.samples=0", free) == 0
    assert go("train.steps=2", "train.samples=0") == 0


def test_a_schedule_that_a_lora_could_not_keep_is_refused(home, capsys):
    assert go("train.lora.rank=2", "init_from.path=models/t", "objective.sampling_shift=4") == 1
    assert "leave it out, and sample with --shift" in capsys.readouterr().err


def test_data_beside_a_config_that_draws_its_clips_is_refused(home, capsys):
    assert go("--data", str(home)) == 1
    assert "has no effect with data.source=shapes" in capsys.readouterr().err

"""`stdit train` with train.lora.rank: only the matrices are trained, a run resumes, and its LoRA is sampled and merged."""

import csv
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stdit.config import Config, load_typed
from stdit.data.shapes import CLASS_NAMES
from stdit.data.video_write import write_video
from stdit.hub import LORA_FILE
from stdit.model.lora import load_lora, lora_tensors
from stdit.model.stdit import STDiT
from stdit.nn.checkpointing import CHECKPOINTING
from stdit.nn.low_rank import is_low_rank
from stdit.recipes import export, sample, train
from stdit.recipes.adapters import _compare_clips, add_loras
from stdit.recipes.models import load_pipeline
from stdit.sampling.pipeline import STDiTPipeline
from stdit.training.metrics import MetricsLogger

CONFIG = """
data: {source: shapes, num_frames: 5, height: 32, width: 32, num_shapes: 24, workers: 0}
model: {size: S/2, depth: 2, hidden_size: 32, num_heads: 2}
train: {steps: 4, batch_size: 4, lr: 1.0e-2, ema_decay: 0.9, checkpoint_every: 2, samples: 0, precision: fp32}
"""
LORA = ["train.lora.rank=4", "init_from.path=models/base"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(MetricsLogger, "curves", lambda *args, **options: None)  # a drawing takes longer than the run
        (folder / "t.yaml").write_text("name: t\n" + CONFIG)
        assert go("name=base", "train.steps=2", "train.guide_step=1") == 0
        assert go("name=whole", *LORA) == 0
    return folder


@pytest.fixture(autouse=True)
def home(trained, monkeypatch):
    monkeypatch.chdir(trained)
    monkeypatch.setattr(MetricsLogger, "curves", lambda *args, **options: None)  # a drawing takes longer than the run
    return trained


def go(*overrides: str) -> int:
    return train.run(["t.yaml", *overrides])


def losses(name: str) -> list[tuple]:
    with open(f"output/{name}/training_metrics.csv", newline="") as stream:
        return [tuple(row[key] for key in ("step", "loss", "lr", "grad_norm")) for row in csv.DictReader(stream)]


def state(name: str, step: int) -> dict[str, torch.Tensor]:
    files = Path(f"checkpoints/{name}/step-{step}").glob("*.safetensors")
    return {f"{file.stem}/{key}": value for file in files for key, value in load_file(file).items()}


def equal_files(a: str, b: str) -> bool:
    one, two = (load_file(Path(folder, LORA_FILE)) for folder in (a, b))
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def clips(pipe) -> torch.Tensor:
    return pipe(class_labels=[0, 5], num_inference_steps=2, progress=False)


def test_only_the_matrices_are_trained_and_kept(trained):
    kept = load_file("checkpoints/whole/step-4/model.safetensors")
    assert kept and all(is_low_rank(name) for name in kept)
    assert kept.keys() == load_file("checkpoints/whole/step-4/ema.safetensors").keys()
    assert all(value.any() for name, value in kept.items() if "lora_B" in name)
    pipe = load_pipeline("checkpoints/whole")
    base = STDiTPipeline.from_pretrained("models/base").transformer.state_dict()
    found = pipe.transformer.state_dict()
    assert all(torch.equal(found[name], value) for name, value in base.items())


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(trained):
    for steps in (3, 4):
        assert go("name=parts", *LORA, f"train.steps={steps}") == 0
    one, two = state("whole", 4), state("parts", 4)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert losses("whole") == losses("parts")
    assert equal_files("models/whole", "models/parts")


def test_the_lora_is_that_of_the_checkpoint_and_an_export_writes_it_again(trained, capsys):
    averaged = lora_tensors(load_pipeline("checkpoints/whole").transformer, "default")
    written = load_file(f"models/whole/{LORA_FILE}")
    assert {f"transformer.{key}" for key in averaged} == written.keys()
    assert all(torch.equal(written[f"transformer.{key}"], value) for key, value in averaged.items())
    assert export.main(["whole", "--output", "again"]) == 0
    assert "averaged weights of the LoRA" in capsys.readouterr().out
    assert equal_files("again", "models/whole")
    shutil.rmtree("again")


def test_sampling_with_loras_is_sampling_from_the_merged_model(trained):
    loras = ["--lora", "models/whole:3", f"models/whole/{LORA_FILE}:0.5"]
    assert export.main(["models/base", *loras, "--output", "merged"]) == 0
    common = ["--class-label", "0", "--seed", "0", "--steps", "2", "--output"]
    for name, extra in (("plain", []), ("lora", loras), ("off", ["--lora", "models/whole:0"])):
        assert sample.main(["--model", "models/base", *extra, *common, f"{name}.png", "--frames", "1"]) == 0
    assert sample.main(["--model", "merged", *common, "merged.png", "--frames", "1"]) == 0
    pictures = {name: Path(f"{name}.png").read_bytes() for name in ("plain", "lora", "off", "merged")}
    assert pictures["off"] == pictures["plain"] != pictures["lora"]
    pipe, merged = (load_pipeline(name) for name in ("models/base", "merged"))
    assert merged.guide is not None and not torch.equal(clips(pipe), clips(merged))
    shutil.rmtree("merged")


def test_the_pipeline_loads_what_training_wrote(trained):
    pytest.importorskip("peft")
    ours, theirs = load_pipeline("models/base"), load_pipeline("models/base")
    add_loras(ours, ["models/whole"])
    theirs.load_lora_weights("models/whole")
    torch.testing.assert_close(clips(theirs), clips(ours), atol=1e-4, rtol=1e-4)
    assert not torch.equal(clips(ours), clips(load_pipeline("models/base")))


def test_classes_of_the_data_are_those_of_the_model_by_their_names(trained, capsys):
    from stdit.config import Config, load_typed
    from stdit.recipes.train import build_accelerator, build_run

    clip = torch.zeros(3, 5, 32, 32)
    for name in (CLASS_NAMES[7], CLASS_NAMES[2]):
        Path("own", name).mkdir(parents=True, exist_ok=True)
        write_video(Path("own", name, "a.mp4"), clip)
    config = load_typed(Config, "t.yaml", ["name=own", *LORA, "data.source=videos", "data.root=own"])
    built = build_run(config, build_accelerator("fp32"))
    built.trainer.folders.unlock()
    assert sorted(built.dataset.record(i)["label"] for i in range(2)) == [2, 7]
    Path("own", "hexagon up").mkdir()
    shutil.copy(Path("own", CLASS_NAMES[2], "a.mp4"), Path("own", "hexagon up", "a.mp4"))
    assert go("name=own", *LORA, "data.source=videos", "data.root=own") == 1
    error = capsys.readouterr().err.strip()
    assert "class label 'hexagon up' is unknown" in error and "A LoRA adds no classes" in error and "\n" not in error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.lora.rank=4"], "there is none; set init_from.path"),
        (["train.lora.alpha=4"], "have no effect without train.lora.rank"),
        ([*LORA, "train.guide_step=2"], "set train.guide_step=null"),
        ([*LORA, "train.average_lengths=[0.1]"], "set train.average_lengths=[]"),
        ([*LORA, "train.parallel.shard=fsdp"], "set train.parallel.shard=none"),
        ([*LORA, "init_from.classes=replace"], "leave out the other keys of init_from"),
        ([*LORA, "objective.name=ddpm"], "objective.name=ddpm, but the model of init_from.path='models/base' was trained with flow"),
        ([*LORA, "text.encoder=words"], "takes no captions, but text.encoder gives"),
        ([*LORA, "train.lora.layers=x"], "matches no linear layer"),
        (["train.lora.rank=99", LORA[1]], "a LoRA of rank 99 is wider"),
        (["train.lora.rank=4", "init_from.path=models/whole"], "init_from.path='models/whole' is a LoRA; give its model"),
    ],
)  # fmt: skip
def test_what_a_lora_cannot_be_is_said_in_one_line_before_training(overrides, message, capsys):
    assert go("name=bad", *overrides) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not Path("checkpoints/bad").exists() or not list(Path("checkpoints/bad").glob("step-*"))


def test_a_run_does_not_resume_on_another_base(trained, capsys):
    shutil.copytree("models/base", "models/other")
    pipe = STDiTPipeline.from_pretrained("models/other")
    torch.nn.init.normal_(pipe.transformer.blocks[0].mlp.fc1.weight)
    pipe.save_pretrained("models/other")
    assert go("name=whole", LORA[0], "init_from.path=models/other", "train.steps=6") == 1
    assert "base_fingerprint" in capsys.readouterr().err


def test_an_export_after_the_base_was_trained_again_warns_and_keeps_what_the_lora_is_for(trained):
    shutil.copytree("models/base", "models/former")
    try:
        pipe = STDiTPipeline.from_pretrained("models/base")
        torch.nn.init.normal_(pipe.transformer.blocks[0].mlp.fc1.weight)
        pipe.save_pretrained("models/base")
        with pytest.warns(UserWarning, match=r"trained on other weights than those of init_from.path='models/base'"):
            assert export.main(["whole", "--output", "late"]) == 0
        with pytest.warns(UserWarning, match=r"late was trained on other weights \(models/base\)"):
            load_lora(pipe.transformer, "late")
    finally:
        shutil.rmtree("models/base")
        Path("models/former").rename("models/base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_lora(load_pipeline("models/base").transformer, "late")
    shutil.rmtree("late")


def test_a_lora_that_is_given_as_a_model_is_refused(trained):
    with pytest.raises(ValueError, match="models/whole is a LoRA; give its model as --model, and --lora models/whole"):
        load_pipeline("models/whole")
    with pytest.raises(ValueError, match="there is no LoRA 'models/none'"):
        sample.main(["--model", "models/base", "--lora", "models/none"])


def test_clips_of_another_rate_than_the_models_are_named_and_of_the_same_are_not(recwarn):
    config = load_typed(Config, "t.yaml", ["init_from.path=models/base"])
    _compare_clips(config, 8.0)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"as in its training: data.fps=8\.$"):
        _compare_clips(config, 4.0)


def test_a_lora_keeps_the_kind_of_checkpointing_that_its_config_names(home, monkeypatch):
    chosen = []
    monkeypatch.setattr(STDiT, "enable_gradient_checkpointing", lambda self, how=None: chosen.append(how))
    assert go("name=kinds", *LORA, "train.steps=1", "train.samples=0", "model.gradient_checkpointing=selective") == 0
    assert chosen == [CHECKPOINTING["selective"]]

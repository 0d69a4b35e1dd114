"""Checkpoints, models and latents that version 0.1.0 wrote load, resume and give the same output."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden.record import recorded_here
from safetensors.torch import load_file

from stdit import STDiT, STDiTPipeline
from stdit.config import Config, load_typed, to_plain
from stdit.recipes import train
from stdit.recipes.models import config_of
from stdit.training.state import read_checkpoint
from stdit.training.vae import VAEConfig

HERE = Path(__file__).parent / "compat"
EXPECTED = load_file(HERE / "expected.safetensors")
RECORD = json.loads((HERE / "expected.json").read_text())
TOLERANCE = 0 if recorded_here() else 1e-4


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folders of a user, in which every pipeline has its VAE."""
    folder = tmp_path_factory.mktemp("compat") / "home"
    shutil.copytree(HERE, folder)
    for model in (folder / "models").iterdir():
        shutil.copytree(HERE / "vae", model / "vae")
    return folder


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours.float() - theirs.float()).abs().max()) <= TOLERANCE * float(theirs.float().abs().max())


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", RECORD["runs"])
def test_an_exported_model_gives_the_same_output_as_in_version_0_1(home, name):
    model = STDiT.from_pretrained(home / "models" / name)
    torch.manual_seed(1)
    x = torch.randn(2, 4, 3 if name == "causal" else 5, 8, 8)
    captions = {"captions": torch.randn(2, 3, 64), "caption_mask": torch.tensor([[True, True, False], [True] * 3])}
    frames = 1 if name == "causal" else x.shape[2]
    given = captions if model.config.caption_channels else {"class_labels": torch.tensor([0, 1])}
    with torch.no_grad():
        made = model(x[:, :, :frames], torch.rand(2, frames) * 999, **given)
    assert_close(made, EXPECTED[f"{name}.forward"])

    pipe = STDiTPipeline.from_pretrained(str(home / "models" / name))
    given = {"captions": "a red circle"} if model.config.caption_channels else {"class_labels": ["right"]}
    clip = pipe(**given, num_inference_steps=2, seed=4, progress=False, precision="fp32")
    assert_close(clip[..., ::4, ::8, ::8], EXPECTED[f"{name}.clip"])
    if name == "causal":
        known = torch.linspace(-1, 1, 3 * 5 * 64 * 64).view(1, 3, 5, 64, 64)
        stream = torch.cat(list(pipe.stream(known, 12, "up", num_inference_steps=2, precision="fp32")), 2)
        assert_close(stream[..., ::4, ::8, ::8], EXPECTED["causal.stream"])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", RECORD["losses"])
def test_a_checkpoint_resumes_under_the_config_that_wrote_it(home, name, monkeypatch):
    monkeypatch.chdir(home)
    overrides = [f"name={name}", "text.cache=captions", *RECORD["runs"][name]]
    assert train.run(["base.yaml", *overrides, "train.steps=6"]) == 0
    with open(home / "output" / name / "training_metrics.csv", newline="") as stream:
        losses = [float(row["loss"]) for row in csv.DictReader(stream)]
    assert losses == pytest.approx(RECORD["losses"][name][3:], rel=1e-2 if name == "causal" else TOLERANCE or 1e-12)


OLD = HERE / "checkpoints" / "stack" / "step-3"


def test_the_config_of_a_checkpoint_is_read_under_its_former_keys():
    model = config_of(read_checkpoint(OLD)).model
    assert (model.activation, model.position_encoding) == ("gelu_tanh", "sincos+rope_3d")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_with_one_length_of_average_twice_is_read_though_no_run_is_trained_so():
    checkpoint = read_checkpoint(OLD)
    saved = checkpoint.info["config"]
    twice = {**saved, "train": {**saved["train"], "average_lengths": [0.1, 0.05, 0.1]}}
    read = config_of(checkpoint._replace(info={**checkpoint.info, "config": twice}))
    assert read.train.average_lengths == [0.1, 0.05]
    assert read == replace(config_of(checkpoint), train=read.train)
    with pytest.raises(ValueError, match="has one length twice"):
        load_typed(Config, None, ["train.average_lengths=[0.1,0.05,0.1]"])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_only_a_checkpoint_of_a_vae_is_called_one():
    checkpoint = read_checkpoint(OLD)
    own = {key: value for key, value in checkpoint.info["config"].items() if key != "objective"}
    for config, words in (
        (own, r"info.json has no section objective.*; give another"),
        (to_plain(VAEConfig()), "but of stdit train-vae; give a run of the former"),
    ):
        with pytest.raises(ValueError, match=words):
            config_of(checkpoint._replace(info={**checkpoint.info, "config": config}))

"""A run that is not finished can be sampled and exported from its checkpoints."""

import pytest
import torch

from stdit.recipes import export, info, models
from stdit.training.state import save_checkpoint

CONFIG = "data: {source: shapes, num_shapes: 8, num_frames: 5, height: 32, width: 32, workers: 0}\nmodel: {size: S/2, depth: 1, hidden_size: 32, num_heads: 2, axes: [joint]}\ntrain: {steps: 2, batch_size: 2, checkpoint_every: 1, samples: 0, precision: fp32}\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from stdit.recipes import train

    folder = tmp_path_factory.mktemp("unfinished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train, "clip_rate", lambda config, dataset: 30.0)  # as of files of 30 frames a second
        (folder / "part.yaml").write_text("name: part\n" + CONFIG)
        assert train.main(["part.yaml"]) == 0
    return folder


def weights(pipe) -> torch.Tensor:
    return torch.cat([value.flatten() for value in pipe.transformer.state_dict().values()])


def test_a_checkpoint_gives_the_model_that_training_would_write(run, monkeypatch, capsys):
    monkeypatch.chdir(run)
    written = weights(models.load_pipeline("models/part"))
    for name in ("checkpoints/part", "checkpoints/part/step-2"):
        pipe = models.load_pipeline(name)
        assert torch.equal(weights(pipe), written) and pipe.config.fps == 30
        assert "stdit export part writes them to models/part" in capsys.readouterr().err
    (run / "models/part").rename(run / "models/.away")
    try:
        assert info.newest_model().as_posix() == "checkpoints/part"
        assert torch.equal(weights(models.load_pipeline("models/part")), written)
        assert export.main(["part"]) == 0
        assert torch.equal(weights(models.load_pipeline("models/part")), written)
    finally:
        (run / "models/.away").rename(run / "models/before")


def test_what_cannot_be_exported_is_said_in_one_line(run, monkeypatch):
    monkeypatch.chdir(run)
    with pytest.raises(ValueError, match="no run 'prat' under checkpoints/; runs there are: part"):
        export.main(["prat"])
    save_checkpoint(run / "checkpoints/old", 1, {"model": {"a": torch.ones(1)}}, {"config": {"objective": {}}})
    with pytest.raises(ValueError, match="as an older version wrote it"):
        models.load_pipeline("checkpoints/old")
    (run / "checkpoints/old/step-1/model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="is damaged"):
        models.load_pipeline("checkpoints/old/step-1")


def test_the_device_is_the_accelerator_that_torch_has(monkeypatch):
    for found in (None, torch.device("mps"), torch.device("cuda", 0)):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False, found=found: found)
        assert models.default_device() == ("cpu" if found is None else found.type)

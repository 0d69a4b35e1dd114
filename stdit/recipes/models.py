"""The trained model that a command works on: the folder it names or the newest one, on the device that is there."""

from pathlib import Path

import torch

from stdit.sampling.pipeline import STDiTPipeline


def newest_model(folder: Path = Path("models")) -> Path:
    """The folder of the model trained last. ValueError with the command that makes one if there is none."""
    found = [path.parent for path in folder.glob("[!.]*/model_index.json")]
    if not found:
        raise ValueError(
            f"There is no model under {folder}/; make one with: make quickstart   (or stdit train CONFIG)."
        )
    return max(found, key=lambda path: (path / "model_index.json").stat().st_mtime)


def default_device() -> str:
    """ "cuda" where there is such a device, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_pipeline(model: str | Path) -> STDiTPipeline:
    """The pipeline in a folder, on `default_device`."""
    return STDiTPipeline.from_pretrained(str(model)).to(default_device())

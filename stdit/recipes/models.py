"""Find and load the trained model of a command: a named folder or the newest one, on the available device."""

from pathlib import Path

import torch

from stdit.sampling.pipeline import STDiTPipeline


def newest_model(folder: Path = Path("models")) -> Path:
    """The folder of the model that was exported last. ValueError if there is none."""
    found = [path.parent for path in folder.glob("[!.]*/model_index.json")]
    if not found:
        raise ValueError(
            f"there is no model under {folder}/; train one with make quickstart, or with stdit train CONFIG."
        )
    return max(found, key=lambda path: (path / "model_index.json").stat().st_mtime)


def default_device() -> str:
    """The device of a command: "cuda" if available, otherwise "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_pipeline(model: str | Path) -> STDiTPipeline:
    """Load the pipeline of a folder onto `default_device`."""
    return STDiTPipeline.from_pretrained(str(model)).to(default_device())

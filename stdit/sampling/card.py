"""The model card of a pipeline: what it is, sample clips, training data and settings, licence, and the code that loads it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData
from omegaconf import OmegaConf

from stdit.conditions import Caption, Label
from stdit.data.video_write import write_video
from stdit.files import LARGEST_JSON, printable, read_json, write_text
from stdit.ranges import whole_number
from stdit.sampling.inputs import pair_conditions

# Settings of a run that the card lists first, with what they are called there.
_SETTINGS = {
    "data.root": "data", "data.source": "kind of data", "train.steps": "steps", "train.batch_size": "clips per step",
    "train.optimizer": "optimizer", "train.lr": "learning rate", "train.ema_decay": "decay of the averaged weights",
    "objective.name": "objective", "objective.mask_strategy": "mask strategy", "text.encoder": "text encoder",
    "init_from.path": "started from", "seed": "seed",
}  # fmt: skip
_SUMMARY = {
    "samples_in_data": "clips in the data", "step": "steps done", "training_seconds": "seconds of training", "device": "device",
    "processes": "processes", "precision": "precision",
}  # fmt: skip


class CardContents(NamedTuple):
    """What a card shows: the labels or captions of its samples (None: of nothing), and the folder of the run."""

    asked: list[str | None]
    run: Path | None


def card_contents(pipe: Any, samples: int | str | Sequence[str] = 4, run: str | Path | None = None) -> CardContents:
    """What the card of a pipeline will show; ValueError for samples that the model does not make, or a folder of no run.

    The arguments are those of `STDiTPipeline.push_to_hub`.
    """
    record = _run_folder(pipe, run)
    asked = _asked(pipe, samples, record)
    if given := _given(pipe, asked):
        pair_conditions(pipe.transformer.conditioners, given, len(asked), encode=lambda: pipe.encoder.encode)
    return CardContents(asked, record)


def write_card(pipe: Any, folder: Path, contents: CardContents, *, repo_id: str, license: str | None = None) -> None:
    """Write README.md and samples/ into a pipeline's folder. The arguments are those of `STDiTPipeline.push_to_hub`."""
    asked, record = contents
    names = list(_write_samples(pipe, folder / "samples", asked))
    text, kinds = Caption.name in pipe.transformer.conditioners, _kinds(pipe)
    data = ModelCardData(
        library_name="stdit",
        license=license,
        pipeline_tag=("text-to-image" if kinds == ("png",) else "text-to-video") if text else None,
        tags=["video-generation", "diffusion-transformer", "stdit", "diffusers"],
        widget=[{"text": name, "output": {"url": f"samples/{i:03d}.{kinds[0]}"}} for i, name in enumerate(names)]
        or None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {repo_id.rpartition('/')[2]}\n\n{_what(pipe)}",
        _shown(names, kinds[-1]),
        _usage(pipe, repo_id, asked[0] if asked else None),
    ]
    parts += [_training(record), _licence(license)]
    card = ModelCard("\n\n".join(part for part in parts if part) + "\n", ignore_metadata_errors=True)
    write_text(folder / "README.md", str(card))


def _what(pipe: Any) -> str:
    model, config = pipe.transformer, pipe.config
    kind = (
        "a text" if Caption.name in model.conditioners else "a class" if Label.name in model.conditioners else "nothing"
    )
    names = model.config.get("class_names") or []
    classes = f"\n\nClasses: {_line(', '.join(names[:50]))}{' ...' if len(names) > 50 else ''}." if names else ""
    return (
        f"A video diffusion transformer of {model.num_parameters() / 1e6:.1f} million parameters that generates clips from {kind}, made for "
        f"{config.num_frames} frames of {config.height} x {config.width} (height x width) at {config.fps:g} frames a second, with "
        f"VAE {pipe.video_vae.name} and objective {config.objective}.{classes}"
    )


def _kinds(pipe: Any) -> tuple[str, ...]:
    """The types of file of a sample: that to play, and that which the text of the card shows."""
    return ("png",) if pipe.config.num_frames == 1 else ("mp4", "gif")


def _shown(names: Sequence[str], kind: str) -> str:
    if not names:
        return ""
    rows = "\n".join(f"| {_line(name)} | ![{i}](samples/{i:03d}.{kind}) |" for i, name in enumerate(names))
    return f"## Samples\n\nNot selected: the first clips of seed 0.\n\n| | |\n|---|---|\n{rows}"


def _usage(pipe: Any, repo_id: str, example: str | None) -> str:
    conditioners = pipe.transformer.conditioners
    keyword = "prompt" if Caption.name in conditioners else "class_labels" if Label.name in conditioners else None
    given = f"{keyword}={example!r}, " if keyword and example else ""
    return (
        "## Use\n\n```python\nfrom diffusers.utils import export_to_video\nfrom stdit import STDiTPipeline  # pip install stdit\n\n"
        f'pipe = STDiTPipeline.from_pretrained("{repo_id}")\n'
        f'frames = pipe({given}output_type="pil").frames[0]\nexport_to_video(frames, "clip.mp4", fps={pipe.config.fps:g})\n```'
    )


def _training(run: Path | None) -> str:
    if run is None:
        return "## Training\n\nNo record of the training is at hand."
    settings = _settings(run)
    rows = [(title, OmegaConf.select(settings, key)) for key, title in _SETTINGS.items()]
    summary = read_json(run / "summary.json")
    rows += [(title, summary.get(key)) for key, title in _SUMMARY.items()]
    table = "\n".join(f"| {title} | {_line(str(value))} |" for title, value in rows if value is not None)
    everything = _printable_lines(OmegaConf.to_yaml(settings))
    details = (
        f"\n\n<details><summary>All settings</summary>\n\n```yaml\n{everything}```\n\n</details>" if settings else ""
    )
    return f"## Training\n\n| | |\n|---|---|\n{table}{details}"


def _licence(license: str | None) -> str:
    stated = (
        f"{_line(license)}." if license else "None is stated: ask the author before you use or pass on the weights."
    )
    return f"## Licence\n\n{stated}"


def _run_folder(pipe: Any, run: str | Path | None) -> Path | None:
    """The folder of a run's record: a given one, or output/NAME beside the models/NAME that the pipeline comes from."""
    if run is not None:
        if not (Path(run) / "config.yaml").is_file():
            raise ValueError(
                f"{str(run)!r} holds no record of a run (no config.yaml); give a folder output/NAME, or leave run out."
            )
        return Path(run)
    source = Path(str(pipe.config.get("_name_or_path") or "."))
    beside = source.resolve().parent.parent / "output" / source.resolve().name
    return beside if (beside / "config.yaml").is_file() else None


def _settings(run: Path) -> Any:
    """The settings of a run, without the folders in which its files lay on this machine."""
    path = run / "config.yaml"
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(
            f"{str(path)!r} has more than {LARGEST_JSON >> 20} MB, so it is no record of a run; leave run out."
        )
    return OmegaConf.create(_without_folders(OmegaConf.to_container(OmegaConf.load(path))))


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_folders(one) for one in value]
    return Path(value).name if isinstance(value, str) and Path(value).expanduser().is_absolute() else value


def _asked(pipe: Any, samples: int | str | Sequence[str], run: Path | None) -> list[str | None]:
    """What to sample clips of: labels, captions, or None for clips of nothing."""
    if isinstance(samples, str):
        return [samples]
    if isinstance(samples, list | tuple):
        return list(samples)
    samples = whole_number("samples", samples, 0, "; give a number, or a list of labels or captions")
    label, config = pipe.transformer.conditioners.get(Label.name), pipe.config
    if isinstance(label, Label):
        spread = [i * label.num_classes // samples for i in range(samples)]
        return [(label.class_names or [str(one) for one in range(label.num_classes)])[i] for i in spread]
    captions = run / "samples" / "captions.txt" if run is not None and config.text_encoder else None
    if captions is not None and captions.is_file():
        return list(captions.read_text(encoding="utf-8").splitlines()[:samples])
    return [None] * samples


def _write_samples(pipe: Any, folder: Path, asked: Sequence[str | None]) -> Iterator[str]:
    """Sample a clip of each, write it as mp4 and gif (an image as png), and yield what it is of."""
    if not asked:
        return
    folder.mkdir()
    clips = pipe(**_given(pipe, asked), num_videos=len(asked), progress=False)
    for i, (clip, name) in enumerate(zip(clips, asked, strict=True)):
        for suffix in _kinds(pipe):
            write_video(folder / f"{i:03d}.{suffix}", clip, fps=pipe.config.fps)
        yield name or f"clip {i}"


def _given(pipe: Any, asked: Sequence[str | None]) -> dict[str, Any]:
    """The conditions of the samples, by keyword."""
    if not asked or asked[0] is None:
        return {}
    return {"captions" if Caption.name in pipe.transformer.conditioners else "class_labels": list(asked)}


def _line(text: str) -> str:
    """A text from a config as one cell of a table."""
    return printable(text).replace("|", "\\|").replace("<", "&lt;")


def _printable_lines(text: str) -> str:
    """A text of several lines without control characters, and without the end of a block of code."""
    return "".join(f"{printable(line).replace('```', '` ` `')}\n" for line in text.splitlines())

"""The models of the studio: those in a folder, and what a page must know of one; the last one that was used stays loaded."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stdit.sampling.labels import read_labels
from stdit.sampling.options import SamplingOptions
from stdit.sampling.pipeline import STDiTPipeline
from stdit.training.state import list_checkpoints
from stdit.vae import VAEGeometry
from stdit.web.studio_problems import Fix, Refused

_FEW = 4  # steps of a flow map


class Facts(NamedTuple):
    """What is needed of a model before anything is sampled.

    classes: names of its labels, or their numbers; () for none. grid: pixels by which height and width must be divisible.
    patches: whether parts of a picture can be generated. guidance: the scale that it takes unless another is given.
    scales: the largest scale by guider of a model that has learnt guidance, else empty.
    written: when its weights were written, in microseconds.
    """

    name: str
    path: str
    classes: tuple[str, ...]
    captions: bool
    num_frames: int
    height: int
    width: int
    fps: float
    causal: bool
    patches: bool
    geometry: VAEGeometry
    grid: tuple[int, int]
    steps: int
    guidance: float
    guided: bool
    scales: Mapping[str, float]
    written: int

    @classmethod
    def of(cls, name: str, path: Path, pipe: STDiTPipeline, written: int) -> "Facts":
        """The facts of a loaded pipeline."""
        model, vae, config, engine = pipe.transformer, pipe.video_vae, pipe.config, pipe.engine
        names = model.config.get("class_names") or [str(number) for number in range(model.num_classes or 0)]
        geometry = VAEGeometry(vae.name, vae.stride, vae.channels, vae.temporal_granularity)
        grid = (vae.stride[1] * model.patch_size[1], vae.stride[2] * model.patch_size[2])
        few = engine.default_solver == "flow_map"
        return cls(
            name=name, path=path.as_posix(), classes=tuple(names), captions=bool(model.config.get("caption_channels")),
            num_frames=config.num_frames, height=config.height, width=config.width, fps=config.fps,
            causal=bool(model.config.get("causal")), patches=bool(model.supports_patch_levels), geometry=geometry, grid=grid,
            steps=_FEW if few else int(SamplingOptions().num_inference_steps),
            guidance=engine.guidance(SamplingOptions()).scale, guided=engine.distilled_guidance == 1,
            scales={} if engine.learnt_guidance is None else engine.learnt_guidance.scales, written=written,
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """As the page gets it."""
        plain = {key: value for key, value in self._asdict().items() if key != "geometry"}
        step = self.geometry.temporal_granularity or self.geometry.stride[0]
        return {**plain, "group": self.geometry.stride[0], "step": step}


class Models:
    """The models under a folder, newest first, and the one pipeline that is loaded.

    load: reads a pipeline; it is called in the worker alone. further: models by name that come first, which may lie elsewhere,
    and folders of checkpoints.
    """

    def __init__(self, folder: Path, load: Callable[[Path], STDiTPipeline], further: Mapping[str, Path] | None = None):
        self.folder, self._load, self._further = folder, load, dict(further or {})
        self._facts: dict[tuple[str, int], Facts] = {}
        self._loaded: tuple[tuple[str, int], STDiTPipeline] | None = None

    def listing(self) -> list[dict[str, Any]]:
        """Name and a line of text of each model; of one that cannot be read, why."""
        found = [path.parent for path in self.folder.glob("[!.]*/model_index.json")]
        found.sort(key=lambda path: _written(path) or 0, reverse=True)
        named = {**self._further, **{path.name: path for path in found if path.name not in self._further}}
        return [_entry(name, path) for name, path in named.items()]

    def path(self, name: str) -> Path:
        """The folder of a model; Refused if it is gone."""
        path = self._further.get(name, self.folder / Path(name).name)
        if _written(path) is None:
            others = [entry["name"] for entry in self.listing() if entry["name"] != name and "error" not in entry]
            fixes = [Fix(f"Use {other}", {"model": other}) for other in others[:2]]
            raise Refused(f"The model {path} is gone; choose another, or put the folder back.", *fixes)
        return path

    def known(self, name: str) -> Facts | None:
        """The facts of a model that was loaded before and has not changed; Refused if it is gone."""
        return self._facts.get(self._key(name))

    def facts(self, name: str) -> Facts:
        """The facts of a model, which is loaded if they are unknown (in the worker)."""
        return self.known(name) or self.read(name)[1]

    def _key(self, name: str) -> tuple[str, int]:
        return name, _written(self.path(name)) or 0

    def read(self, name: str) -> tuple[STDiTPipeline, Facts]:
        """The pipeline of a model, as it was last written, and its facts (in the worker)."""
        key, path = self._key(name), self.path(name)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # before the next one takes its memory
            self._loaded = key, self._load(path)
        pipe = self._loaded[1]
        if key not in self._facts:
            self._facts[key] = Facts.of(name, path, pipe, key[1])
        return pipe, self._facts[key]


def _written(folder: Path) -> int | None:
    """When a model, or the newest checkpoint in a folder of them, was written, in microseconds; None if there is neither."""
    checkpoints = [*list_checkpoints(folder)[:1], folder]
    for file in (folder / "model_index.json", *(path / "info.json" for path in checkpoints)):
        try:
            return file.stat().st_mtime_ns // 1000
        except OSError:
            continue
    return None


def _entry(name: str, path: Path) -> dict[str, Any]:
    if not (path / "model_index.json").is_file() and _written(path) is not None:
        return {"name": name, "text": "its newest checkpoint"}
    try:
        found = read_labels(path)
    except (ValueError, KeyError, TypeError, OSError) as error:
        return {"name": name, "text": "cannot be read", "error": " ".join(str(error).split())[:200]}
    size = f"{found.num_frames} frame{'s' * (found.num_frames != 1)} of {found.height} × {found.width}"  # noqa: RUF001
    kind = f"{found.num_classes} labels" if found.num_classes else "captions" if found.captions else "no labels"
    return {"name": name, "text": f"{size}, {kind}{', forward only' if found.causal else ''}", "causal": found.causal}

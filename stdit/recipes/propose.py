"""What to train on a folder of clips or pictures: size, length, rate, model and steps, for this machine and some minutes.

`stdit train --data FOLDER` prints the proposal and trains it.
"""

import json
import re
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from stdit.config import Config, load_typed
from stdit.data.clips import Images, VideoClips
from stdit.data.config import DataConfig
from stdit.data.datasets import build_dataset
from stdit.data.facts import Facts, too_short
from stdit.data.index import entries_of
from stdit.data.inspect import inspect
from stdit.data.inspections import MEASURED
from stdit.data.manifest import find_media
from stdit.data.media import IMAGE_SUFFIXES
from stdit.data.stores import with_urls
from stdit.files import printable, write_json
from stdit.progress import Progress
from stdit.recipes.budget import Budget, key_of
from stdit.recipes.check_media import data_config_of
from stdit.recipes.models import default_device
from stdit.rng import keyed_rng
from stdit.training.run import RunFolders

BASE = "own_videos"  # the config that a proposal changes
SAMPLED = 200  # files that are looked at where there is no index
_GRID = 16  # pixels that both sides are a multiple of: two latents of the tiny VAE
_AREAS = {"cpu": 64 * 64, "other": 128 * 128}  # pixels of a frame
_MINUTES = {"cpu": 30, "other": 120}
_ENOUGH = 0.9  # share of the clips that the length should suit
_FEW = 100  # clips that a model of this size learns by heart


class Proposal(NamedTuple):
    """A training: overrides of `BASE`, arguments of `stdit cache-latents` that come first (None: clips are read as they
    are), and lines that say why and what to expect."""

    overrides: list[str]
    cache: list[str] | None
    lines: list[str]

    def by_hand(self) -> list[str]:
        """The commands that do the same."""
        commands = [["cache-latents", *self.cache]] if self.cache else []
        commands.append(["train", BASE, *self.overrides])
        return ["the same by hand:", *(f"  stdit {shlex.join(one)}" for one in commands)]

    def config(self, given: Sequence[str] = ()) -> Config:
        """The config of the training, with further overrides."""
        return load_typed(Config, BASE, [*self.overrides, *given])


def find_or_propose(source: Path, given: Sequence[str], minutes: float | None) -> Proposal:
    """The proposal that an earlier call for the same data kept in output/NAME, else a new one; `keep` keeps it."""
    path = _kept_in(source, given)
    if not path.is_file():
        return propose(source, given, minutes)
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        data, found = kept["data"], Proposal(list(kept["overrides"]), kept["cache"], [])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged; remove it, and the training is proposed anew.") from error
    fixed = next(
        (one for one in given if key_of(one).startswith(("data.", "vae.")) and one not in found.overrides), None
    )
    if fixed is not None and found.cache is not None:
        raise ValueError(
            f"{fixed} differs from the training proposed before, {path}, whose clips are encoded; another name= proposes anew."
        )
    if data != str(source.resolve()):
        raise ValueError(f"{path.parent} belongs to a run on {data}; choose another name, with name=...")
    asked = "; --minutes has no effect on it" if minutes else ""
    line = (
        f"goes on with the training proposed before, {path} (key=value changes it, another name= proposes anew){asked}"
    )
    return found._replace(lines=[line])


def keep(proposal: Proposal, source: Path, given: Sequence[str]) -> None:
    """Write a proposal to output/NAME, so that the same command goes on with it; one that is there is left."""
    path = _kept_in(source, given)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        own = {"data": str(source.resolve()), "overrides": proposal.overrides, "cache": proposal.cache}
        write_json(path, own)


def _kept_in(source: Path, given: Sequence[str]) -> Path:
    name = next((one.partition("=")[2] for one in given if one.startswith("name=")), name_of(source))
    return RunFolders(name).output / "proposal.json"


def data_overrides(source: Path) -> list[str]:
    """The overrides that name a folder, or a manifest or index and the folder in which it lies, as the data."""
    data = data_config_of(source, None, [])
    return [f"data.root={data.root}", *([f"data.manifest={data.manifest}"] if data.manifest else [])]


def propose(source: Path, given: Sequence[str], minutes: float | None) -> Proposal:
    """Look at a folder, manifest or index and propose a training of about `minutes` (None: 30 on a CPU, 120 elsewhere).

    given: overrides of the user, which are kept. ValueError if no file can be used.
    """
    device = default_device()
    kind = "cpu" if device == "cpu" else "other"
    minutes = minutes or _MINUTES[kind]
    data = data_config_of(source, None, [])
    dataset = build_dataset(data)
    if not isinstance(dataset, VideoClips | Images):
        raise ValueError(
            f"{str(source)!r} holds no files of videos or pictures; name a config, for example stdit train {BASE} "
            f"data.root={source}."
        )
    facts, unreadable = _look(dataset)
    if not facts:
        raise ValueError(
            f"{str(source)!r}: none of the {unreadable} files can be read; see stdit check-media {source}."
        )
    overrides = [f"name={name_of(source)}", *data_overrides(source)]
    shape, why = _shape(facts, _AREAS[kind])
    overrides += [*shape, *_tolerance(facts, unreadable, shape)]
    if isinstance(dataset, VideoClips) and source.is_dir() and (pictures := find_media(source, IMAGE_SUFFIXES).files):
        why.append(f"{len(pictures)} pictures in the folder are no clips and are left out")
    if any(row.caption for row in dataset.rows):
        overrides += ["text.encoder=words", "model.conditioning=adaln_single"]
        why.append("captions are read by the built-in encoder of words (text.encoder=words)")
    classes = f", {dataset.num_classes} classes" if dataset.num_classes else ""
    lines = [
        f"{printable(with_urls(str(source)))}: {len(dataset)} {'pictures' if facts[0].is_image else 'clips'}{classes}; {_said(facts)}"
    ]
    if unreadable:
        lines.append(
            f"{unreadable} of {unreadable + len(facts)} files looked at cannot be read; stdit check-media says which"
        )
    own = [one for one in overrides if key_of(one) not in set(map(key_of, given))]
    budget = Budget(BASE, own, list(given), device=device, seconds=60 * minutes)
    chosen = budget.choose(len(dataset))
    config = budget.config()
    cache, folder = None, f"data/{config.name}_latents"
    if chosen.windows:
        of_data = [
            one
            for one in [*own, *given]
            if key_of(one).startswith(("data.", "vae.", "train.holdout")) or key_of(one) == "seed"
        ]
        cache = [BASE, *of_data, "--output", folder, "--windows", str(chosen.windows), "--freeze-augmentation"]
        own = [one for one in own if key_of(one) not in ("data.root", "data.manifest")]
        own += [f"data.root={folder}", "data.source=latents"]
    found = Proposal([*own, *chosen.overrides, *given], cache, [*lines, *why])
    encoded = f", after {chosen.windows} windows of each clip are encoded into {folder}" if cache else ""
    found.lines.append(
        f"a model of {chosen.parameters / 1e6:.1f} million parameters, {chosen.steps} steps of {config.train.batch_size}"
        f"{encoded}: about {_minutes(chosen.seconds)} ({device}: {chosen.rate / 1e9:.0f} Gflop/s measured, "
        f"{1e3 * chosen.reading:.0f} ms to read and encode a clip)"
    )
    if chosen.seconds > 72 * minutes:
        found.lines.append(
            f"that is more than {minutes:g} minutes, with the smallest model and the fewest steps that show anything; smaller "
            "sizes (data.height, data.width, data.num_frames) take less"
        )
    found.lines.extend([*_expect(len(dataset), chosen.steps), *found.by_hand()])
    return found


def _look(dataset: VideoClips | Images) -> tuple[list[Facts], int]:
    """The facts of the files, from an index or of a sample of them, and the number of files that cannot be read."""
    if dataset.index is not None:
        entries = entries_of(dataset.index).values()
        found = [Facts(**{name: one[name] for name in MEASURED}) for one in entries if "refused" not in one]
        return found, len(entries) - len(found)
    paths = list(dict.fromkeys(row.path for row in dataset.rows))
    if len(paths) > SAMPLED:
        paths = [paths[i] for i in sorted(keyed_rng("sample", 0).choice(len(paths), SAMPLED, replace=False))]
    looked = [inspect(path).facts for path in Progress(paths, "looking at files", unit="file", leave=False)]
    read = [one for one in looked if one is not None]
    return read, len(looked) - len(read)


def _tolerance(facts: Sequence[Facts], unreadable: int, shape: Sequence[str]) -> list[str]:
    """Room for twice as many unusable files as were seen, where that is more than training tolerates by itself."""
    settings = dict(one.split("=") for one in shape)
    fps = None if settings["data.fps"] == "null" else float(settings["data.fps"])
    frames = int(settings["data.num_frames"])
    short = sum(too_short(one.frames, one.last, frames, fps=fps) is not None for one in facts)
    share = (short + unreadable) / (len(facts) + unreadable)
    return (
        [f"data.max_bad_fraction={min(1.0, round(2 * share, 2)):g}"] if 2 * share > DataConfig.max_bad_fraction else []
    )


def _said(facts: Sequence[Facts]) -> str:
    middle = f"{statistics.median_low([f.height for f in facts])} x {statistics.median_low([f.width for f in facts])}"
    if facts[0].is_image:
        return f"half of them at most {middle} pixels"
    seconds, rates = [f.last for f in facts], [f.fps for f in facts]
    return (
        f"{min(seconds):.1f} to {max(seconds):.1f} s, {statistics.median_low(rates):.4g} frames a second, {middle} pixels "
        "(medians)"
    )


def _shape(facts: Sequence[Facts], area: int) -> tuple[list[str], list[str]]:
    """Overrides of size, length and rate, and why."""
    aspects = [f.width / f.height for f in facts]
    height, width = fit(statistics.median(aspects), area)
    lines, overrides = [], [f"data.height={height}", f"data.width={width}"]
    other = sum(not 0.75 < a / (width / height) < 1.34 for a in aspects) / len(aspects)
    crop = f"; {other:.0%} of the files have another shape and are cropped" if other > 0.05 else ""
    if facts[0].is_image:
        return [*overrides, "data.num_frames=1", "data.fps=null"], [f"trained at {height} x {width}{crop}"]
    seconds = sorted(f.last for f in facts)
    short = seconds[int((1 - _ENOUGH) * len(seconds))]  # which most clips last
    rate = statistics.median_low([f.fps for f in facts])
    frames, fps = 17, min(12.0, rate)
    if short < 16 / fps:  # faster frames, up to the clips' own; then fewer of them
        fps = min(rate, 16 / max(short, 1e-3))
        frames = 17 if short >= 16 / fps - 1e-6 else max(5, 1 + 4 * int(short * fps / 4 + 1e-6))
    fps = float(f"{fps:.4g}")
    left_out = sum(int(one * fps + 0.5) + 1 < frames for one in seconds)
    lines.append(
        f"trained on {frames} frames of {height} x {width} at {fps:g} frames a second, {(frames - 1) / fps:.1f} s{crop}"
    )
    if left_out:
        lines.append(f"{left_out / len(seconds):.0%} of the clips are shorter and are left out")
    return [*overrides, f"data.num_frames={frames}", f"data.fps={fps:g}"], lines


def fit(aspect: float, area: int) -> tuple[int, int]:
    """Height and width of about `area` pixels, multiples of 16, whose ratio is nearest to an aspect (width / height).

    >>> fit(1.0, 64 * 64), fit(16 / 9, 64 * 64)
    ((64, 64), (48, 80))
    """
    sides = range(_GRID, 8 * int(area**0.5), _GRID)
    near = [(h, w) for h in sides for w in sides if 0.75 <= h * w / area <= 1.25]
    return min(near, key=lambda s: abs(s[1] / s[0] / aspect - 1) + 0.1 * abs(s[0] * s[1] / area - 1))


def _minutes(seconds: float) -> str:
    return f"{max(1, round(seconds / 60))} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _expect(clips: int, steps: int) -> list[str]:
    """What a training of so few steps on so many clips can and cannot show."""
    lines = [
        f"expect: first shapes and colours after a tenth of the steps (pictures appear in output/NAME/samples), motion after "
        f"half; {steps} steps show whether it learns your data, not what longer training reaches"
    ]
    if clips < _FEW:
        lines.append(
            f"with {clips} files the model learns them by heart: samples will resemble single ones; {_FEW} and more are better"
        )
    return lines


def name_of(source: Path) -> str:
    """A name of a run, from that of its data."""
    path = source.resolve()
    plain = re.sub(r"[^\w-]+", "_", path.stem if path.is_file() else path.name).strip("_-")
    return plain[:60] or "own"

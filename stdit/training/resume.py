"""Find the checkpoint that a run resumes from, and refuse one of a different config."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from stdit.hashes import MANIFEST
from stdit.legacy import renamed_config
from stdit.training.config import LoopConfig
from stdit.training.run import RunFolders, differences
from stdit.training.state import (
    Check,
    Checkpoint,
    damage,
    list_checkpoints,
    load_checkpoint,
    manifest_hash,
    read_checkpoint,
)

# Keys that may change when a run resumes, since they do not change what a training step computes.
_FREE = (
    "train.steps", "train.checkpoint_every", "train.keep_checkpoints", "train.log_every", "train.preview_every",
    "train.resume", "train.allow_changes", "train.samples", "train.sample_steps", "train.guidance", "train.max_skipped",
    "train.micro_batch", "data.workers", "data.timeout", "data.cache_dtype", "data.cache_posterior", "data.max_bad_fraction", "data.root", "data.manifest", "data.index",
    "data.images", "name", "vae.name",
    "model.gradient_checkpointing", "model.label_std", "init_from.path", "train.parallel.shard", "train.parallel.replicas",
    "train.parallel.reshard", "train.parallel.offload", "train.parallel.context", "train.parallel.ring", "train.parallel.timeout", "train.compile", "train.profile",
    "train.previews", "train.trackers",
)  # fmt: skip

# Fingerprints that checkpoints of earlier versions do not have, and what they tell.
_NOT_ALWAYS_KEPT = {
    "data_fingerprint": "which data it was trained on",
    "teacher_fingerprint": "which teacher it learnt from",
}


def find_checkpoint(
    config: LoopConfig,
    folders: RunFolders,
    resolved: dict,
    defaults: dict,
    *,
    main: bool = True,
    same_vae: Callable[[str], bool] = lambda fingerprint: False,
    check: Check = damage,
) -> Checkpoint | None:
    """The checkpoint that `train.resume` asks for, or None to start from step 0. ValueError if its config differs.

    Nothing is changed on disk; see `set_aside`. resolved: the config of this run; defaults: the default config, for keys
    that did not exist when the checkpoint was written; main: whether this is the main process, which says what is not
    compared. same_vae: whether another fingerprint is that of the run's VAE. check: finds damage.
    """
    if config.resume == "never":
        return None
    if config.resume == "auto":
        checkpoint = load_checkpoint(folders.checkpoints, check)
    else:
        checkpoint = _from_path(Path(config.resume), folders, check)
    if checkpoint is None:
        return None
    saved = renamed_config(checkpoint.info["config"])
    for key, what in _NOT_ALWAYS_KEPT.items():
        if key in resolved and key not in saved:
            if main:
                print(f"{checkpoint.path} does not say {what}; it is not compared.", file=sys.stderr)
            resolved = {name: value for name, value in resolved.items() if name != key}
    if same_vae(saved.get("vae_fingerprint", "")):
        saved = {**saved, "vae_fingerprint": resolved["vae_fingerprint"]}
    # Where steps of a flow map end is what it is trained on; other models learn the same with any schedule.
    is_flow_map = resolved.get("objective", {}).get("flow_map", False)
    free = _FREE if is_flow_map else (*_FREE, "objective.sampling_shift")
    changed = [
        line
        for line in differences(_canonicalize(_merge(defaults, saved), saved), _canonicalize(resolved))
        if not line.startswith(tuple(f"{k}:" for k in free))
    ]
    if changed and not config.allow_changes:
        raise ValueError(
            f"{checkpoint.path} was made with a different config{' or data' if 'data_fingerprint' in resolved else ''} "
            f"({'; '.join(changed)}). Undo the change, choose another name=, "
            "start again with train.resume=never, or resume all the same with train.allow_changes=true."
        )
    if other := next((line for line in changed if line.startswith("train.optimizer:")), None):
        raise ValueError(
            f"{checkpoint.path} has the moments of another optimizer ({other}), which no change allows; undo it, or start from the "
            "exported model's weights with init_from.path and another name=."
        )
    return checkpoint


def candidates(config: LoopConfig, folders: RunFolders) -> list[str]:
    """The checkpoints that `find_checkpoint` may look at, newest first, each with a hash of its content."""
    if config.resume == "never":
        return []
    given = [] if config.resume == "auto" else [Path(config.resume), *list_checkpoints(Path(config.resume))]
    found = [path for path in (*list_checkpoints(folders.checkpoints), *given) if (path / MANIFEST).is_file()]
    return [f"{path.name} {manifest_hash(path)[:12]}" for path in found]


def set_aside(config: LoopConfig, folders: RunFolders, checkpoint: Checkpoint | None) -> None:
    """Move what the run would replace to NAME.before-N, before its first step; the main process calls it.

    With train.resume=never these are all files of an earlier run. With the path of a checkpoint they are this run's
    checkpoints that are newer than `checkpoint` and do not continue it, which would be taken for later ones of this run.
    """
    if config.resume == "never":
        for kept in folders.archive():
            print(f"train.resume=never: the files of an earlier run are now in {kept}", file=sys.stderr)
        return
    if config.resume == "auto" or checkpoint is None:
        return

    def newer(step: str) -> bool:
        return int(step.removeprefix("step-")) > checkpoint.step

    if not (left := [path for path in list_checkpoints(folders.checkpoints) if newer(path.name)]):
        return
    aside = folders.new_archive(folders.checkpoints)
    for path in left:
        os.rename(path, aside / path.name)
    for snapshot in (folders.checkpoints / "averages").glob("step-*.safetensors"):
        if newer(snapshot.stem):
            (aside / "averages").mkdir(exist_ok=True)
            os.rename(snapshot, aside / "averages" / snapshot.name)
    print(f"train.resume={config.resume}: newer checkpoints are now in {aside}", file=sys.stderr)


def _from_path(path: Path, folders: RunFolders, check: Check) -> Checkpoint:
    """The checkpoint at a path, or the newest checkpoint of this run that continues it.

    The same command therefore resumes when it is run again, also after the checkpoint at the path was removed as one of
    the oldest of this run.
    """
    own = list_checkpoints(folders.checkpoints)
    if not path.exists() and (continued := _continued(path, folders, own, check=check)) is not None:
        return continued
    source = _read(path, check)
    origin = manifest_hash(source.path)
    for candidate in own:
        if _origin(candidate)[0] == origin and check(candidate) is None:
            checkpoint = read_checkpoint(candidate)
            if checkpoint.step > source.step:
                return checkpoint
    known = {"origin": origin, "origin_path": _relative(source.path, folders)}
    return source._replace(info={**source.info, **known})


def _continued(path: Path, folders: RunFolders, own: list[Path], *, check: Check) -> Checkpoint | None:
    """The newest of this run's checkpoints (`own`, newest first) that continues the one that was at `path`, or None."""
    name = _relative(path, folders)
    number = path.name.removeprefix("step-")
    if path.parent.resolve() != folders.checkpoints.resolve() or not number.isdecimal():
        return None
    for candidate in own:
        origin, origin_path = _origin(candidate)
        # Checkpoints of earlier versions hold the hash of their origin and not where it was.
        if origin is not None and origin_path in (None, name) and check(candidate) is None:
            checkpoint = read_checkpoint(candidate)
            if checkpoint.step > int(number):
                return checkpoint
    return None


def _relative(path: Path, folders: RunFolders) -> str:
    """A path from the folder of the run's checkpoints, which stays right if the run is moved."""
    return Path(os.path.relpath(path.resolve(), folders.checkpoints.resolve())).as_posix()


def _origin(path: Path) -> tuple[str | None, str | None]:
    """The manifest hash and the place of the checkpoint that `train.resume=PATH` began with; None each if not known."""
    try:
        info = json.loads((path / "info.json").read_text())
        return info.get("origin"), info.get("origin_path")
    except (OSError, ValueError, AttributeError):
        return None, None


def _canonicalize(config: dict, given: dict | None = None) -> dict:
    """The config with `objective.mask_probs` normalised to a sum of 1, and empty unless mask_strategy is "mixed".

    given: the config as written; mask strategies that did not exist then had probability 0.
    """
    if "objective" not in config:  # the config of the VAE
        return config
    objective = config["objective"]
    probs = (given or {}).get("objective", {}).get("mask_probs", objective["mask_probs"])
    if objective["mask_strategy"] != "mixed":
        probs = {}
    total = sum(probs.values())
    probs = {name: round(prob / total, 6) for name, prob in probs.items() if prob}
    return {**config, "objective": {**objective, "mask_probs": probs}}


def _merge(defaults: dict, given: dict) -> dict:
    """`given`, with missing keys taken from `defaults`, section by section."""
    merged = {**defaults, **given}
    both = (key for key in merged if isinstance(given.get(key), dict) and isinstance(defaults.get(key), dict))
    return merged | {key: _merge(defaults[key], given[key]) for key in both}


def _read(path: Path, check: Check) -> Checkpoint:
    """Read the checkpoint at a path that the user gave: a checkpoint, or the newest one of a folder."""
    if path.name.startswith("step-"):
        reason = check(path)
        if reason:
            raise ValueError(f"train.resume={str(path)!r} is damaged or not a checkpoint ({reason}); choose another.")
        return read_checkpoint(path)
    checkpoint = load_checkpoint(path, check)
    if checkpoint is None:
        raise ValueError(
            f"train.resume={str(path)!r} holds no checkpoints; use auto, never, or a folder of step-N folders."
        )
    return checkpoint

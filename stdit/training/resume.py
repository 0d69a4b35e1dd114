"""Find the checkpoint a run resumes from, and refuse one that was made with a different config."""

import os
import sys
from pathlib import Path

from stdit.legacy import renamed_config
from stdit.training.config import LoopConfig
from stdit.training.run import RunFolders, differences
from stdit.training.state import Checkpoint, damage, list_checkpoints, load_checkpoint, read_checkpoint

# What may change between two parts of a run without changing what any step computes.
_FREE = (
    "train.steps", "train.checkpoint_every", "train.keep_checkpoints", "train.log_every", "train.preview_every",
    "train.resume", "train.allow_changes", "train.samples", "train.sample_steps", "train.guidance", "train.max_skipped",
    "train.micro_batch", "data.workers", "data.max_bad_fraction", "data.root", "data.manifest", "data.images", "name", "vae.name",
    "model.gradient_checkpointing", "init_from.path",
)  # fmt: skip


def find_checkpoint(
    config: LoopConfig, folders: RunFolders, resolved: dict, defaults: dict, *, main: bool = True
) -> Checkpoint | None:
    """The checkpoint that `train.resume` asks for, or None to start from step 0. ValueError if its config differs.

    resolved: the config of this run; defaults: the default config, for keys that did not exist when the checkpoint was written;
    main: whether this is the main process, which moves old checkpoints away with resume=never.
    """
    if config.resume == "never":
        if main and list_checkpoints(folders.checkpoints):
            _archive(folders.checkpoints)
        return None
    if config.resume == "auto":
        checkpoint = load_checkpoint(folders.checkpoints)
    else:
        checkpoint = _read(Path(config.resume))
    if checkpoint is None:
        return None
    saved = renamed_config(checkpoint.info["config"])
    changed = [
        line
        for line in differences(_canonicalize(_merge(defaults, saved), saved), _canonicalize(resolved))
        if not line.startswith(tuple(f"{k}:" for k in _FREE))
    ]
    if changed and not config.allow_changes:
        raise ValueError(
            f"{checkpoint.path} was made with a different config ({'; '.join(changed)}). Undo the change, choose another name=, "
            "start again with train.resume=never, or resume all the same with train.allow_changes=true."
        )
    return checkpoint


def _canonicalize(config: dict, given: dict | None = None) -> dict:
    """The config with `objective.mask_probs` normalised to a sum of 1, and empty unless mask_strategy is "mixed".

    given: the config as written; mask strategies that did not exist then had probability 0.
    """
    if "objective" not in config:  # the VAE's
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


def _read(path: Path) -> Checkpoint:
    """The checkpoint at a path that the user gave: one of them, or a folder of them."""
    if path.name.startswith("step-"):
        reason = damage(path)
        if reason:
            raise ValueError(f"train.resume={str(path)!r} is damaged or no checkpoint ({reason}); choose another.")
        return read_checkpoint(path)
    checkpoint = load_checkpoint(path)
    if checkpoint is None:
        raise ValueError(
            f"train.resume={str(path)!r} holds no checkpoints; use auto, never, or a folder of step-N folders."
        )
    return checkpoint


def _archive(folder: Path) -> None:
    """Rename the checkpoints of an earlier run, so that nothing is overwritten."""
    number = 1
    while (archive := folder.with_name(f"{folder.name}.before-{number}")).exists():
        number += 1
    os.rename(folder, archive)
    folder.mkdir()
    print(f"train.resume=never: earlier checkpoints are kept in {archive}", file=sys.stderr)

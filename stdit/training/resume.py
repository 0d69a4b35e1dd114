"""Where a run goes on from, and whether it may."""

import os
import sys
from pathlib import Path

from stdit.legacy import renamed_config
from stdit.training.config import TrainConfig
from stdit.training.run import RunFolders, differences
from stdit.training.state import Checkpoint, damage, list_checkpoints, load_checkpoint, read_checkpoint

# What may change between two parts of a run without changing what any step computes.
_FREE = (
    "train.steps", "train.checkpoint_every", "train.keep_checkpoints", "train.log_every", "train.preview_every",
    "train.resume", "train.allow_changes", "train.samples", "train.sample_steps", "train.guidance", "train.max_skipped",
    "train.micro_batch", "data.workers", "data.max_bad_fraction", "data.root", "data.manifest", "name", "vae.name",
    "model.gradient_checkpointing", "init_from.path",
)  # fmt: skip


def find_checkpoint(
    config: TrainConfig, folders: RunFolders, resolved: dict, defaults: dict, main: bool = True
) -> Checkpoint | None:
    """The checkpoint that `train.resume` names; None to begin. ValueError if it was made with another config.

    defaults: the values that keys have which nobody gave, for those that did not exist when it was written.
    """
    if config.resume == "never":
        if main and list_checkpoints(folders.checkpoints):
            _set_aside(folders.checkpoints)
        return None
    if config.resume == "auto":
        checkpoint = load_checkpoint(folders.checkpoints)
    else:
        checkpoint = _named(Path(config.resume))
    if checkpoint is None:
        return None
    saved = renamed_config(checkpoint.info["config"])
    changed = [
        line
        for line in differences(_in_effect(_over(defaults, saved), saved), _in_effect(resolved))
        if not line.startswith(tuple(f"{k}:" for k in _FREE))
    ]
    if changed and not config.allow_changes:
        raise ValueError(
            f"{checkpoint.path} was made with another config ({'; '.join(changed)}). Undo the change, choose another name=, "
            "begin again with train.resume=never, or go on all the same with train.allow_changes=true."
        )
    return checkpoint


def _in_effect(config: dict, given: dict | None = None) -> dict:
    """A config whose `objective.mask_probs` are those that steps are drawn by: none but of a mixture, in parts of 1.

    given: as it was written, whose shares count: a scheme that did not exist then had none.
    """
    objective = config["objective"]
    shares = (given or {}).get("objective", {}).get("mask_probs", objective["mask_probs"])
    if objective["mask_strategy"] != "mixed":
        shares = {}
    total = sum(shares.values())
    shares = {name: round(share / total, 6) for name, share in shares.items() if share}
    return {**config, "objective": {**objective, "mask_probs": shares}}


def _over(defaults: dict, given: dict) -> dict:
    """`given`, and of what it lacks the defaults."""
    merged = {**defaults, **given}
    both = (key for key in merged if isinstance(given.get(key), dict) and isinstance(defaults.get(key), dict))
    return merged | {key: _over(defaults[key], given[key]) for key in both}


def _named(path: Path) -> Checkpoint:
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


def _set_aside(folder: Path) -> None:
    """Nothing is overwritten: what an earlier run left gets another name."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.before-{number}")).exists():
        number += 1
    os.rename(folder, aside)
    folder.mkdir()
    print(f"train.resume=never: earlier checkpoints are kept in {aside}", file=sys.stderr)

"""Say what trained models are: their clips, labels, captions, actions, guidance and defaults; and whose the LoRAs are.

stdit info                          every model and LoRA under models/
stdit info models/quickstart        all of one, with its labels
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stdit.files import printable, read_json
from stdit.hub import LORA_FILE
from stdit.ranges import exact
from stdit.recipes.entry import command, command_parser
from stdit.sampling.labels import read_labels

MODELS, CHECKPOINTS = Path("models"), Path("checkpoints")
_LISTED = 12  # labels in the list of all models


def newest_model(folder: Path = MODELS) -> Path:
    """The folder of the model trained last; without any, of the run that wrote a checkpoint last.

    ValueError with the command that makes one if there is neither.
    """
    found = [path.parent for path in folder.glob("[!.]*/model_index.json")]
    if found:
        return max(found, key=lambda path: (path / "model_index.json").stat().st_mtime)
    steps = [path for path in CHECKPOINTS.glob("[!.]*/step-*/info.json") if folder == MODELS]
    if steps:
        return max(steps, key=lambda path: path.stat().st_mtime).parents[1]
    raise ValueError(f"there is no model under {folder}/; train one with make quickstart, or with stdit train CONFIG.")


def read_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """The settings of a model folder's pipeline, transformer and scheduler, without loading it; ValueError if it is none."""
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{str(folder)!r} holds no model (no model_index.json); stdit info lists those under models/.")
    files = {"pipeline": "model_index.json", "transformer": "transformer/config.json"}
    files["scheduler"] = "scheduler/scheduler_config.json"
    return {part: read_json(folder / name) if (folder / name).is_file() else {} for part, name in files.items()}


def label_names(folder: Path) -> list[str]:
    """The names of a model's classes, or their numbers; empty without classes."""
    known = read_labels(folder)
    return [str(name) for name in known.class_names or range(known.num_classes)]


def describe_lora(folder: Path) -> Iterator[tuple[str, str]]:
    """Whose LoRA a folder holds and how it is sampled with, as pairs of a title and a text; ValueError if it is damaged."""
    file = folder / LORA_FILE
    try:
        with safe_open(file, "numpy") as opened:
            info = opened.metadata() or {}
            ranks = {opened.get_slice(key).get_shape()[0] for key in opened.keys() if key.endswith("lora_A.weight")}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(file)!r} is not a complete safetensors file ({error}); export it again.") from error
    base = info.get("base", "")[:200]
    rank = ", ".join(map(str, sorted(ranks))) or "unknown"
    yield "LoRA", f"of {base or 'a model that it does not name'}, rank {rank}"
    yield "sample", f"stdit sample --model {base or 'MODEL'} --lora {folder}"


def describe(folder: Path) -> Iterator[tuple[str, str]]:
    """What a model is, as pairs of a title and a text."""
    if (folder / LORA_FILE).is_file():
        yield from describe_lora(folder)
        return
    found = read_settings(folder)
    pipeline, transformer, scheduler = found["pipeline"], found["transformer"], found["scheduler"]
    frames, rate = pipeline.get("num_frames", 1), pipeline.get("fps")
    size = f"{pipeline.get('height')} x {pipeline.get('width')}"
    yield "clips", f"{frames} frames of {size} at {rate:g} fps" if frames != 1 else f"pictures of {size}"
    blocks = f"{transformer.get('depth')} blocks, {transformer.get('hidden_size')} wide"
    causal = ", causal: continued frame by frame (stdit sample --task extend)" if transformer.get("causal") else ""
    yield "network", f"{blocks}, patches of {transformer.get('patch_size')}{causal}"
    about = [str(pipeline.get("objective")), str(scheduler.get("solver") or "")]
    if pipeline.get("objective") == "flow" and scheduler.get("shift") is not None:
        about.append(f"shift {scheduler['shift']:g}")
    yield "objective", ", ".join(filter(None, about))
    labels = label_names(folder)
    if labels:
        shown = ", ".join(labels[:_LISTED]) + (f" and {len(labels) - _LISTED} more" if len(labels) > _LISTED else "")
        yield "labels", f"{len(labels)} (--class-label): {shown}"
    if pipeline.get("text_encoder"):
        yield "captions", f"read by {pipeline['text_encoder']} (--caption)"
    for name, space in (transformer.get("extra_conditions") or {}).items():
        if name == "actions" and isinstance(space, dict):
            yield "actions", f"{', '.join(space.get('names') or []) or space.get('width')} (stdit play)"
        elif name == "guidance" and isinstance(space, dict):
            scales = ", ".join(f"{guider} 1 to {exact(most)}" for guider, most in space["scales"].items())
            yield "guidance", f"{scales}, learnt: one evaluation a step (--guider, --guidance)"
        else:
            yield "condition", str(name)
    tasks = [one for one in pipeline.get("mask_strategies") or [] if one != "shared"]
    yield "known frames", ", ".join(tasks) or "none in training: tasks with --input need some"
    guide = pipeline.get("guide")
    if guide and guide[0] is not None:
        yield (
            "guide",
            "an earlier state, which guidance leads away from"
            + ("" if transformer.get("causal") else " (--guider auto, the default)"),
        )
    if (scale := transformer.get("distilled_guidance", 1.0)) not in (None, 1.0):
        yield "guidance", f"{exact(scale)}, learnt: it is sampled without"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print what one model or LoRA is, or all under models/."""
    parser = command_parser("info", __doc__)
    parser.add_argument("model", nargs="?", type=Path, help="a model's folder; default: all under models/")
    parser.add_argument("--labels", action="store_true", help="print the labels alone, one a line")
    args = parser.parse_args(argv)
    if args.labels and args.model is None:
        raise ValueError("--labels needs a model, for example stdit info models/quickstart --labels.")
    if args.labels:
        print("".join(f"{printable(name)}\n" for name in label_names(args.model)), end="")
        return 0
    listed = {path.parent for name in ("model_index.json", LORA_FILE) for path in MODELS.glob(f"[!.]*/{name}")}
    folders = [args.model] if args.model else sorted(listed)
    if not folders:
        raise ValueError(
            f"there is no model under {MODELS}; train one with stdit quickstart, or stdit train --data PATH."
        )
    for folder in folders:
        try:
            described = list(describe(folder))
        except (TypeError, AttributeError, KeyError) as error:  # a value of another kind than a model's settings have
            raise ValueError(f"{folder}: its settings are none of a model ({error}); export it again.") from error
        print(printable(str(folder)))
        for title, text in described:
            print(f"  {title:<14}{printable(text)}")
    return 0

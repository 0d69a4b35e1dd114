"""Write docs/config.md: type, default and meaning of every config key and sampling option, from the dataclasses.

python dev/make_config_reference.py

A key's meaning is the comment at the end of its line in the dataclass; an option's is its help. tests/test_docs.py fails
where docs/config.md differs.
"""

import dataclasses
import inspect
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from stdit.config import Config  # noqa: E402
from stdit.data.config import DatasetConfig  # noqa: E402
from stdit.evaluation.compare import Comparison  # noqa: E402
from stdit.sampling.options import SamplingOptions  # noqa: E402
from stdit.training.vae import VAEConfig  # noqa: E402

COLUMNS = ("key", "type", "default", "meaning")

HEAD = """# Config reference

<!-- Written by dev/make_config_reference.py from the dataclasses of stdit; edit the comments there. -->

A config is a YAML file of differences from these defaults; `key=value` after it overrides any key:

```
python tools/train.py configs/video.yaml data.root=path/to/clips model.size=B/2 train.lr=2e-4
```

`--print-config` prints the complete config. An unknown key is an error that names the nearest key. The value `null` means
"not set". Lists and mappings are written as in YAML: `model.axes=[spatial,temporal]`, `'objective.mask_probs={region: 0}'`.
"""

OPTIONS = """## Options of sampling

Keywords of the pipeline's methods, and flags of `tools/sample_video.py`. They are not config keys.
"""

VAE = """## Config of the tiny VAE

The keys for `tools/train_vae.py`, such as in `configs/vae_tiny.yaml`.
"""

COMPARISON = """## Config of a comparison

The keys for `tools/compare.py`, such as in `configs/compare/conditioning.yaml`.
"""

# Meanings of the values of keys that have a fixed set of values.
CHOICES: dict[str, dict[str, str]] = {
    "data.source": {
        "auto": "inferred from the contents of `data.root`",
        "videos": "video files, and images as clips of one frame",
        "images": "image files",
        "idx": "files in MNIST's format",
        "latents": "latents written by `tools/cache_latents.py`",
        "shapes": "moving shapes, drawn on the fly",
        "tar": "tar shards of WebDataset",
        "datasets": "a data set of Hugging Face: what `save_to_disk` wrote, or a folder of parquet files",
        "curate": "the output folder of cosmos-curate",
        "lerobot": "a LeRobot dataset, with its actions (layouts v2.0, v2.1 and v3.0)",
    },
    "model.axes": {
        "joint": "every patch attends to all patches of all frames",
        "spatial": "every patch attends to the patches of its frame",
        "temporal": "every patch attends to the patches at its position in all frames",
    },
    "model.position_encoding": {
        "sincos": "a temporal table, zero at frame 0, added inside temporal and joint attention",
        "rope": "rotary embedding of the frame",
        "rope_3d": "rotary embedding of frame, row and column",
        "sincos+rope_3d": "`sincos` and `rope_3d`",
        "latte": "a temporal table added to the tokens before the first temporal block (Latte)",
    },
    "model.pos_scaling": {
        "none": "positions beyond the trained grid are extrapolated",
        "interpolate": "positions are scaled into the trained grid",
    },
    "model.conditioning": {
        "adaln_zero": "shift, scale and gate from the conditioning vector, zero at the start (DiT)",
        "adaln": "shift and scale (DiT)",
        "adaln_single": "one modulation shared by all blocks, plus a table per block (PixArt-alpha)",
        "adaln_lora": "one shared modulation, plus a low-rank layer per block (W.A.L.T)",
        "cross_attention": "blocks attend to the condition's tokens (DiT)",
        "in_context": "the condition's tokens join the patches (DiT)",
        "time_attention": "the conditioning vector biases queries, keys and values (DiffiT)",
    },
    "model.trunk": {
        "stack": "one block after another (DiT)",
        "long_skip": "long skip connections (U-ViT)",
        "masked": "an encoder that gets only part of the patches in training (MDT v2); with `objective.mask_ratio`",
        "dual_stream": "separate streams of text and video (SD3); with `model.num_single_blocks` also FLUX",
        "u_shape": "a U-shaped network of two resolutions (DiffiT)",
    },
    "train.schedule": {
        "linear": "to zero at `train.decay_steps`; constant without it",
        "cosine": "to zero at `train.decay_steps`, slowly at first and at the end",
        "constant": "not at all, whatever `train.decay_steps` says",
    },
    "train.compile": {
        "false": "blocks run as they are",
        "true": "blocks are compiled; an error where no compiler works",
        "auto": "compiled in runs of 2000 steps and more, where a compiler works; not with shared frames, selective checkpointing or a U-Net",
    },
    "model.gradient_checkpointing": {
        "false": "every block keeps what its backward pass needs",
        "selective": "results of products with weights and of attention are kept, the rest is computed again: little time",
        "true": "blocks are computed again from their inputs: the least memory, and about a third more time",
    },
    "objective.name": {
        "flow": "rectified flow, levels from 0 (clean) to 1 (noise)",
        "ddpm": "DDPM of 1000 steps, as in DiT",
    },
    "objective.mask_strategy": {
        "shared": "no frame is known; all frames have the same level",
        "per_frame": "no frame is known; every frame has its own level (diffusion forcing)",
        "prefix": "the first frames are known, at least one",
        "motion": "the first frames are known, at least two latent frames",
        "suffix": "the last frames are known, at least one",
        "ends": "all frames are known except a gap in the middle",
        "random": "each frame is known with probability 1/2",
        "every_kth": "every k-th frame is known",
        "region": "a box of patches, or all but a box, is to be generated",
        "teacher_forcing": "every frame is predicted from the clean frames before it; for causal models",
        "mixed": "each clip draws one of the strategies with the probabilities of `objective.mask_probs`",
    },
}


def meanings(kind: type) -> dict[str, str]:
    """Field name -> the comment at the end of its line, in a dataclass and its base classes."""
    found: dict[str, str] = {}
    for parent in kind.__bases__:
        if dataclasses.is_dataclass(parent):
            found |= meanings(parent)
    name, depth = None, 0
    previous = tokenize.NEWLINE
    tokens = list(tokenize.generate_tokens(io.StringIO(inspect.getsource(kind)).readline))
    for i, token in enumerate(tokens):
        depth += {tokenize.INDENT: 1, tokenize.DEDENT: -1}.get(token.type, 0)
        starts = previous in (tokenize.NEWLINE, tokenize.INDENT, tokenize.NL)
        if token.type == tokenize.NAME and depth == 1 and starts and tokens[i + 1].string == ":":
            name = token.string
        if token.type == tokenize.COMMENT and name and not starts:
            found[name] = token.string.removeprefix("#").strip()
        if token.type == tokenize.NEWLINE and tokens[i + 1].type != tokenize.COMMENT:
            name = None
        previous = token.type
    return found


def config_keys(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """Yield (key, type, default, meaning) of every field; the fields of a section have its name as a prefix."""
    hints, notes = get_type_hints(kind), meanings(kind)
    for field in dataclasses.fields(kind):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from config_keys(hint, f"{key}.")  # type: ignore[arg-type]
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        yield key, type_name(hint), default, notes.get(field.name, "")


def type_name(hint: Any) -> str:
    """A type in words: `int or null`, `list of str`, or the values of a Literal."""
    text = (
        getattr(hint, "__name__", str(hint)) if isinstance(hint, type) and not hasattr(hint, "__args__") else str(hint)
    )
    text = re.sub(r"typing\.", "", text).replace("list[list[int]]", "list of lists of int")
    text = text.replace("dict[str, dict[str, Any]]", "mapping of str to mappings")
    text = re.sub(r"list\[stdit\.[\w.]+\]", "list of entries", text)
    text = re.sub(r"list\[(\w+)\]", r"list of \1", text)
    text = re.sub(r"dict\[(\w+), (\w+)\]", r"mapping of \1 to \2", text)
    text = re.sub(r"Literal\[([^\]]*)\]", lambda match: match[1].replace("'", ""), text)
    text = re.sub(r"Union\[(\w+), (\w+)\]", r"\1 or \2", text)
    return text.replace("str | None", "str or null").replace(" | None", " or null").replace(" | ", " or ")


def shown(default: Any) -> str:
    """A default value as in YAML."""
    if isinstance(default, str) and default:
        return default
    if isinstance(default, dict) and default:
        return "{" + ", ".join(f"{name}: {value}" for name, value in default.items()) + "}"
    return json.dumps(default)


def page() -> str:
    """The text of docs/config.md."""
    parts = [HEAD]
    for section, rows in rows_by_section(Config).items():
        note = meanings(Config).get(section)
        parts.append(f"## `{section}`\n" if note else f"## {section}\n")
        if note:
            parts.append(f"{note[:1].upper()}{note[1:]}.\n")
        parts.append(table(COLUMNS, rows))
        for key, values in CHOICES.items():
            if key.startswith(f"{section}."):
                lines = "\n".join(f"- `{value}`: {meaning}" for value, meaning in values.items())
                parts.append(f"### Values of `{key}`\n\n{lines}\n")
        if section == "data":
            parts.append("### Keys of an entry of `data.datasets`\n")
            parts.append(table(COLUMNS, rows_by_section(DatasetConfig)["The run"]))
    parts += [OPTIONS, table(("option", "flag", "default", "meaning"), option_rows())]
    parts.append(VAE)
    parts.append(table(COLUMNS, [row for rows in rows_by_section(VAEConfig).values() for row in rows]))
    parts.append(COMPARISON)
    parts.append(table(COLUMNS, [row for rows in rows_by_section(Comparison).values() for row in rows]))
    return "\n".join(parts)


def rows_by_section(schema: type) -> dict[str, list[str]]:
    """Section -> the rows of its table."""
    sections: dict[str, list[str]] = {}
    for key, kind, default, meaning in config_keys(schema):
        section = key.split(".")[0] if "." in key else "The run"
        sections.setdefault(section, []).append(f"| `{key}` | {kind} | `{_cell(default)}` | {meaning} |")
    return sections


def _cell(default: Any) -> str:
    return shown(default).replace("|", "\\|")


def table(columns: Sequence[str], rows: Iterable[str]) -> str:
    """A Markdown table."""
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows]) + "\n"


def option_rows() -> Iterator[str]:
    """Yield a row of the table for every sampling option."""
    for field in dataclasses.fields(SamplingOptions):
        flag = f"`{field.metadata['flag']}`" if field.metadata["flag"] else ""
        choices = field.metadata["choices"]
        meaning = field.metadata["help"] + (f": {', '.join(choices)}" if choices else "")
        yield f"| `{field.name}` | {flag} | `{shown(field.default)}` | {meaning} |"


if __name__ == "__main__":
    (ROOT / "docs" / "config.md").write_text(page())

"""The options of sampling, their validation, and their command-line flags. This module imports no torch."""

import argparse
import dataclasses
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from stdit.legacy import warn_renamed
from stdit.ranges import real_number, whole_number
from stdit.variants import nearest, pick

# Names of the rows of `schedule.ARRANGEMENTS`, and of `precision.Precision`; those files import torch.
Arrangement = Literal["together", "autoregressive", "pyramid"]
Precision = Literal["auto", "fp32", "bf16"]
Guider = Literal["cfg", "cfg_zero", "auto"]  # rows of `guidance.GUIDERS`


def _option(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    type: Any = None,
    choices: tuple[str, ...] | None = None,
    least: float | None = None,
    above: float | None = None,
    remedy: str = "",
    **argument: Any,
) -> Any:
    """A field with what is needed to document, validate and parse it.

    flag: its command-line flag. choices: the values it may have. least, above: bounds of a number. remedy: the end of
    the message for a number out of bounds. argument: further arguments of `ArgumentParser.add_argument`.
    """
    metadata = {
        "help": help, "flag": flag, "type": type, "choices": choices, "least": least, "above": above, "remedy": remedy,
        "argument": argument,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


def _steps(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The options of sampling.

    Raises ValueError, in one line, for a value that no model can use; `checks` validates options against one model.
    """

    num_inference_steps: int | str = _option(
        30, "solver steps, a number; for DDPM also ddim50: 50 steps of DiT's spacing", flag="--steps", type=_steps
    )
    shift: float | None = _option(
        None,
        "flow: how far noise levels are shifted toward noise; more of the steps then decide what is where, fewer its "
        "outlines; default: the model's",
        flag="--shift",
        type=float,
        above=0,
        remedy="; 1 is no shift",
    )
    guidance_scale: float | None = _option(
        None,
        "classifier-free guidance toward label or caption; 1: none; default: 2, or 1 for a model that has learnt one scale",
        flag="--guidance",
        type=float,
        least=0,
        remedy="; 1 is no guidance",
    )
    guider: Guider | None = _option(  # noqa: RUF009
        None,
        "what guidance leads away from: cfg: no label or caption; cfg_zero: the same, scaled to fit (CFG-Zero*); auto: the "
        "weaker model that was saved in training (train.guide_step); default: auto for a model that has one or has learnt it, else cfg",
        flag="--guider",
        type=str,
        choices=get_args(Guider),
    )
    guidance_interval: tuple[float, float] | None = _option(
        None,
        "noise levels at which guidance is applied; default: 0.5 1 for the guider auto of flow, 0 1 otherwise",
        flag="--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
    )
    guidance_channels: int | None = _option(
        None,
        "number of latent channels that are guided, from the first (DiT's published samples: 3); default: all",
        flag="--guidance-channels",
        type=int,
        least=1,
        remedy="; leave it out to guide all channels",
    )
    history_guidance: float = _option(
        1.0,
        "guidance toward the known frames; 1: none",
        flag="--history-guidance",
        type=float,
        least=0,
        remedy="; 1 is no guidance",
    )
    history_noise: float | None = _option(
        None,
        "causal models: noise level at which finished frames are remembered, against drift, for models that were trained with "
        "such noise (objective.cond_noise_max); frames of model.sink stay clean; default: the model's",
        flag="--history-noise",
        type=float,
        least=0,
        remedy="; 0 remembers them as they are",
    )
    seed: int | Sequence[int] = _option(
        0, "seed of the noise; clip i depends on (seed, i) alone", flag="--seed", type=int, least=0
    )
    solver: str | None = _option(
        None,
        "solver, a row of solvers.SOLVERS (euler, heun, ab2, dpmpp_2m, flow_map, ddim, ddpm); by default the model's",
        flag="--solver",
        type=str,
    )
    arrangement: Arrangement = _option(  # noqa: RUF009
        "together",
        "order in which latent frames are denoised",
        flag="--arrangement",
        type=str,
        choices=get_args(Arrangement),
    )
    chunk_size: int = _option(
        1, "arrangement autoregressive: latent frames per chunk", flag="--chunk-size", type=int, least=1
    )
    stagger: int = _option(
        1, "arrangement pyramid: steps between the starts of neighbouring frames", flag="--stagger", type=int, least=1
    )
    window: int | None = _option(
        None, "frames per sampling window; default: as trained", flag="--window", type=int, least=1
    )
    overlap: int | None = _option(
        None, "largest number of known frames in a window; default: half a window", flag="--overlap", type=int, least=1
    )
    blend: int = _option(
        0,
        "distance, in frames and pixels, over which known pixels fade into generated ones",
        flag="--blend",
        type=int,
        least=0,
        remedy="; 0 leaves known pixels as they are",
    )
    paste: bool = _option(True, "paste known pixels over decoded ones; false leaves them as the VAE decodes them")
    tile: int | None = _option(
        None,
        "side of the tiles in which latents are decoded, to bound memory",
        flag="--tile",
        type=int,
        least=3,
        remedy=", since neighbouring tiles overlap; use 16 or more",
    )
    fps: float | None = _option(
        None, "frame rate passed to a model conditioned on it; default: as trained", flag="--fps", type=float, above=0
    )
    batch_size: int = _option(32, "clips per batch", type=int, least=1)
    precision: Precision = _option("auto", "arithmetic of the model", choices=get_args(Precision))  # noqa: RUF009
    progress: bool | Callable[..., Iterable] = _option(True, "show a progress bar; or a function that wraps loops")  # noqa: RUF009

    def __post_init__(self) -> None:
        for name in _FIELDS:
            _check_value(name, getattr(self, name))
        _check_steps(self.num_inference_steps)
        if self.solver is not None:
            from stdit.sampling.solvers import SOLVERS  # imported on use, since options import no torch

            pick(SOLVERS, self.solver, "solver")
        self._check_interval()
        for name, arrangement in (("chunk_size", "autoregressive"), ("stagger", "pyramid")):
            value = getattr(self, name)
            if value > 1 and self.arrangement != arrangement:
                raise ValueError(
                    f"{name}={value} has no meaning with arrangement={self.arrangement!r}; leave it out, or use "
                    f"arrangement={arrangement!r}."
                )

    def _check_interval(self) -> None:
        given = self.guidance_interval
        if given is None:
            return
        interval = tuple(given) if isinstance(given, Sequence) else (given,)
        for level in interval:
            real_number("guidance_interval", level)
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            values = ", ".join(f"{value:g}" for value in interval)
            raise ValueError(f"guidance_interval must be two levels with 0 <= low <= high <= 1, got ({values}).")
        object.__setattr__(self, "guidance_interval", interval)  # a list, as argparse gives it, becomes a tuple

    def keys(self, count: int) -> list[tuple[int, int]]:
        """The keys of the noise of `count` clips: (seed, i), or (seed, 0) of each clip's own seed where it is a list.

        ValueError unless there is one seed for all clips or for each.
        """
        if not isinstance(self.seed, Sequence):
            return [(int(self.seed), i) for i in range(count)]
        if len(self.seed) != count:
            raise ValueError(
                f"{len(self.seed)} seeds (or generators) for {count} clips; give one for all, or one per clip."
            )
        return [(int(seed), 0) for seed in self.seed]


_FIELDS = {one.name: one for one in dataclasses.fields(SamplingOptions)}


def _check_value(name: str, value: Any) -> None:
    """Raise ValueError unless a value is one of its field's choices and within its bounds."""
    metadata = _FIELDS[name].metadata
    if value is None and _FIELDS[name].default is None:
        return
    if metadata["choices"] is not None:
        pick(dict.fromkeys(metadata["choices"]), value, name)
    least, above = metadata["least"], metadata["above"]
    if least is None and above is None:
        return
    several = name == "seed" and isinstance(value, Sequence) and not isinstance(value, str)
    for one in value if several else [value]:
        if metadata["type"] is int:
            whole_number(name, one, None, metadata["remedy"])
        real_number(name, one)
        if least is not None and not least <= one < float("inf"):
            raise ValueError(f"{name} must be >= {least}, got {value}{metadata['remedy']}.")
    if above is not None and not above < value < float("inf"):
        raise ValueError(f"{name} must be a positive number, got {value}{metadata['remedy']}.")


def _check_steps(steps: int | str) -> None:
    if isinstance(steps, numbers.Integral):
        if steps < 1:  # type: ignore[operator]  # an Integral is compared with a number
            raise ValueError(f"num_inference_steps must be >= 1, got {steps}.")
    elif not isinstance(steps, str) or not re.fullmatch(r"(ddim)?[0-9]+", steps):
        raise ValueError(f"num_inference_steps must be a whole number, or ddimN such as ddim50, got {steps!r}.")


def make_options(options: SamplingOptions | None = None, choices: Mapping[str, Any] | None = None) -> SamplingOptions:
    """Replace fields of `options` (None: of the defaults) by `choices`; TypeError for an unknown name.

    `every` of version 0.1.0 is accepted as `chunk_size` or `stagger`, by the arrangement.
    """
    options, changes = options or SamplingOptions(), dict(choices or {})
    every = changes.pop("every", None)
    for name in changes:
        if name not in _FIELDS:
            raise TypeError(
                f"Unknown sampling option {name!r}.{nearest(name, _FIELDS) or ' Options are ' + ', '.join(_FIELDS) + '.'}"
            )
    if every is not None:
        name = "stagger" if changes.get("arrangement", options.arrangement) == "pyramid" else "chunk_size"
        warn_renamed(("every", name))
        changes.setdefault(name, every)
    return dataclasses.replace(options, **changes)


# The options of a world, which goes on group by group.
WORLD_OPTIONS = ("num_inference_steps", "shift", "guidance_scale", "history_noise", "solver", "seed")


def add_flags(parser: argparse.ArgumentParser, only: Sequence[str] | None = None, **defaults: Any) -> None:
    """Add a flag for every option that has one, or for some; `--every` of version 0.1.0 is accepted, but hidden.

    defaults: of options for which this command has others; None: one that it draws.
    """
    for name, one in _FIELDS.items():
        metadata = one.metadata
        if metadata["flag"] is None or (only is not None and name not in only):
            continue
        preset = defaults.get(name, one.default)
        choices = f": {', '.join(metadata['choices'])}" if metadata["choices"] else ""
        named = "drawn" if preset is None and one.default is not None else preset
        default = "" if named is None or "default" in metadata["help"] else f" (default: {_shown(named)})"
        parser.add_argument(
            metadata["flag"],
            type=metadata["type"],
            default=preset,
            help=f"{metadata['help']}{choices}{default}",
            **metadata["argument"],
        )
    if only is None:
        parser.add_argument("--every", type=int, help=argparse.SUPPRESS)


def options_from(args: argparse.Namespace, **choices: Any) -> SamplingOptions:
    """Make options from parsed flags, and from `choices` for options without a flag; ValueError names the flag."""
    flags = {name: one.metadata["flag"] for name, one in _FIELDS.items() if one.metadata["flag"]}
    parsed = {name: flag.removeprefix("--").replace("-", "_") for name, flag in flags.items()}
    values = {name: getattr(args, key) for name, key in parsed.items() if hasattr(args, key)}
    if getattr(args, "every", None) is not None:
        old = {"autoregressive": "chunk_size", "pyramid": "stagger"}.get(values["arrangement"], "chunk_size")
        warn_renamed(("--every", flags[old]))
        values[old] = args.every
    try:
        return make_options(None, {**values, **choices})
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        if name in flags:
            raise ValueError(f"{flags[name]} {rest}") from None
        raise


def _shown(default: Any) -> str:
    return " ".join(f"{value:g}" for value in default) if isinstance(default, tuple) else str(default)

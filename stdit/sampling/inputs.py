"""The keywords of a pipeline call: options of sampling, and conditions of the clips."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from stdit.conditions import CONDITIONERS, Caption, Conditioner, Conditions, Guided, Label
from stdit.files import printable
from stdit.labels import label_values
from stdit.ranges import whole_number
from stdit.sampling.options import SamplingOptions, make_options
from stdit.text import Encoded

Labels = Sequence[int | str] | int | str | Tensor | None
Captions = Sequence[str] | str | Tensor | None  # texts, or their tokens (B, L, C)

NEGATIVE = "negative_"  # before the keyword of a condition: what guidance leads away from

_TEXTS = ("captions", "prompt", "prompt_embeds")


def split(options: SamplingOptions | None, choices: Mapping[str, Any]) -> tuple[SamplingOptions, dict[str, Any]]:
    """Split the keywords of a call into sampling options, applied to `options`, and conditions (also negative ones)."""
    keywords = {kind.keywords[0] for kind in CONDITIONERS.values()}
    given = {name: value for name, value in choices.items() if name.removeprefix(NEGATIVE) in keywords}
    return make_options(options, {name: value for name, value in choices.items() if name not in given}), given


def with_guider(options: SamplingOptions, given: Mapping[str, Any]) -> SamplingOptions:
    """The options of a call with these conditions: without a guider, negative ones are what `cfg` leads away from."""
    negative = any(value is not None for name, value in given.items() if name.startswith(NEGATIVE))
    return dataclasses.replace(options, guider="cfg") if negative and options.guider is None else options


def pair_conditions(
    conditioners: Mapping[str, Conditioner],
    given: Mapping[str, Any],
    count: int,
    *,
    encode: Callable[[], Callable[[Sequence[str]], Encoded]],
) -> Guided:
    """The conditions of `count` clips, and the null conditions that guidance leads away from.

    given: by keyword, one value per clip or one for all, None for the default; by keyword after `NEGATIVE`, what is
    led away from in place of the null. encode: gives a function from texts to tokens, called if the model takes
    captions. Raises ValueError for a condition that the model does not have.
    """
    rest = {keyword: value for keyword, value in given.items() if value is not None}
    conditions: Conditions = {}
    nulls: Conditions = {}
    for name, conditioner in conditioners.items():
        value = rest.pop(keyword := conditioner.keywords[0], None)
        negative = rest.pop(NEGATIVE + keyword, None)
        if (value is not None or negative is not None) and type(conditioner).of_clip is not Conditioner.of_clip:
            raise ValueError(f"{keyword} follow from the clip to generate and from fps; leave them out.")
        if isinstance(conditioner, Caption):  # a copy, because a model in training keeps its cache of tokens
            conditioner = copy.copy(conditioner)
            conditioner.tokenize = encode()
        away = {} if negative is None else {"negative": negative}
        conditions[name], nulls[name] = conditioner.pair(value, count, **away)
    for keyword, value in rest.items():
        raise ValueError(refusal(keyword, value, conditioners))
    return Guided(conditions, nulls)


def refusal(keyword: str, value: Any, conditioners: Mapping[str, Conditioner]) -> str:
    """The message for a condition that a model does not have. keyword: as the caller named it."""
    kind = keyword.removeprefix(NEGATIVE)
    shown = "a tensor" if isinstance(value, Tensor) else repr(value if len(repr(value)) < 80 else str(value)[:80])
    if kind == "class_labels":
        return f"{keyword}={shown} but the model is unconditional; leave class_labels out."
    if kind not in _TEXTS:
        return f"{keyword} is given but the model was trained without it; leave it out."
    remedy, label = "leave them out", conditioners.get(Label.name)
    if isinstance(label, Label):
        negative = NEGATIVE if keyword.startswith(NEGATIVE) else ""
        names = label.class_names or [f"0 to {label.num_classes - 1}"]
        listed = printable(", ".join(map(str, names[:8]))) + (", ..." if len(names) > 8 else "")
        flag = f"--{negative}class-label".replace("_", "-")
        remedy = f"choose of its classes, {negative}class_labels= ({flag}): {listed}"
    return f"{keyword}={shown} but the model was trained without captions; {remedy}."


def count_clips(
    conditioners: Mapping[str, Conditioner], given: Mapping[str, Any], num_videos: int | None = None
) -> int:
    """The number of clips of a call: `num_videos`, or else as many as labels, captions or other values, or 1.

    given: conditions by keyword. ValueError for several labels, captions or values of another number than `num_videos`.
    """
    labels, captions = given.get("class_labels"), given.get("captions")
    counts = [1 if labels is None else len(label_values(labels))]
    counts += [1 if captions is None or isinstance(captions, str) else len(captions)]
    counts += [
        conditioner.count(value)
        for conditioner in conditioners.values()
        if (keyword := conditioner.keywords[0]) not in ("class_labels", "captions")
        and (value := given.get(keyword)) is not None
    ]
    if num_videos is not None:
        num_videos = whole_number("num_videos", num_videos)
    count = num_videos or max(counts)
    if num_videos and any(several not in (1, count) for several in counts):
        raise ValueError(
            f"num_videos={num_videos} does not fit {max(counts)} labels, captions or values of other conditions; give one "
            "of them, or one per clip."
        )
    return count

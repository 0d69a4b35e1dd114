"""What a page asks for: checked values, and the parts of its timeline."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from stdit.web.studio_problems import Refused

TASKS = ("generate", "animate", "extend", "connect", "loop", "interpolate", "inpaint", "outpaint", "edit")
MOST_PARTS = 32
MOST_FRAMES = 4096
LONGEST_TEXT = 2000


class Part(NamedTuple):
    """A part of the timeline: a clip or picture (`media`, its name), or a gap of `frames` new frames. at: its number."""

    media: str | None
    frames: int = 0
    at: int = 0


@dataclass(frozen=True)
class Request:
    """Settings of the page. None: the model's, or drawn. size: (H, W) of the output, None: as trained."""

    model: str
    task: str
    parts: tuple[Part, ...]
    label: str | None = None
    caption: str | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    count: int = 1
    factor: int = 2
    strength: float = 0.6
    mask: str | None = None
    height: int | None = None
    width: int | None = None

    @classmethod
    def read(cls, given: Any) -> "Request":
        """Check a page's JSON; Refused, in one line, for a value that is none."""
        if not isinstance(given, Mapping):
            raise Refused("a request is a JSON object.")
        if given.get("task") not in TASKS:
            raise Refused(f"task={str(given.get('task'))[:40]!r} is none of {', '.join(TASKS)}.")
        listed = given.get("parts") or []
        if not isinstance(listed, list) or len(listed) > MOST_PARTS:
            raise Refused(f"a timeline has at most {MOST_PARTS} parts.")
        return cls(
            model=_text(given, "model", 255) or "", task=given["task"], parts=_joined(_part(one, at) for at, one in enumerate(listed)),
            label=_text(given, "label", 200), caption=_text(given, "caption", LONGEST_TEXT), steps=_whole(given, "steps", 1, 1000),
            guidance=_number(given, "guidance", 0, 100), seed=_whole(given, "seed", 0, 2**53 - 1),
            count=_whole(given, "count", 1, 8) or 1, factor=_whole(given, "factor", 2, 8) or 2,
            strength=0.6 if (strength := _number(given, "strength", 0, 1)) is None else strength, mask=_text(given, "mask", 255),
            height=_whole(given, "height", 1, 4096), width=_whole(given, "width", 1, 4096),
        )  # fmt: skip

    @property
    def media(self) -> list[Part]:
        """The clips and pictures of the timeline."""
        return [part for part in self.parts if part.media is not None]

    @property
    def gaps(self) -> tuple[Part, list[Part], Part]:
        """The gaps before, between and after the clips; one that is not there has no frames."""
        places = [i for i, part in enumerate(self.parts) if part.media is not None]
        if not places:
            return Part(None), [], self.parts[0] if self.parts else Part(None)
        between = [self.parts[a + 1] if b - a > 1 else Part(None, 0, self.parts[b].at) for a, b in pairwise(places)]
        before = self.parts[0] if places[0] else Part(None)
        return before, between, self.parts[-1] if places[-1] < len(self.parts) - 1 else Part(None)

    def as_json(self) -> dict[str, Any]:
        """As a page gives it."""
        return {**asdict(self), "parts": [part._asdict() for part in self.parts]}


def _part(given: Any, at: int) -> Part:
    if not isinstance(given, Mapping):
        raise Refused("a part of the timeline is a JSON object.")
    return Part(_text(given, "media", 255), _whole(given, "frames", 0, MOST_FRAMES) or 0, at)


def _joined(parts: Any) -> tuple[Part, ...]:
    """Neighbouring gaps as one, and no empty ones."""
    found: list[Part] = []
    for part in parts:
        if part.media is None and found and found[-1].media is None:
            found[-1] = found[-1]._replace(frames=found[-1].frames + part.frames)
        elif part.media is not None or part.frames:
            found.append(part)
    return tuple(found)


def _text(given: Mapping, name: str, longest: int) -> str | None:
    value = given.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str) or len(value) > longest or "\0" in value:
        raise Refused(f"{name} is no text of up to {longest} characters.")
    if any("\ud800" <= character <= "\udfff" for character in value):  # can be neither written nor sent
        raise Refused(f"{name} holds half of a character (a lone surrogate); write it again.")
    return value


def _whole(given: Mapping, name: str, least: int, most: int) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise Refused(f"{name}={str(value)[:40]} is no whole number from {least} to {most}.")
    return value


def _number(given: Mapping, name: str, least: float, most: float) -> float | None:
    value = given.get(name)
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not least <= value <= most
    ):
        raise Refused(f"{name}={str(value)[:40]} is no number from {least:g} to {most:g}.")
    return float(value)

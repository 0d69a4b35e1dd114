"""From what a page asks for to the commands that do it (`stdit sample ...`), and what stands in their way.

A timeline with several gaps is filled by several commands, each of which continues what the one before wrote.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stdit.data.inputs import fit_inside
from stdit.ranges import exact
from stdit.sampling.groups import fits, fitting_gaps
from stdit.web.studio_media import VIEW_PIXELS
from stdit.web.studio_models import Facts
from stdit.web.studio_problems import Fix, Problem
from stdit.web.studio_request import Part, Request

MOST_PIXELS = 4 * VIEW_PIXELS  # of all clips that one request generates
PREVIOUS = "{previous}"  # stands for what the command before wrote
_CROPPED = 0.02  # of a side: less is rounding
ON_CLIPS = ("interpolate", "inpaint", "outpaint", "edit")


class Plan(NamedTuple):
    """What a request comes to. commands: arguments of `stdit`. inner: of an outpainted clip, its (H, W) inside the frame."""

    commands: list[list[str]]
    problems: list[Problem]
    frames: int
    size: tuple[int, int]
    fps: float
    inner: tuple[int, int] | None = None

    @property
    def stopped(self) -> bool:
        """Whether something must be changed first."""
        return any(problem.stops for problem in self.problems)


class Planner(NamedTuple):
    """Plans requests to one model.

    view: what a page knows of the clip of a part (`View.facts`). path: of a file, for a command. output: the folder.
    others: names of models that are not causal.
    """

    facts: Facts
    view: Callable[[Part], Mapping[str, Any]]
    path: Callable[[str], str]
    output: Path
    others: tuple[str, ...] = ()

    def plan(self, request: Request) -> Plan:
        """The commands of a request, and what stands in their way."""
        facts, views = self.facts, [self.view(part) for part in request.media]
        size = self.size(request)
        known = [int(view["frames"]) for view in views]
        problems = list(self._problems(request, views, known))
        before, between, after = request.gaps
        frames = sum(known) + before.frames + after.frames + sum(gap.frames for gap in between)
        fps, inner = facts.fps, None
        if request.task == "interpolate" and known:
            frames, fps = (known[0] - 1) * request.factor + 1, fps * request.factor
        if request.task in ON_CLIPS and request.task != "interpolate":
            frames = sum(known[:1])
        if request.task == "outpaint" and views:
            inner = fit_inside(tuple(views[0]["source"]), size, (facts.height, facts.width))
        problems += self._of_amount(request, frames, size)
        stopped = any(problem.stops for problem in problems)
        return Plan([] if stopped else self._commands(request), problems, frames, size, fps=fps, inner=inner)

    def _of_amount(self, request: Request, frames: int, size: tuple[int, int]) -> Iterator[Problem]:
        """Whether a page can hold a clip, and all of them are not too many."""
        area, count, asked = size[0] * size[1], request.count, f"{frames} frames of {size[0]} x {size[1]}"
        most, step = VIEW_PIXELS // area, self.facts.geometry.temporal_granularity or self.facts.geometry.stride[0]
        if frames > most:
            before, between, after = request.gaps
            gaps = [gap for gap in (before, *between, after) if gap.frames]
            left = gaps[0].frames - -(-(frames - most) // step) * step if len(gaps) == 1 else 0
            fixes = (Fix(f"Use {left} new frames", {"gap": [gaps[0].at, left]}),) if left > 0 else ()
            yield Problem(f"{asked} are more than a page can hold; use at most {most} in all.", fixes)
        elif frames * area * count > MOST_PIXELS:
            fewer = MOST_PIXELS // (frames * area)
            use = Fix(f"{fewer} variations", {"count": fewer})
            yield Problem(f"{count} clips of {asked} are more than one request may generate.", (use,))

    def size(self, request: Request) -> tuple[int, int]:
        """(H, W) of the output: what is asked for, else that of training; in outpainting half as wide again."""
        facts = self.facts
        wider = -(-facts.width * 3 // 2 // facts.grid[1]) * facts.grid[1] if request.task == "outpaint" else facts.width
        return request.height or facts.height, request.width or wider

    def _problems(self, request: Request, views: list[Mapping[str, Any]], known: list[int]) -> Iterator[Problem]:
        yield from self._of_parts(request, views, known)
        yield from self._of_gaps(request, known)
        yield from self._of_model(request)
        yield from self._of_size(request, views)

    def _of_parts(self, request: Request, views: list[Mapping[str, Any]], known: list[int]) -> Iterator[Problem]:
        """Whether the task has its clips and pictures, and of its kind."""
        task, count, extra = request.task, len(known), request.media[1:]
        if task == "generate":
            if count:
                other = "animate" if views[0]["picture"] else "extend"
                yield _switch(
                    f"Generate starts from nothing, but {_many(count)} on the timeline.", other, request.media
                )
            return
        if not count:
            what = {"animate": "a picture", "connect": "two clips or pictures"}.get(task, "a clip")
            yield Problem(f"{task.capitalize()} needs {what}: drop a file here, or choose one or a version.")
            return
        if task == "connect" and count < 2:
            yield Problem(
                "Connect needs a second clip or picture: drop one here, or choose one or a version.", (_to("extend"),)
            )
        if task == "animate" and known[0] > 1:
            first = Fix("Use its first frame", {"cut": [request.media[0].at, 0, 1]})
            yield Problem(
                f"Animate starts from a picture, but this clip has {known[0]} frames.", (first, _to("extend"))
            )
        if task == "interpolate" and known[0] < 2:
            yield Problem("Interpolate needs a clip of two or more frames, but this is a picture.", (_to("animate"),))
        if extra and task not in ("connect", "extend", "loop"):
            yield _switch(f"{task.capitalize()} takes one clip, but {_many(count)} on the timeline.", "connect", extra)
        if extra and request.count > 1:
            yield Problem(
                "A timeline with several clips is filled once at a time.", (Fix("One variation", {"count": 1}),)
            )
        if task == "inpaint" and not request.mask:
            yield Problem("Paint over what is to be made anew, with the brush on the picture.")

    def _of_gaps(self, request: Request, known: list[int]) -> Iterator[Problem]:
        """Whether the new frames are whole groups of the VAE."""
        task, geometry, (before, between, after) = request.task, self.facts.geometry, request.gaps
        if task in ON_CLIPS or (not known and task != "generate"):
            return
        total = sum(known) + before.frames + after.frames + sum(gap.frames for gap in between)
        if task == "generate":
            if not fits(geometry, max(after.frames, 1)) or not after.frames:
                step = geometry.temporal_granularity or geometry.stride[0]
                lower = 1 + max(0, after.frames - 1) // step * step
                yield _lengths("A clip has 1 frame, or that and whole groups.", after, [lower, lower + step])
            return
        if before.frames + after.frames == 0 and len(known) == 1:
            yield Problem(
                "There is nothing to fill: add new frames.",
                (Fix(f"Add {2 * geometry.stride[0]} after", {"append": 2 * geometry.stride[0]}),),
            )
            return
        length = known[0] if known else 0
        for gap, count in zip(between, known[1:], strict=True):
            length += count + gap.frames
            yield from (
                self._gap(gap, length)
                if gap.frames
                else [
                    Problem(
                        "Two clips need new frames between them.",
                        (Fix(f"Add {2 * geometry.stride[0]}", {"insert": [gap.at, 2 * geometry.stride[0]]}),),
                    )
                ]
            )
        if task == "loop":
            step = geometry.stride[0]
            yield from self._gap(after, total - before.frames + min(known[0], step))
            if before.frames:
                yield Problem(
                    "A loop returns to the clip's first frame: nothing comes before it.",
                    (Fix("Leave it out", {"gap": [before.at, 0]}),),
                )
            return
        if task == "animate":
            if before.frames:
                yield Problem(
                    "The picture that is animated comes first.",
                    (Fix("Leave it out", {"gap": [before.at, 0]}), _to("extend")),
                )
            return
        if before.frames:
            yield from self._gap(before, total, begins_clip=True)
        if after.frames:
            yield from self._gap(after, total)

    def _gap(self, gap: Part, total: int, begins_clip: bool = False) -> Iterator[Problem]:
        near = (
            fitting_gaps(self.facts.geometry, total=total, new=gap.frames, begins_clip=begins_clip)
            if gap.frames
            else [2 * self.facts.geometry.stride[0]]
        )
        if near != [gap.frames]:
            yield _lengths(
                f"{gap.frames} new frames are not whole groups of {self.facts.geometry.stride[0]}.", gap, near
            )

    def _of_model(self, request: Request) -> Iterator[Problem]:
        """Whether the model can do the task, and has the label or takes the text."""
        facts, task, (before, between, _) = self.facts, request.task, request.gaps
        elsewhere = tuple(Fix(f"Use {name}", {"model": name}) for name in self.others[:2])
        if facts.causal and (
            task in ("connect", "loop", "interpolate") or (before.frames and request.media) or between
        ):
            forward = () if task in ("interpolate",) else (Fix("Extend forward", {"task": "extend", "before": 0}),)
            yield Problem(
                "This model only goes forward: it cannot generate frames before known ones.", (*forward, *elsewhere)
            )
        if task in ("inpaint", "outpaint") and not facts.patches:
            yield Problem("This model generates whole frames only, not parts of a picture.", (*elsewhere, _to("edit")))
        if request.caption and not facts.captions:
            yield Problem("This model takes no text.", (Fix("Leave the text out", {"caption": None}), *elsewhere))
        least, most = (1, max(facts.scales.values())) if facts.scales else (0, 100) if facts.guided else (1, 1)
        if request.guidance is not None and not least <= request.guidance <= most:
            nearest = min(max(request.guidance, least), most)
            span = f"of {least} to {exact(most)}" if most > least else "at one scale"
            yield Problem(
                f"This model has learnt guidance {span}.",
                (Fix(f"Use {exact(nearest)}", {"guidance": nearest}), *elsewhere),
            )
        label, count = request.label or "", len(facts.classes)
        numbered = label.isascii() and label.isdecimal() and len(label) < 10 and int(label) < count
        if label and label not in facts.classes and not numbered:
            what = "takes no labels" if not facts.classes else f"has no label {label[:40]!r}"
            yield Problem(f"This model {what}.", (Fix("Leave it out", {"label": None}),))
        elif facts.classes and not label and not request.caption:
            choose = (Fix(f"Use {facts.classes[0]}", {"label": facts.classes[0]}),)
            if task == "generate":
                yield Problem("Choose a label: what is to be shown.", choose)
            elif request.media:
                yield Problem(
                    "Without the label of what is shown, new frames may be of another kind.", choose, stops=False
                )

    def _of_size(self, request: Request, views: list[Mapping[str, Any]]) -> Iterator[Problem]:
        """Whether the size fits the model, and clips are cropped."""
        facts, (height, width) = self.facts, self.size(request)
        rounded = [max(grid, round(side / grid) * grid) for side, grid in zip((height, width), facts.grid, strict=True)]
        if rounded != [height, width]:
            use = Fix(f"Use {rounded[0]} x {rounded[1]}", {"size": rounded})
            yield Problem(
                f"{height} x {width} does not fit: height is a multiple of {facts.grid[0]}, width of {facts.grid[1]}.",
                (use,),
            )
        if request.task == "outpaint":
            for view in views[:1]:
                inner = fit_inside(tuple(view["source"]), (height, width), (facts.height, facts.width))
                if inner == (height, width):
                    wider = [height, width + max(1, width // 2 // facts.grid[1]) * facts.grid[1]]
                    yield Problem(
                        "There is no room around the picture.", (Fix(f"Use {wider[0]} x {wider[1]}", {"size": wider}),)
                    )
            return
        for part, view in zip(request.media, views, strict=True):
            source, ratio = view["source"], view["source"][1] / view["source"][0]
            if abs(ratio / (width / height) - 1) > _CROPPED:
                own = self._own_shape(ratio)
                fixes = (Fix(f"Generate at {own[0]} x {own[1]}", {"size": own}),) if own != [height, width] else ()
                name = Path(str(part.media)).name
                message = f"{name} is {source[0]} x {source[1]} and is cropped to {height} x {width}."
                yield Problem(message, (*fixes, _to("outpaint")) if len(views) == 1 else fixes, stops=False)

    def _own_shape(self, ratio: float) -> list[int]:
        """The (H, W) of about as many pixels as in training, in the shape of a clip."""
        facts, area = self.facts, self.facts.height * self.facts.width
        sides = ((area / ratio) ** 0.5, (area * ratio) ** 0.5)
        return [max(grid, round(side / grid) * grid) for side, grid in zip(sides, facts.grid, strict=True)]

    def _commands(self, request: Request) -> list[list[str]]:
        """The commands; all but the last write into a folder of parts, under a name that follows from what they do."""
        found: list[list[str]] = []
        steps = list(self._steps(request))
        for number, (task, inputs, options) in enumerate(steps):
            command = ["sample", "--model", self.facts.path, "--task", task]
            if inputs:
                command += ["--input", *inputs]
            command += [*options, *self._settings(request)]
            last = number == len(steps) - 1
            if not last:
                digest = hashlib.sha256("\0".join([*command, *(found[-1] if found else [])]).encode()).hexdigest()[:12]
                command += ["--output", (self.output / "parts" / f"{digest}.mp4").as_posix(), "--overwrite"]
            else:
                command += ["--output", self.output.as_posix()]
            if found:
                written = found[-1][found[-1].index("--output") + 1]
                command = [written if one == PREVIOUS else one for one in command]
            found.append(command)
        return found

    def _steps(self, request: Request) -> Iterator[tuple[str, list[str], list[str]]]:
        """Task, inputs and options of each command."""
        task, (before, between, after) = request.task, request.gaps
        paths = [self.path(part.media) for part in request.media if part.media]
        if task == "generate":
            yield task, [], ["--frames", str(after.frames)]
            return
        current = paths[0]
        if task == "animate":
            yield task, [current], ["--frames", str(1 + after.frames)]
        elif task == "interpolate":
            yield task, [current], ["--factor", str(request.factor)]
        elif task == "inpaint":
            yield task, [current], ["--mask", self.path(str(request.mask))]
        elif task == "outpaint":
            yield "inpaint", [current], []
        elif task == "edit":
            yield task, [current], ["--strength", f"{request.strength:g}"]
        else:
            for gap, path in zip(between, paths[1:], strict=True):
                yield "connect", [current, path], ["--frames", str(gap.frames)]
                current = PREVIOUS
            if task == "loop":
                yield task, [current], ["--frames", str(after.frames)]
            elif before.frames or after.frames:
                around = [("--before", before.frames), ("--after", after.frames)]
                yield "extend", [current], [text for flag, count in around if count for text in (flag, str(count))]

    def _settings(self, request: Request) -> Iterator[str]:
        """What all commands of a request share."""
        facts, (height, width) = self.facts, self.size(request)
        for flag, value in (("--class-label", request.label), ("--caption", request.caption)):
            if value is not None:  # as one argument if it would be taken for a flag
                yield from [f"{flag}={value}"] if value.startswith("-") else [flag, value]
        if height != facts.height or request.task == "outpaint":
            yield from ("--height", str(height))
        if width != facts.width or request.task == "outpaint":
            yield from ("--width", str(width))
        unconditional = request.task == "generate" and not (request.label or request.caption)
        if request.count > 1 or unconditional:  # without either, four clips are the default
            yield from ("--num-videos", str(request.count))
        yield from ("--steps", str(request.steps or facts.steps))
        if request.guidance is not None:
            yield from ("--guidance", exact(request.guidance))
            # Of two guiders that were learnt, the one that reaches so far.
            if facts.scales.get("auto", float("inf")) < request.guidance <= facts.scales.get("cfg", 0):
                yield from ("--guider", "cfg")
        yield from ("--seed", str(request.seed or 0))


def _to(task: str) -> Fix:
    return Fix(f"{task.capitalize()} instead", {"task": task})


def _switch(message: str, task: str, parts: list[Part]) -> Problem:
    """A task that does not fit: another one, or fewer parts."""
    return Problem(
        message,
        (
            _to(task),
            Fix("Take it off" if len(parts) == 1 else "Take them off", {"remove": [part.at for part in parts]}),
        ),
    )


def _many(count: int) -> str:
    return "a clip is" if count == 1 else f"{count} clips are"


def _lengths(message: str, gap: Part, near: list[int]) -> Problem:
    return Problem(message, tuple(Fix(f"Use {count}", {"gap": [gap.at, count]}) for count in near))

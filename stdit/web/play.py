"""Play a world: a page that sends keys over a WebSocket and shows the frames that follow as they are made.

Messages of the page, as JSON: {"type": "act", "action": NUMBER, [NUMBERS] or null}, what is held from now on (in a turn-based
world: one step; null: nothing); {"type":
"shown", "epoch": N}, the last group has begun to be shown, so that the next one may be made, where N is that of the last reset
or rewound (others are of frames that are gone, and are ignored); {"type": "restart", "seed": N}; {"type":
"rewind", "groups": N}; {"type": "record", "on": true or false}. The server sends JSON (hello, reset, rewound, alone, recording, recorded, error, full),
and each group as binary: a header of 8 bytes (the number of its first frame, the number of its frames, and 1 if the truth is
beside the dream), then the frames as PNG pictures, each after 4 bytes with its length.
"""

import asyncio
import io
import json
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from stdit.conditions import Actions
from stdit.data.video_write import VideoStream, to_uint8
from stdit.sampling.world import World
from stdit.web.server import Worker, page
from stdit.worlds.environments import Environment, steps_of_group

_PRESSES = 8  # keys that wait for their step in a turn-based world
_IDLE = ("stay", "noop", "none", "idle", "nothing")  # names of actions that do nothing


class Start(NamedTuple):
    """A world at its beginning: its frames so far (F, H, W, 3) uint8, and the environment that goes on beside it, or None."""

    world: World
    frames: np.ndarray
    truth: Environment | None


class Group(NamedTuple):
    """The frames (f, H, W, 3) uint8 of a step, the number of the first, and those of the truth, which may be over with them."""

    first: int
    dream: np.ndarray
    truth: np.ndarray | None = None
    over: bool = False


# From a seed, and an environment that can be used again, a new beginning.
Begin = Callable[[int, Environment | None], tuple[World, np.ndarray, Environment | None]]


@dataclass
class Stage:
    """What can be played: how a world begins, its actions, and limits.

    begin: gives a new beginning. evaluations: of the network for each group. sessions: worlds at the same time.
    recordings: folder for clips that are recorded from the page.
    """

    begin: Begin
    actions: Actions
    fps: float
    evaluations: int
    title: str
    recordings: Path
    sessions: int = 2
    open: int = field(default=0, init=False)  # worlds that are played now

    @property
    def hello(self) -> dict[str, Any]:
        """What the page needs to know."""
        space = self.actions.space
        return {
            "type": "hello", "title": self.title, "fps": self.fps, "evaluations": self.evaluations,
            "count": space.count, "width": space.width, "names": list(space.names or ()),
            "low": list(space.low or ()), "high": list(space.high or ()), "repeat": space.repeat,
            "turn_based": self.turn_based, "steps": steps_of_group(space, self.actions.stride),
        }  # fmt: skip

    @property
    def turn_based(self) -> bool:
        """Whether a world goes on by one step for each press of a key."""
        return bool((self.actions.space.environment or {}).get("turn_based"))

    @property
    def idle(self) -> int | None:
        """The action while no key is pressed; None if there is none, so that the world waits."""
        names = [str(name).lower() for name in self.actions.space.names or ()]
        return next((names.index(name) for name in _IDLE if name in names), None)

    def routes(self, worker: Worker) -> list[BaseRoute]:
        """The page, its WebSocket, and the clips that were recorded."""

        async def play(socket: WebSocket) -> None:
            await socket.accept()
            if self.open >= self.sessions:
                message = (
                    f"{self.sessions} worlds are open, as many as this server holds; close another tab and reload."
                )
                await socket.send_json({"type": "full", "message": message})
                await socket.close(1013)
                return
            self.open += 1
            try:
                await Session(self, socket, worker).run()
            finally:
                self.open -= 1

        async def recording(request: Request) -> Response:
            path = self.recordings / Path(request.path_params["name"]).name
            return FileResponse(path) if path.is_file() else PlainTextResponse("there is no such recording", 404)

        return [page("play.html"), WebSocketRoute("/play", play), Route("/recordings/{name}", recording)]


class Session:
    """One tab: a world of its own, what is held, and whether the page is ready for the next group."""

    def __init__(self, stage: Stage, socket: WebSocket, worker: Worker):
        self.stage, self.socket, self.worker = stage, socket, worker
        self.held: Any = None  # what goes on from now on; None: the world waits
        self.presses: deque[Any] = deque(maxlen=_PRESSES)  # of a turn-based world, one step each
        self.ready, self.acted = asyncio.Event(), asyncio.Event()
        self.epoch = 0  # counts restarts and rewinds, after which frames that are on their way are not shown
        self.jobs: asyncio.Queue[Callable[[], Any]] = asyncio.Queue()  # restarts and the like, run between groups
        self.recorder: VideoStream | None = None
        self.start: Start | None = None
        # The truth, also after a rewind, so that it is used again and closed.
        self.environment: Environment | None = None

    async def run(self) -> None:
        """Play until the tab closes."""
        listening = asyncio.create_task(self._listen())
        try:
            await self.socket.send_json(self.stage.hello)
            self.jobs.put_nowait(lambda: self._restart(0))
            while not listening.done():
                await self._next(listening)
        except (WebSocketDisconnect, RuntimeError):  # the tab closed while something was sent
            pass
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            self.start = None
            with suppress(OSError):
                self._stop_recording()
            if self.environment is not None:
                self.environment.env.close()

    async def _next(self, listening: asyncio.Task) -> None:
        """Run what was asked for, or make and send the next group as soon as the page is ready for it."""
        job, go = asyncio.create_task(self.jobs.get()), asyncio.create_task(self._may_go_on())
        done, _ = await asyncio.wait([job, go, listening], return_when=asyncio.FIRST_COMPLETED)
        for waiting in {job, go} - done:
            waiting.cancel()
        try:
            if job in done:
                await job.result()()
            elif go in done:
                self.ready.clear()
                if self.start is None:  # it could not begin
                    return
                action = self.presses.popleft() if self.presses else self.held
                self._wait_if_idle()
                if action is None:  # what was held has been let go since: the page is ready for the next
                    self.ready.set()
                    return
                await self._send(await self.worker.run(self._step, action))
        except WebSocketDisconnect:
            raise
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            # The world is as before, and can be restarted.
            await self._tell_error(error)

    def _wait_if_idle(self) -> None:
        """Wait before the next group unless something is held or was pressed."""
        if self.held is None and not self.presses:
            self.acted.clear()
        else:
            self.acted.set()

    async def _may_go_on(self) -> None:
        await self.ready.wait()
        await self.acted.wait()

    def _step(self, action: Any) -> Group:
        """The next group and, beside it, what the environment does; runs in the worker."""
        assert self.start is not None
        world, truth = self.start.world, self.start.truth
        first, size = world.frames, world.group
        dream = to_uint8(world.step(action)[0])
        real, over = None, False
        if truth is not None:
            repeat = self.stage.actions.space.repeat
            steps = list(truth.act(action, size, dream.shape[1:3], repeat=repeat))
            over, pictures = steps[-1].done, [step.picture for step in steps]
            real = np.stack([pictures[min(i, len(pictures) - 1)] for i in range(size)])
        if self.recorder is not None:
            self.recorder.add(dream if real is None else np.concatenate([dream, real], axis=2))
        return Group(first, dream, real, over)

    async def _send(self, group: Group) -> None:
        parts = [struct.pack("<IHH", group.first, len(group.dream), int(group.truth is not None))]
        for frame in (*group.dream, *(() if group.truth is None else group.truth)):
            picture = _png(frame)
            parts += [struct.pack("<I", len(picture)), picture]
        await self.socket.send_bytes(b"".join(parts))
        if group.over:
            await self._end_truth("the episode of the environment is over; the dream goes on alone")

    async def _end_truth(self, reason: str) -> None:
        """Go on without the truth, and end a recording, whose pictures would get another size."""
        assert self.start is not None
        if self.start.truth is not None:
            self.start = self.start._replace(truth=None)
            if self.recorder is not None:
                await self._record(False)
            await self.socket.send_json({"type": "alone", "message": reason})

    async def _tell_error(self, error: BaseException) -> None:
        with suppress(RuntimeError, WebSocketDisconnect):
            await self.socket.send_json({"type": "error", "message": " ".join(str(error).split())[:300]})

    async def _listen(self) -> None:
        """Read messages until the tab closes; one that is not understood is refused, and the connection stays."""
        while True:
            message = await self.socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            try:
                self._take(_parsed(message.get("text") or ""))
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                await self._tell_error(error)

    def _take(self, message: Any) -> None:
        """Do what a message says; ValueError for one that is none of those of this module's docstring."""
        kind = message.get("type") if isinstance(message, Mapping) else None
        if kind == "act":
            action = _given(message, "action")
            self._act(None if action is None else self.stage.actions.number(action))
        elif kind == "shown":
            if _whole(_given(message, "epoch"), "epoch", 2**53) == self.epoch:
                self.ready.set()
        elif kind == "restart":
            seed = _whole(message.get("seed", 0), "seed", 2**31)
            self.jobs.put_nowait(lambda: self._restart(seed))
        elif kind == "rewind":
            groups = _whole(message.get("groups", 1), "groups", 10**6)
            self.jobs.put_nowait(lambda: self._rewind(groups))
        elif kind == "record":
            on = _given(message, "on")
            if not isinstance(on, bool):
                raise ValueError(f"on={str(on)[:40]!r} of a message record is neither true nor false.")
            self.jobs.put_nowait(lambda: self._record(on))
        else:
            raise ValueError(
                f"a message of type {str(kind)[:40]!r} is no action; send act, shown, restart, rewind or record."
            )

    def _act(self, action: Any) -> None:
        """Hold an action from now on (None: the idle one), or, in a turn-based world, take one step with it."""
        if not self.stage.turn_based:
            self.held = self.stage.idle if action is None else action
        elif action is not None:
            self.presses.append(action)
        self._wait_if_idle()

    async def _restart(self, seed: int) -> None:
        """Begin a new clip; what is held goes on."""
        self.presses.clear()
        self._act(self.held)
        if self.recorder is not None:
            await self._record(False)
        self.start = Start(*await self.worker.run(self.stage.begin, seed, self.environment))
        self.environment = self.start.truth
        self._new_epoch()
        reset = {"type": "reset", "epoch": self.epoch, "seed": seed, "truth": self.start.truth is not None}
        await self.socket.send_json(reset)
        if len(self.start.frames):
            last = self.start.frames[-1:]
            await self._send(Group(self.start.world.frames - 1, last, last if self.start.truth is not None else None))
        else:
            self.ready.set()

    async def _rewind(self, groups: int) -> None:
        """Take back some groups; the truth, which cannot go back, ends."""
        if self.start is None:
            raise ValueError("there is no world that could be taken back, since none could begin; restart.")
        self.start.world.rewind(min(groups, self.start.world.rewindable))
        self._new_epoch()
        await self._end_truth("the truth cannot go back; the dream goes on alone")
        await self.socket.send_json({"type": "rewound", "epoch": self.epoch, "frames": self.start.world.frames})
        self.ready.set()

    def _new_epoch(self) -> None:
        """Ignore from now on that frames of before are shown."""
        self.epoch += 1
        self.ready.clear()

    async def _record(self, on: bool) -> None:
        """Begin or end a recording of what is shown."""
        name = self._stop_recording()
        if on:
            self.stage.recordings.mkdir(parents=True, exist_ok=True)
            stamp = time.strftime("%Y%m%d-%H%M%S") + f"-{time.time_ns() % 10**6:06d}"
            self.recorder = VideoStream(self.stage.recordings / f"{stamp}.mp4", self.stage.fps).__enter__()
            await self.socket.send_json({"type": "recording"})
        else:
            await self.socket.send_json({"type": "recorded", "url": None if name is None else f"/recordings/{name}"})

    def _stop_recording(self) -> str | None:
        """End a recording -> its name, None if there is none or it has no frames."""
        recorder, self.recorder = self.recorder, None
        if recorder is None:
            return None
        recorder.__exit__(None, None, None)
        return recorder.path.name if recorder.path.is_file() else None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{text[:40]!r} is no message in JSON; send an object with a type.") from error


def _given(message: Mapping[str, Any], name: str) -> Any:
    if name not in message:
        raise ValueError(f"a message of type {message['type']!r} has no {name!r}; give one.")
    return message[name]


def _whole(value: Any, name: str, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"{name}={str(value)[:40]!r} is no whole number from 0 to {most}.")
    return value


def _png(frame: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, "png", compress_level=1)
    return stream.getvalue()

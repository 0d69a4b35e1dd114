"""The studio: a page with a timeline on which clips, pictures and gaps are laid and filled by a trained model.

What changes is sent to every tab over a WebSocket (/events), as JSON: {"type": "hello", ...} with everything, then "job" and
"versions". What a tab asks for goes by HTTP under /api; a request that is refused is answered with 409 and
{"problem": {"message", "fixes"}}, one line and the buttons that would help.
"""

import asyncio
import secrets
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket

from stdit.sampling.pipeline import STDiTPipeline
from stdit.web.server import Worker, page
from stdit.web.studio_history import History, made_with
from stdit.web.studio_http import Answer, answered, read_body, read_first, read_look
from stdit.web.studio_jobs import Job, Jobs, Progress
from stdit.web.studio_media import LARGEST_UPLOAD, MOST_SECONDS, Look, Media, TooLong, readable
from stdit.web.studio_models import Facts, Models
from stdit.web.studio_plan import Plan, Planner
from stdit.web.studio_problems import Fix, Refused
from stdit.web.studio_request import LONGEST_TEXT, Part, Request
from stdit.web.studio_runs import Runs
from stdit.web.studio_tab import Tab

TABS = 16


@dataclass
class Made:
    """What one command wrote. size: frames, height, width of its clips."""

    paths: list[Path]
    size: tuple[int, int, int]
    fps: float
    warnings: list[str]


# From the arguments of `stdit sample ...`, a loaded pipeline and a progress, the clips that it wrote; Refused in one line.
Sample = Callable[[list[str], STDiTPipeline, Progress], Made]


@dataclass
class Studio:
    """The state of the server: models, files, jobs and versions, which all tabs share.

    sample: runs one command in the worker. output: the folder that is written to. runs: that of training runs.
    """

    models: Models
    sample: Sample
    output: Path
    runs: Runs
    worker: Worker
    files: Worker = field(default_factory=lambda: Worker("files"))  # decodes clips while the model is at work
    boot: str = field(default_factory=lambda: secrets.token_hex(6))

    def __post_init__(self) -> None:
        self.media, self.history = Media(self.output), History(self.output)
        self.jobs = Jobs(self.worker, self._run, self._job_changed)
        self._tabs: set[Tab] = set()

    def close(self) -> None:
        """End what is running, since the server stops."""
        self.jobs.close()
        self.files.close()

    def routes(self) -> list[BaseRoute]:
        """The page, its WebSocket, and what it asks for."""
        rows: list[tuple[str, str, Answer]] = [
            ("GET", "/api/model/{name:path}", self._model),
            ("POST", "/api/plan", self._plan),
            ("POST", "/api/jobs", self._start),
            ("DELETE", "/api/jobs/{id}", self._cancel),
            ("POST", "/api/media", self._upload),
            ("POST", "/api/cut", self._cut),
            ("GET", "/api/view/{name:path}", self._view),
            ("GET", "/sheet/{number:int}/{name:path}", self._sheet),
            ("GET", "/download/{format}/{name:path}", self._download),
            ("GET", "/api/runs", self._runs),
            ("GET", "/api/runs/{name}", self._one_run),
            ("GET", "/preview/{run}/{name}", self._preview),
        ]
        routes = [Route(path, answered(answer), methods=[method]) for method, path, answer in rows]
        return [page("studio.html"), WebSocketRoute("/events", self._events), *routes]

    # What changes

    async def _events(self, socket: WebSocket) -> None:
        await socket.accept()
        if len(self._tabs) >= TABS:
            await socket.send_json({"type": "full", "message": f"{TABS} tabs are open, as many as this server holds."})
            await socket.close(1013)
            return
        tab = Tab(socket)
        tab.tell(
            "hello", self._hello()
        )  # without waiting for anything, so that it is told of all that changes from now on
        self._tabs.add(tab)
        try:
            await tab.run()
        finally:
            self._tabs.discard(tab)

    def _hello(self) -> dict[str, Any]:
        return {
            "type": "hello", "boot": self.boot, "models": self.models.listing(), "versions": self.history.versions(),
            "jobs": self.jobs.listing(), "output": self.output.as_posix(), "upload": LARGEST_UPLOAD, "seconds": MOST_SECONDS,
            "text": LONGEST_TEXT,
        }  # fmt: skip

    def _job_changed(self, job: Job) -> None:
        if job.state not in ("waiting", "running"):
            self._tell_versions()
        message = {"type": "job", "job": job.as_json()}
        for tab in self._tabs:
            tab.tell(f"job {job.id}", message)

    def _tell_versions(self) -> None:
        """Tell the tabs which versions there are, since one was made, or may have been removed by somebody."""
        made = {"type": "versions", "versions": self.history.versions()}
        for tab in self._tabs:
            tab.tell("versions", made)

    # What tabs ask for

    async def _facts(self, name: str) -> Facts:
        """The facts of a model, which is loaded first if it is new."""
        found = self.models.known(name)
        return found if found is not None else await self.worker.run(self.models.facts, name)

    async def _model(self, http: HttpRequest) -> Response:
        return JSONResponse((await self._facts(http.path_params["name"])).as_json())

    async def _planned(self, http: HttpRequest) -> tuple[Request, Plan]:
        """The request in a body, with a seed, and its plan."""
        request = Request.read(await read_body(http))
        if request.seed is None:
            request = replace(request, seed=secrets.randbelow(2**31))
        facts = await self._facts(request.model)
        return request, await self.files.run(self._plan_of, request, facts)

    def _plan_of(self, request: Request, facts: Facts) -> Plan:
        height, width = request.height or facts.height, request.width or facts.width
        size = (facts.height, facts.width) if request.task == "outpaint" else (height, width)
        others = [
            one["name"] for one in self.models.listing() if one.get("causal") is False and one["name"] != facts.name
        ]

        def view(part: Part) -> dict[str, Any]:
            path = self.media.path(str(part.media))
            try:
                with readable(path):
                    return self.media.view(path, Look(*size, facts.fps)).facts()
            except TooLong as error:
                use = Fix(f"Use its first {error.fitting} frames", {"cut": [part.at, 0, error.fitting]})
                raise Refused(error.problem.message, use) from error

        def path(name: str) -> str:
            return self.media.path(name).as_posix()

        planner = Planner(facts, view, path, output=self.output, others=tuple(others))
        plan = planner.plan(request)
        made = self.history.made_by(plan.commands)
        if made is None or made_with(made, facts.written):
            return plan
        # The model was trained on since: beside what it made before, which would have the same name.
        folder = time.strftime("model-%Y%m%d-%H%M%S", time.localtime(facts.written / 1e6))
        return planner._replace(output=self.output / folder).plan(request)

    async def _plan(self, http: HttpRequest) -> Response:
        request, plan = await self._planned(http)
        found = {**plan._asdict(), "seed": request.seed, "problems": [problem.as_json() for problem in plan.problems]}
        return JSONResponse({**found, "commands": [shlex.join(["stdit", *command]) for command in plan.commands]})

    async def _start(self, http: HttpRequest) -> Response:
        request, plan = await self._planned(http)
        if plan.stopped:
            problem = next(problem for problem in plan.problems if problem.stops)
            raise Refused(problem.message, *problem.fixes)
        if (made := self.history.made_by(plan.commands)) is not None:
            again = Fix("Draw another seed", {"seed": None}), Fix("Show it", {"show": made["name"]})
            raise Refused(f"These settings and this seed made v{made['number']} already.", *again)
        job = Job(request.as_json(), plan.commands)
        self.jobs.add(job)
        return JSONResponse(job.as_json(), 202)

    async def _cancel(self, http: HttpRequest) -> Response:
        self.jobs.cancel(http.path_params["id"])
        return JSONResponse({})

    def _run(self, job: Job, progress: Progress) -> list[str]:
        """Do the commands of a job in the worker -> the names of the versions."""
        pipe, model = self.models.read(job.request["model"])
        self.output.mkdir(parents=True, exist_ok=True)
        hook = pipe.transformer.register_forward_pre_hook(progress.check)  # causal models have many steps for a frame
        warned: list[str] = []
        try:
            for command in progress(job.commands):
                made = self.sample(command[1:], pipe, progress)
                warned += made.warnings
        finally:
            hook.remove()
        names = [self.media.name(path) for path in made.paths]
        frames, height, width = made.size
        facts = {
            "frames": frames,
            "height": height,
            "width": width,
            "fps": made.fps,
            "warnings": list(dict.fromkeys(warned)),
            "model_written": model.written,
        }
        self.history.add(job, names, facts=facts)
        return names

    async def _upload(self, http: HttpRequest) -> Response:
        """Take the body as a file; its name, the look and what to keep of it are in the query."""
        if int(http.headers.get("content-length") or 0) > LARGEST_UPLOAD:
            raise Refused(f"the file has more than the {LARGEST_UPLOAD >> 20} MB that are taken; compress or cut it.")
        look, first = read_look(http), read_first(http)
        path, new = await self.media.receive(http.query_params.get("name", ""), http.stream())

        def admit() -> str:
            with readable(path):
                return self.media.admit(path, look, new=new, first=first)

        name = await self.files.run(admit)
        return await self._view_of(name, look)

    async def _cut(self, http: HttpRequest) -> Response:
        """Keep some frames of a clip, as a clip or picture of its own."""
        given = await read_body(http)
        try:
            name, begin, end = str(given["name"]), int(given["begin"]), int(given["end"])
        except (KeyError, TypeError, ValueError) as error:
            raise Refused("a cut needs a name, begin and end.") from error
        if not 0 <= begin < end <= 2**20:
            raise Refused(f"frames {begin} to {end} are none; the end comes after the beginning.")
        path, look = self.media.path(name), read_look(http)

        def cut() -> str:
            with readable(path):
                return self.media.cut(path, look, begin, end)

        return await self._view_of(await self.files.run(cut), look)

    async def _view(self, http: HttpRequest) -> Response:
        try:
            return await self._view_of(http.path_params["name"], read_look(http))
        except Refused:
            # Told for a file that is gone alone: tabs that draw their versions again would ask for another one again.
            if not self.media.has(http.path_params["name"]):
                self._tell_versions()
            raise

    async def _view_of(self, name: str, look: Look) -> Response:
        path = self.media.path(name)

        def view() -> dict[str, Any]:
            with readable(path):
                return self.media.view(path, look).facts()

        return JSONResponse({"name": name, **await self.files.run(view)})

    async def _sheet(self, http: HttpRequest) -> Response:
        path, look, number = self.media.path(http.path_params["name"]), read_look(http), http.path_params["number"]

        def sheet() -> bytes:
            with readable(path):
                sheets = self.media.view(path, look).sheets
            if number >= len(sheets):
                raise Refused(f"{path.name} has {len(sheets)} sheets.")
            return sheets[number]

        return Response(await self.files.run(sheet), media_type="image/webp", headers={"cache-control": "max-age=3600"})

    async def _download(self, http: HttpRequest) -> Response:
        path, suffix = self.media.path(http.path_params["name"]), f".{http.path_params['format']}"
        if suffix not in (".mp4", ".gif", ".png"):
            raise Refused(f"{suffix[:10]} is none of mp4, gif and png.")

        def convert() -> Path:
            with readable(path):
                return self.media.converted(path, suffix)

        found = await self.files.run(convert)
        return FileResponse(found, filename=found.name)

    async def _runs(self, http: HttpRequest) -> Response:
        return JSONResponse({"runs": await asyncio.to_thread(self.runs.listing), "models": self.models.listing()})

    async def _one_run(self, http: HttpRequest) -> Response:
        return JSONResponse(await self.files.run(self.runs.run, http.path_params["name"]))

    async def _preview(self, http: HttpRequest) -> Response:
        return FileResponse(self.runs.preview(http.path_params["run"], http.path_params["name"]))

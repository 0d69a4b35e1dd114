"""The server of the pages: one process, one worker that runs the model, and only this machine as client."""

import asyncio
import socket
import webbrowser
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import FileResponse, PlainTextResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

STATIC = Path(__file__).parent / "static"
LOCAL = ("127.0.0.1", "localhost")
LARGEST_MESSAGE = 1 << 16  # bytes of a client's message
# Of every answer: nothing is loaded from elsewhere, and no other site shows it in a frame, where clicks could be led.
POLICY = {
    b"content-security-policy": b"default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'",
    b"x-frame-options": b"DENY",
}


class Worker:
    """A thread that does one call after another: the one that runs the model, since torch uses all cores for one call."""

    def __init__(self, name: str = "model") -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the worker, and wait for it without blocking the pages."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def begin(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call a function in the worker ahead of what will be asked for, and do not wait for it."""
        self._pool.submit(function, *arguments)

    def close(self) -> None:
        """End the thread after the call that is running."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class LocalOnly:
    """Answers only requests that a page of this server makes: another site that is open in the browser gets nothing."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on if its host is this machine, and neither origin nor browser says that another site asks."""

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *POLICY.items()]}
            await send(message)

        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        elif _own(Headers(scope=scope), scope["path"]):
            await self.app(scope, receive, guarded)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await PlainTextResponse("this server answers its own pages only", 403)(scope, receive, guarded)


def _own(headers: Headers, path: str) -> bool:
    """Whether this machine asks, and a page of this server; or somebody who follows a link to the page itself."""
    host, origin = headers.get("host", ""), headers.get("origin")
    if (host.rpartition(":")[0] or host) not in LOCAL or (origin is not None and urlsplit(origin).netloc != host):
        return False
    # GETs without an origin, as of a picture in another site, are known by what browsers say of themselves alone.
    if headers.get("sec-fetch-site", "none") in ("same-origin", "none"):
        return True
    return path == "/" and headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"


def page(name: str) -> Route:
    """The route "/" of a page in `static`."""
    return Route("/", lambda request: FileResponse(STATIC / name))


def make_app(routes: Sequence[BaseRoute], worker: Worker, close: Callable[[], None] = lambda: None) -> Starlette:
    """The application of some routes, and of the files in `static`. close: called when the server stops."""

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        yield
        close()
        worker.close()

    return Starlette(
        routes=[*routes, Mount("/static", StaticFiles(directory=STATIC))],
        middleware=[Middleware(LocalOnly)],
        lifespan=life,
    )


def open_port(port: int) -> socket.socket:
    """A socket on 127.0.0.1; ValueError if the port is in use. 0: any that is free."""
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((LOCAL[0], port))
        found.listen()
    except (OSError, OverflowError) as error:
        found.close()
        raise ValueError(
            f"--port {port} cannot be used ({getattr(error, 'strerror', None) or error}); give another one, or 0 for any that is free."
        ) from error
    return found


def address(opened: socket.socket) -> str:
    """The address of the page that a socket will serve."""
    return f"http://{LOCAL[0]}:{opened.getsockname()[1]}/"


def serve(app: Starlette, opened: socket.socket, *, browser: bool) -> None:
    """Say where the page is, open it in a browser or not, and serve until Ctrl-C."""
    import uvicorn

    print(f"{address(opened)}   (Ctrl-C stops)", flush=True)
    if browser:
        webbrowser.open(address(opened))
    config = uvicorn.Config(app, log_level="warning", ws="websockets-sansio", ws_max_size=LARGEST_MESSAGE)
    uvicorn.Server(config).run(sockets=[opened])

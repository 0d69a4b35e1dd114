"""What a tab of the studio asks for by HTTP: bodies and queries within bounds, and refusals as answers."""

import json
import math
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from stdit.web.server import LARGEST_MESSAGE
from stdit.web.studio_media import MOST_SECONDS, Look
from stdit.web.studio_problems import Problem, Refused, said_of

Answer = Callable[[HttpRequest], Awaitable[Response]]


def answered(answer: Answer) -> Answer:
    """What is refused, or was lost on the way, as an answer of one line."""

    async def found(http: HttpRequest) -> Response:
        try:
            return await answer(http)
        except Refused as error:
            problem = error.problem
        except (ValueError, OSError) as error:
            problem = Problem(said_of(error))
        return JSONResponse({"problem": problem.as_json()}, 409)

    return found


async def read_body(http: HttpRequest) -> Any:
    """The JSON of a request, within bounds."""
    text = bytearray()
    async for part in http.stream():
        text += part
        if len(text) > LARGEST_MESSAGE:
            raise Refused(f"a request has at most {LARGEST_MESSAGE >> 10} kB.")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused("a request is JSON.") from error


def read_first(http: HttpRequest) -> float | None:
    """The seconds in a query that are kept of a clip, or none."""
    given = http.query_params.get("first")
    try:
        seconds = None if given is None else float(given)
    except ValueError:
        seconds = math.nan
    if seconds is not None and not 0 < seconds <= MOST_SECONDS:  # also for not-a-number
        raise Refused(f"first={str(given)[:20]} is no number of seconds up to {MOST_SECONDS:g}.")
    return seconds


def read_look(http: HttpRequest) -> Look:
    """The look in a query: height, width and fps, or none."""
    given = http.query_params
    if "height" not in given:
        return Look()
    try:
        height, width, fps = int(given["height"]), int(given["width"]), float(given["fps"])
    except (KeyError, ValueError) as error:
        raise Refused("a look is a height, a width and a rate.") from error
    if not (1 <= height <= 4096 and 1 <= width <= 4096 and 0 < fps <= 240):
        raise Refused(f"{height} x {width} at {fps:g} fps cannot be shown.")
    return Look(height, width, fps)

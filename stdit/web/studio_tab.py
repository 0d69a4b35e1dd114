"""A tab of the studio, and what it is told."""

import asyncio
import json
from collections import OrderedDict
from contextlib import suppress
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect


class Tab:
    """A tab that is told what changes; of several messages of one kind that wait it gets the last."""

    def __init__(self, socket: WebSocket):
        self._socket = socket
        self._waiting: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._some = asyncio.Event()

    def tell(self, kind: str, message: dict[str, Any]) -> None:
        """Send a message when the tab can take it."""
        self._waiting[kind] = message
        self._some.set()

    async def run(self) -> None:
        """Send until the tab closes."""
        closed = asyncio.create_task(self._closed())
        try:
            while not closed.done():
                some = asyncio.create_task(self._some.wait())
                await asyncio.wait([some, closed], return_when=asyncio.FIRST_COMPLETED)
                some.cancel()
                self._some.clear()
                while self._waiting and not closed.done():
                    # In ASCII, since names of folders need not be texts.
                    await self._socket.send_text(json.dumps(self._waiting.popitem(last=False)[1]))
        except (WebSocketDisconnect, RuntimeError):  # it closed while something was sent
            pass
        finally:
            closed.cancel()
            with suppress(asyncio.CancelledError):
                await closed

    async def _closed(self) -> None:
        while (await self._socket.receive())["type"] != "websocket.disconnect":
            pass

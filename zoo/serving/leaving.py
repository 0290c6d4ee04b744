"""Clients that leave before their answer is whole: nothing more is generated for them."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse

from zoo.serving.answers import Row

T = TypeVar("T")


class Events(StreamingResponse):
    """Server-sent events of rows, which end with the response, even where the client left ahead of the first event.

    Args:
        events: texts to send.
        rows: whose answers they are.
        headers: of HTTP.
    """

    def __init__(self, events: AsyncIterator[str], rows: Sequence[Row], headers: dict[str, str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.rows = rows

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            cancel(self.rows)


def cancel(rows: Sequence[Row]) -> None:
    """Let rows end at their next token."""
    for row in rows:
        row.cancelled = True


async def unless_left(request: Request, awaited: Coroutine[Any, Any, T]) -> T | None:
    """Return what is awaited; None once the client has closed its connection."""
    found, left = asyncio.ensure_future(awaited), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({found, left}, return_when=asyncio.FIRST_COMPLETED)
        return found.result() if found.done() else None
    finally:
        found.cancel()
        left.cancel()


async def _left(request: Request) -> None:
    """Return once the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass

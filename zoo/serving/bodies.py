"""Bodies of requests: refused by their headers where that is possible, and read within bounds on bytes and seconds."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from starlette.requests import ClientDisconnect, Request

from zoo.serving.protocol import RequestError

SECONDS = 30.0  # without a byte, after which a request is given up
LINGER = 5.0  # seconds for the rest of a body that is refused


def require_size(request: Request, most: int) -> None:
    """Refuse a body that is larger than `most` bytes by its own account, or of another type, before it is read.

    Raises:
        RequestError: it is.
    """
    # A page in a browser may send plain text to any address, but JSON only where the server allows it.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError("The content type has to be application/json.", status=415)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise _too_large(most)


async def read_json(request: Request, most: int) -> Any:
    """Read a body of up to `most` bytes; one that is sent in pieces need not have stated its size.

    Raises:
        RequestError: it is larger, does not come, or is not JSON.
    """
    body, parts = bytearray(), _parts(request, SECONDS)
    async for part in parts:
        body += part
        if len(body) > most:
            body.clear()
            await _drop(parts)
            raise _too_large(most)
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The request is not JSON: {error}") from error


async def drop_body(request: Request) -> None:
    """Read what is left of a refused request, for `LINGER` seconds at most, and keep nothing.

    Most clients send all of a request before they read: if the connection were closed ahead of that, they would find it
    broken, and not the reason.
    """
    await _drop(_parts(request, LINGER))


async def _drop(parts: AsyncIterator[bytes]) -> None:
    with suppress(RequestError, TimeoutError):
        async with asyncio.timeout(LINGER):
            async for _ in parts:
                pass


async def _parts(request: Request, seconds: float) -> AsyncIterator[bytes]:
    """Yield the parts of a body.

    Raises:
        RequestError: the next one took longer than `seconds`.
    """
    parts = request.stream().__aiter__()
    while True:
        try:
            yield await asyncio.wait_for(anext(parts), seconds)
        except StopAsyncIteration:
            return
        except ClientDisconnect as error:
            raise RequestError("The client left before its request was whole.", status=499) from error
        except TimeoutError as error:
            raise RequestError(f"The body did not come within {seconds:g} seconds.", status=408) from error


def _too_large(most: int) -> RequestError:
    return RequestError(f"The request has more than {most} bytes.", status=413, code="request_too_large")

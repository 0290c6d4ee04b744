"""The HTTP application of `zoo serve`: OpenAI's chat completions, on one model and with any pruner of it."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from zoo.loading.other_pruners import Pruned, words_for
from zoo.registry import Dialog, LengthError, Sample, ZooError
from zoo.runs.lengths import length_of, room_for_answer
from zoo.serving import protocol
from zoo.serving.answers import Piece, Row, described
from zoo.serving.batches import Batcher, ClosedError
from zoo.serving.bodies import drop_body, read_json, require_size
from zoo.serving.leaving import Events, cancel, unless_left
from zoo.serving.pictures import Pictures
from zoo.serving.protocol import Ask, Choice, RequestError
from zoo.text.batch import EncodedSample

log = logging.getLogger("zoo.serve")

DECODERS = 2  # threads that decode images and tokenize


@dataclass(frozen=True)
class Limits:
    """What the server takes.

    Args:
        queue: requests that wait; more are refused with 429.
        body: bytes of a request.
        max_tokens: of an answer whose request states none.
    """

    queue: int = 64
    body: int = 64 << 20
    max_tokens: int = 1024


@dataclass
class Prepared:
    """A request that is ready to be generated."""

    ask: Ask
    model: Any
    processor: Any
    prompt: EncodedSample
    limit: int
    image_tokens: int


class Server:
    """Answers requests.

    Args:
        name: of the model in requests.
        pruned: the model, with any pruner.
        batcher: generates.
        pictures: takes images.
        limits: on requests.
        api_key: that requests have to bring; empty: none.
        listed: pruners that /v1/models names, as `random` or `random:0.5`; requests may ask for others too.
    """

    def __init__(
        self,
        name: str,
        pruned: Pruned,
        batcher: Batcher,
        pictures: Pictures,
        limits: Limits = Limits(),
        api_key: str = "",
        listed: Sequence[str] = (),
    ) -> None:
        self.name, self.pruned, self.listed = name, pruned, [name, *(f"{name}@{pruner}" for pruner in listed)]
        self.batcher, self.pictures, self.limits, self.api_key = batcher, pictures, limits, api_key
        self.created = int(time.time())
        self.preparing = 0  # requests whose images are decoded, or that wait for it
        self._named: set[str] = set()  # ignored fields that were logged
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="zoo-decode")

    def app(self) -> Starlette:
        """Return the ASGI application."""

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            yield
            await asyncio.to_thread(self.close)

        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {RequestError: _refused, HTTPException: _http_error, Exception: _failed}
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)

    def close(self) -> None:
        """End what is running."""
        self.batcher.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)

    # ---- routes ----------------------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        """Whether the server takes requests, and how many wait."""
        state: dict[str, Any] = {"status": "closing" if self.batcher.closed else "ok", "model": self.name}
        state |= {"waiting": self.preparing + len(self.batcher.waiting), "running": len(self.batcher.running)}
        state |= {"batches": self.batcher.batches, "answers": self.batcher.rows}
        return JSONResponse(state, 503 if self.batcher.closed else 200)

    async def models(self, request: Request) -> Response:
        """List the model, alone and with pruners."""
        self._authorize(request)
        return JSONResponse({"object": "list", "data": [protocol.model_entry(n, self.created) for n in self.listed]})

    async def one_model(self, request: Request) -> Response:
        """Describe the model."""
        self._authorize(request)
        name = request.path_params["name"]
        pruner, keep_ratio = self._pruner_of(name)
        if pruner is not None:
            try:
                words_for(pruner, keep_ratio)
            except ZooError as error:
                raise RequestError(str(error), status=404, code="model_not_found", param="model") from error
        return JSONResponse(protocol.model_entry(name, self.created))

    async def complete(self, request: Request) -> Response:
        """Answer a conversation, whole or as it is generated."""
        await self._admit(request)
        ask = protocol.read_ask(await read_json(request, self.limits.body))
        self._read_pruner(ask)
        self._note(ask)
        self._require_place(ask.n)
        self.preparing += 1
        try:
            prepared = await asyncio.get_running_loop().run_in_executor(self._decoders, self.prepare, ask)
        finally:
            self.preparing -= 1
        self._require_place(ask.n)
        pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        rows = self._rows(prepared, pieces)
        try:
            self.batcher.add(rows)
        except ClosedError as error:
            raise RequestError(str(error), status=503, code="shutting_down") from error
        if ask.stream:
            return await self._streamed(request, prepared, rows, pieces)
        return await self._whole(request, prepared, rows, pieces)

    # ---- a request -------------------------------------------------------------------------------------------------

    async def _admit(self, request: Request) -> None:
        """Refuse, by its headers alone, a request whose body would be read for nothing."""
        try:
            self._authorize(request)
            require_size(request, self.limits.body)
            self._require_place(1)
        except RequestError:
            await drop_body(request)
            raise

    def _authorize(self, request: Request) -> None:
        if not self.api_key:
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self.api_key.encode()):
            raise RequestError("The API key is missing or wrong.", status=401, code="invalid_api_key")

    def _read_pruner(self, ask: Ask) -> None:
        """Take the pruner from the name of the model, if it is there."""
        pruner, keep_ratio = self._pruner_of(ask.model)
        if pruner is None:
            return
        if ask.pruner is not None or ask.keep_ratio is not None:
            raise RequestError("The pruner is in the name of the model and in a field: give it once.", param="pruner")
        ask.pruner, ask.keep_ratio = pruner, keep_ratio

    def _pruner_of(self, name: str) -> tuple[str | None, float | None]:
        """Read `MODEL`, `MODEL@pruner` or `MODEL@pruner:keep_ratio`.

        Raises:
            RequestError: it is another model, or the ratio is not in (0, 1].
        """
        if name == self.name:
            return None, None
        start = f"{self.name}@"
        if not name.startswith(start):
            raise RequestError(
                f"There is no model {name!r:.80} here; this server has {self.name!r}.",
                status=404,
                code="model_not_found",
                param="model",
            )
        pruner, colon, ratio = name.removeprefix(start).partition(":")
        try:
            keep_ratio = float(ratio) if colon else None
        except ValueError:
            keep_ratio = -1.0
        if keep_ratio is not None and not 0 < keep_ratio <= 1:
            raise RequestError(f"The keep ratio {ratio!r:.20} has to be above 0 and at most 1.", param="model")
        return pruner, keep_ratio

    def _note(self, ask: Ask) -> None:
        """Log ignored fields, each once."""
        for name in ask.ignored:
            if name not in self._named and len(self._named) < 100:
                self._named.add(name)
                log.warning("requests have the field %s, which is ignored", name)

    def _require_place(self, answers: int) -> None:
        waiting = self.preparing + len(self.batcher.waiting)
        if waiting + answers > self.limits.queue:
            raise RequestError(
                f"{waiting} answers are waiting already; at most {self.limits.queue} do. Try again later.",
                status=429,
                code="queue_full",
            )

    def prepare(self, ask: Ask) -> Prepared:
        """Decode the images of a request, and encode its prompt.

        Raises:
            RequestError: the pruner or the conversation does not fit the model, or an image cannot be used.
        """
        try:
            model, processor = self.pruned.get(ask.pruner, ask.keep_ratio)
        except ZooError as error:
            raise RequestError(str(error), param="pruner") from error
        try:
            shown = self.pictures.take(ask.pictures, processor)
            sample, dialog = Sample("request", [None] * len(shown), []), Dialog(ask.messages)
            prompt = processor.encode_prompt(sample, dialog, pixel_values=shown)
            room = room_for_answer(prompt, model.llm.max_positions)
        except LengthError as error:
            raise RequestError(str(error), code="context_length_exceeded", param="messages") from error
        except RequestError:
            raise
        except ZooError as error:
            raise RequestError(str(error), param="messages") from error
        if ask.max_tokens is not None and ask.max_tokens > room:
            raise RequestError(
                f"The model has {model.llm.max_positions} positions. The prompt takes {length_of(prompt)} of them, and "
                f"{ask.max_tokens} are asked for the answer.",
                code="context_length_exceeded",
                param="max_tokens",
            )
        limit = min(room, self.limits.max_tokens) if ask.max_tokens is None else ask.max_tokens
        places = (prompt.input_ids == processor.image_token_id) | (prompt.input_ids == processor.video_token_id)
        return Prepared(ask, model, processor, prompt, limit, int(np.count_nonzero(places)) - prompt.fewer)

    def _rows(self, prepared: Prepared, pieces: "asyncio.Queue[tuple[int, Piece]]") -> list[Row]:
        """Make a row for each choice; their pieces arrive in the queue, from other threads."""
        loop, ask = asyncio.get_running_loop(), prepared.ask

        def hand(index: int, piece: Piece) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, (index, piece))

        rows = []
        for i in range(ask.n):
            seed = None if ask.sampling.seed is None else (ask.sampling.seed + i) % 2**63
            rows.append(
                Row(
                    prepared.model, prepared.processor, prepared.prompt, prepared.limit, ask.sampling,
                    partial(hand, i), ask.stop, seed,
                )
            )  # fmt: skip
        return rows

    def _usage(self, prepared: Prepared, rows: Sequence[Row]) -> dict[str, Any]:
        length = len(prepared.prompt) - prepared.prompt.fewer
        return protocol.usage(length, prepared.image_tokens, sum(row.tokens for row in rows))

    async def _whole(
        self, request: Request, prepared: Prepared, rows: Sequence[Row], pieces: "asyncio.Queue[tuple[int, Piece]]"
    ) -> Response:
        """Wait for all choices, or until the client has left."""
        try:
            choices = await unless_left(request, _gathered(rows, pieces))
            if choices is None:
                return Response(status_code=499)  # which is not read any more
            return JSONResponse(protocol.completion(prepared.ask, choices, self._usage(prepared, rows)))
        finally:
            cancel(rows)

    async def _streamed(
        self, request: Request, prepared: Prepared, rows: Sequence[Row], pieces: "asyncio.Queue[tuple[int, Piece]]"
    ) -> Response:
        """Send pieces as server-sent events. What fails before the first piece is a plain error."""
        try:
            first = await unless_left(request, pieces.get())
            if first is not None and first[1].error is not None:
                raise _error_of(first[1].error)
        except BaseException:
            cancel(rows)
            raise
        if first is None:
            cancel(rows)
            return Response(status_code=499)

        ask = prepared.ask

        async def events() -> AsyncIterator[str]:
            for i in range(ask.n):
                yield _event(protocol.chunk(ask, i, {"role": "assistant", "content": ""}))
            left, (index, piece) = ask.n, first
            while True:
                if piece.error is not None:
                    yield _event(_error_of(piece.error).body())
                    return
                if piece.text:
                    yield _event(protocol.chunk(ask, index, {"content": piece.text}))
                if piece.finish:
                    yield _event(protocol.chunk(ask, index, {}, piece.finish))
                    left -= 1
                if not left:
                    break
                index, piece = await pieces.get()
            if ask.include_usage:
                yield _event(protocol.last_chunk(ask, self._usage(prepared, rows)))
            yield "data: [DONE]\n\n"

        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return Events(events(), rows, headers)


async def _gathered(rows: Sequence[Row], pieces: "asyncio.Queue[tuple[int, Piece]]") -> list[Choice]:
    """Join the pieces of all choices.

    Raises:
        RequestError: one of them failed.
    """
    texts, finish = [""] * len(rows), [""] * len(rows)
    while not all(finish):
        index, piece = await pieces.get()
        if piece.error is not None:
            raise _error_of(piece.error)
        texts[index] += piece.text
        finish[index] = piece.finish
    return [Choice(t, f, row.tokens) for t, f, row in zip(texts, finish, rows, strict=True)]


def _event(content: Any) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _error_of(error: Exception) -> RequestError:
    """Convert an error of generation to one of the protocol; what is not a person's mistake is logged."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, ClosedError):
        return RequestError(str(error), status=503, code="shutting_down")
    if isinstance(error, ZooError):
        return RequestError(str(error))
    log.error("an answer failed", exc_info=error)
    return RequestError(described(error), status=500, code="internal_error")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError), "registered for it"
    headers = {"retry-after": "1"} if error.status == 429 else None
    return JSONResponse(error.body(), error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for it"
    what = f"{request.method} {request.url.path}: {error.detail}."
    return JSONResponse(RequestError(what, status=error.status_code).body(), error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse(RequestError(described(error), status=500, code="internal_error").body(), 500)

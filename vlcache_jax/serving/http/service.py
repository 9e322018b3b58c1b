"""Requests that were read, asked of the engine, and its answers, whole or piece by piece.

fields ─► pictures, tokens (a thread) ─► Engine.submit ─► Ticket ─► response
"""

import asyncio
import contextvars
import hmac
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from vlcache_jax.cache.methods import DEFAULT_METHOD
from vlcache_jax.serving.engine import Engine
from vlcache_jax.serving.http import responses
from vlcache_jax.serving.http.bodies import Body, ChatBody, CompletionBody
from vlcache_jax.serving.http.errors import ApiError, answer_error, busy, error_body, failure
from vlcache_jax.serving.http.kept import rectangles
from vlcache_jax.serving.http.logs import log
from vlcache_jax.serving.http.metrics import Metrics
from vlcache_jax.serving.http.pictures import Pictures
from vlcache_jax.serving.http.responses import Answering
from vlcache_jax.serving.ticket import Closed, QueueFull, Ticket
from vlcache_jax.streaming import Request as Asked
from vlcache_jax.vlm import VLM


@dataclass(frozen=True)
class ServerSettings:
    """How a server answers.

    Attributes:
        name: of the model.
        method: cache method where a request does not name one.
        budget: of the cache, where it does not name one.
        api_key: that a request has to have, None for none.
        images_first: pictures are moved in front of the text of their message.
        log_prompts: what is asked is written into the log.
        max_body: bytes of a request.
        body_seconds: that a request may take to come.
        default_tokens: most tokens of an answer where a request does not say.
        bits: how what is kept is quantized, where it does not say.
    """

    name: str
    method: str = DEFAULT_METHOD
    budget: str | None = None
    api_key: str | None = None
    images_first: bool = False
    log_prompts: bool = False
    max_body: int = 32_000_000
    body_seconds: float = 30.0
    default_tokens: int = 128
    bits: str | None = None


READERS = 4
"""Requests whose pictures are read, or fetched, at a time."""


class Prepared(NamedTuple):
    """What is asked, ready for the engine.

    Attributes:
        choices: of each prompt, one request for each choice.
        shown: `rectangles` of the pictures, where they are asked for.
    """

    choices: list[list[Asked]]
    shown: list[np.ndarray]


class Service:
    """What the routes have in common.

    Args:
        vlm: the model.
        engine: what answers.
        settings: see there.
        pictures: reads pictures.

    Attributes:
        metrics: of all requests.
    """

    def __init__(self, vlm: VLM, engine: Engine, settings: ServerSettings, pictures: Pictures):
        self._vlm, self._engine, self._settings, self._pictures = vlm, engine, settings, pictures
        self.metrics = Metrics(engine, settings.name)
        # Few: a crowd of requests has no more memory this way than those that wait.
        self._workers, self._preparing = ThreadPoolExecutor(READERS, "vlcache-requests"), 0
        self._tokenizing = threading.Lock()
        self._created, self._told_of_order = int(time.time()), False

    @property
    def model(self) -> dict[str, Any]:
        """The model, as /v1/models lists it."""
        return {
            "id": self._settings.name,
            "object": "model",
            "created": self._created,
            "owned_by": "vlcache",
            "max_model_len": self._engine.rows,
            "kv_methods": [method.name for method in self._engine.methods],
            "kv_method": self._settings.method,
            "kv_budget": self._settings.budget,
            "kv_bits": self._settings.bits,
        }

    def check_model(self, name: str) -> None:
        """Refuse another model."""
        if name != self._settings.name:
            message = f"there is no model {name!r:.100}: this is {self._settings.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def authorize(self, request: Request) -> None:
        """Refuse a request without the key."""
        key = self._settings.api_key
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
            message = "the API key is missing or wrong: send Authorization: Bearer KEY"
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, message, code="invalid_api_key", headers=headers)

    async def error(self, request: Request, error: Exception) -> JSONResponse:
        """The response of an exception, which is counted."""
        answer = await answer_error(request, error)
        if answer.status_code >= 500 and not isinstance(error, HTTPException):
            log("error", logging.ERROR, exc_info=error)
        self.metrics.refused(answer.status_code)
        return answer

    # What is asked

    def asked_of_chat(self, body: ChatBody) -> Prepared:
        """The requests of a conversation; in a worker's thread."""
        said = body.conversation(self._settings.images_first)
        if said.text_first and not self._told_of_order:
            self._told_of_order = True
            log(
                "text_first",
                logging.WARNING,
                about="text in front of a picture leaves VL-Cache few rows to look from: start "
                "with --images-first to move pictures",
            )
        images = self._pictures.read(said.urls)
        shown = rectangles(self._vlm.processor, images) if body.kv_map else []
        return Prepared([self._choices(body, images=images, messages=said.messages)], shown)

    def asked_of_texts(self, body: CompletionBody) -> Prepared:
        """`asked_of_chat`, of completions."""
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        choices = [self._choices(body, text=prompt, raw_prompt=True) for prompt in prompts]
        return Prepared(choices, [])

    def _choices(self, body: Body, **prompt: Any) -> list[Asked]:
        given = self._settings
        cache = given.method, given.bits, given.budget
        own = body.options(given.default_tokens, secrets.randbits(32), *cache)
        with self._tokenizing:  # tokenizers are not made for several threads
            one = self._vlm.request(**prompt, **own)
        draws = one.settings.draws
        return [
            one._replace(
                settings=replace(
                    one.settings, draws=replace(draws, request=np.full(1, choice, np.int32))
                )
            )
            for choice in range(body.n or 1)
        ]

    # How it is answered

    async def answer(
        self, request: Request, body: ChatBody | CompletionBody, asked: Callable[[], Prepared]
    ) -> Any:
        """The response to a request."""
        began = time.perf_counter()
        if self._engine.error is not None:
            raise failure()
        if not self._engine.ready:
            raise busy("the server is starting: /health says when it is ready")
        self.check_model(body.model)
        if body.unknown:
            log("fields_ignored", fields=body.unknown[:20])
        if self._settings.log_prompts:
            log("prompt", prompt=str(body)[:10_000])
        changed, loop = asyncio.Event(), asyncio.get_running_loop()

        def notify() -> None:
            loop.call_soon_threadsafe(changed.set)

        tickets, shown = await self._submit(asked, body, notify)
        own = isinstance(body, ChatBody), self._vlm.processor.tokenizer, shown
        answering = Answering(tickets, self._settings.name, *own)
        waiting = _Waiting(request, changed, tickets)
        if body.stream:
            options = body.stream_options
            usage = bool(options and options.include_usage)
            always = bool(options and options.continuous_usage_stats)
            return _Stream(self._events(answering, waiting, usage, always, began), waiting)
        return await self._whole(answering, waiting, began)

    async def _submit(
        self,
        asked: Callable[[], Prepared],
        body: ChatBody | CompletionBody,
        notify: Callable[[], None],
    ) -> tuple[list[Ticket], list[np.ndarray]]:
        """The tickets of what is asked, and `Prepared.shown`, made in a worker's thread."""
        if self._preparing >= self._engine.load.queue:
            raise busy("as many requests are read as may be: try again later")

        own: dict[str, Any] = {"logprobs": body.told, "kv_map": bool(body.kv_map), "notify": notify}

        def submit() -> tuple[list[Ticket], list[np.ndarray]]:
            tickets: list[Ticket] = []
            try:
                prepared = asked()
                for one in [choice for choices in prepared.choices for choice in choices]:
                    tickets.append(self._engine.submit(one, **own))
            except BaseException:
                _cancel(tickets)
                raise
            return tickets, prepared.shown

        self._preparing += 1
        made = asyncio.get_running_loop().run_in_executor(self._workers, _in_context(submit))
        try:
            return await asyncio.shield(made)
        except asyncio.CancelledError:  # the client has gone; what it asked is not answered
            made.add_done_callback(_drop)
            raise
        except QueueFull as error:
            raise busy(error) from None
        except (ValueError, NotImplementedError) as error:
            raise ApiError(400, error) from None
        except Closed:
            if self._engine.error is None:
                raise busy("the server is stopping") from None
            raise
        finally:
            self._preparing -= 1

    async def _whole(self, answering: Answering, waiting: "_Waiting", began: float) -> JSONResponse:
        try:
            while not all(ticket.done for ticket in answering.tickets):
                await waiting.more()
            self._check(answering.tickets)
            self._count(answering, began)
            return JSONResponse(answering.body())
        finally:
            waiting.end()

    async def _events(
        self,
        answering: Answering,
        waiting: "_Waiting",
        usage: bool,
        always: bool,
        began: float,
    ) -> AsyncIterator[str]:
        def told(chunks: Sequence[dict[str, Any]]) -> str:
            own = {"usage": answering.usage() if always else None} if usage or always else {}
            return "".join(responses.event({**chunk, **own}) for chunk in chunks)

        try:
            yield told(answering.begin())
            ended = False
            while not ended:
                ended = all(ticket.done for ticket in answering.tickets)
                if ended:
                    self._check(answering.tickets)
                chunks = answering.more()
                if chunks:
                    yield told(chunks)
                elif not ended:
                    await waiting.more()
            self._count(answering, began)
            if usage:
                yield responses.event(answering.last())
            yield responses.DONE
        except ApiError as error:  # the status was sent already
            self.metrics.refused(error.status_code)
            yield responses.event(error_body(error)) + responses.DONE

    def _check(self, tickets: Sequence[Ticket]) -> None:
        """Raise what has ended a ticket without an answer."""
        for ticket in tickets:
            try:
                _ = ticket.answer
            except CancelledError:
                raise busy("the request was dropped") from None
            except Exception as error:
                log("failed", logging.ERROR, exc_info=error)
                if isinstance(error, Closed) and self._engine.error is None:
                    raise busy("the server is stopping") from None
                raise failure() from None

    def _count(self, answering: Answering, began: float) -> None:
        for ticket in answering.tickets:
            self.metrics.answered(ticket)
        usage = answering.usage()
        first = min(ticket.times.first for ticket in answering.tickets)
        log(
            "answered",
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
            completion_tokens=usage["completion_tokens"],
            kept_share=round(usage["kv_cache"]["kept_share"], 4),
            first_token_s=round(first - began, 4),
            seconds=round(time.perf_counter() - began, 4),
        )


class _Waiting:
    """Waits for more of an answer, as long as somebody wants it.

    Args:
        request: of the client.
        changed: set where there is more.
        tickets: of the answer.
    """

    def __init__(self, request: Request, changed: asyncio.Event, tickets: Sequence[Ticket]):
        self._changed, self._gone = changed, asyncio.ensure_future(_gone(request))
        self._tickets = tickets

    async def more(self) -> None:
        """Return where there was more since the last call.

        Raises:
            ApiError: the client has gone.
        """
        changed = asyncio.ensure_future(self._changed.wait())
        await asyncio.wait({self._gone, changed}, return_when=asyncio.FIRST_COMPLETED)
        changed.cancel()
        self._changed.clear()
        if self._gone.done():
            raise ApiError(499, "the client has gone")

    def end(self) -> None:
        """Wait no more: nothing runs on."""
        self._gone.cancel()
        _cancel(self._tickets)


class _Stream(StreamingResponse):
    """Events; however it ends, nothing runs on for it."""

    def __init__(self, events: AsyncIterator[str], waiting: _Waiting):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._waiting = waiting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._waiting.end()


async def _gone(request: Request) -> None:
    """Wait for the client to go."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _in_context(function: Callable[[], Any]) -> Callable[[], Any]:
    """The same in another thread, with the request's id."""
    context = contextvars.copy_context()
    return lambda: context.run(function)


def _drop(made: Any) -> None:
    with suppress(BaseException):
        _cancel(made.result()[0])


def _cancel(tickets: Sequence[Ticket]) -> None:
    for ticket in tickets:
        ticket.cancel()

"""Middleware: gives each request an id, and bounds its size and the time that it takes to come."""

import asyncio
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlcache_jax.serving.http.errors import ApiError, response
from vlcache_jax.serving.http.logs import request_id

DRAINED = 4
"""So many times the limit is read of a body that is too large."""

_CLOSE = {"Connection": "close"}


class Bounded:
    """The application behind it gets no more than that.

    Args:
        app: the application.
        most: bytes of a body.
        seconds: that it may take to come.
        refused: called with the status of what is refused here.
    """

    def __init__(self, app: ASGIApp, most: int, seconds: float, refused: Callable[[int], None]):
        self._app, self._most, self._seconds, self._refused = app, most, seconds, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        own = given if re.fullmatch(r"[\w.:-]{1,100}", given) else f"req-{secrets.token_hex(8)}"
        request_id.set(own)
        until: float | None = None
        size, whole, begun = 0, False, False

        async def bounded() -> Message:
            nonlocal size, whole, until
            if whole:  # what comes now is the client's going
                return await receive()
            until = until or time.monotonic() + self._seconds
            try:
                message = await asyncio.wait_for(receive(), until - time.monotonic())
            except TimeoutError:
                raise ApiError(408, "the body comes too slowly", headers=_CLOSE) from None
            size += len(message.get("body", b""))
            if size > self._most:
                if message.get("more_body"):
                    await self._drain(receive, until)
                raise _too_large(self._most)
            whole = not message.get("more_body", False)
            return message

        async def tagged(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message["headers"], (b"x-request-id", own.encode())]
            await send(message)

        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._most:
            await self._drain(receive, time.monotonic() + self._seconds)
            await response(_too_large(self._most))(scope, receive, tagged)
            self._refused(413)
            return
        try:
            await self._app(scope, bounded, tagged)
        except Exception:
            # Starlette raises again what its handler has answered: it is in the log already.
            if not begun:
                raise

    async def _drain(self, receive: Receive, until: float) -> None:
        """Read on, within bounds: many clients look at no response before all is sent."""
        left, more = DRAINED * self._most, True
        with suppress(TimeoutError):
            while more and left > 0:
                message = await asyncio.wait_for(receive(), until - time.monotonic())
                left -= len(message.get("body", b""))
                more = message.get("more_body", False)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"a request has at most {most} bytes", headers=_CLOSE)

"""The HTTP routes.

body ─► Bounded ─► fields (bodies.py) ─► Service ─► response, stream or error
"""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from vlcache_jax.serving.engine import Engine
from vlcache_jax.serving.http.bodies import ChatBody, CompletionBody
from vlcache_jax.serving.http.bounded import Bounded
from vlcache_jax.serving.http.errors import ApiError
from vlcache_jax.serving.http.pictures import Pictures
from vlcache_jax.serving.http.service import ServerSettings, Service
from vlcache_jax.vlm import VLM

PAGE = Path(__file__).with_name("page.html").read_text("utf-8")


def _policy(page: str) -> str:
    """What a page may do: run its own script and style, show pictures, and ask its own server."""
    rules = ["default-src 'none'", "img-src blob: data:", "connect-src 'self'", "base-uri 'none'"]
    for tag in ("script", "style"):
        [own] = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        rules.append(f"{tag}-src 'sha256-{digest}'")
    return "; ".join([*rules, "form-action 'none'", "frame-ancestors 'none'"])


PAGE_HEADERS = {
    "Content-Security-Policy": _policy(PAGE),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def create_app(
    vlm: VLM, engine: Engine, settings: ServerSettings, pictures: Pictures | None = None
) -> FastAPI:
    """The application of one engine, which somebody else warms up and closes.

    Args:
        vlm: the model.
        engine: what answers.
        settings: see there.
        pictures: reads pictures; by default none is fetched.
    """
    app = FastAPI(title="vlcache", docs_url=None, redoc_url=None)
    server = Service(vlm, engine, settings, pictures or Pictures())
    for kind in (ApiError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, server.error)
    bounds = {"most": settings.max_body, "seconds": settings.body_seconds}
    app.add_middleware(Bounded, **bounds, refused=server.metrics.refused)
    guarded = [Depends(server.authorize)]

    @app.get("/health")
    async def health() -> JSONResponse:
        """200 once requests are answered."""
        if engine.error is not None:
            return JSONResponse({"status": "failed"}, 500)
        if not engine.ready:
            return JSONResponse({"status": "starting"}, 503, {"Retry-After": "2"})
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        """For Prometheus."""
        return PlainTextResponse(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/")
    async def page() -> HTMLResponse:
        """A page to try the model."""
        return HTMLResponse(PAGE, headers=PAGE_HEADERS)

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [server.model]}

    @app.get("/v1/models/{name:path}", dependencies=guarded)
    async def model(name: str) -> dict[str, Any]:
        """The one model."""
        server.check_model(name)
        return server.model

    @app.post("/v1/chat/completions", dependencies=guarded)
    async def chat(body: ChatBody, request: Request) -> Any:
        """Answer a conversation."""
        return await server.answer(request, body, lambda: server.asked_of_chat(body))

    @app.post("/v1/completions", dependencies=guarded)
    async def completions(body: CompletionBody, request: Request) -> Any:
        """Continue texts."""
        return await server.answer(request, body, lambda: server.asked_of_texts(body))

    return app

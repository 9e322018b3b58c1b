"""A server of a tiny model on loopback, and ways to ask it what no client library would."""

import base64
import io
import json
import socket
import threading
import time
from contextlib import contextmanager
from http.client import HTTPConnection

import uvicorn

from vlcache_jax.serving.http import create_app

LONG = 120
"""Tokens of the longest answers."""


def png(image) -> str:
    """A picture as a data URI."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def asked(text="word word", *images, **fields):
    """The body of a request: the pictures first."""
    shown = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    content = [*shown, {"type": "text", "text": text}] if images else text
    return {"model": "tiny", "messages": [{"role": "user", "content": content}]} | fields


def wait(condition):
    """Wait until it holds, for a while."""
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@contextmanager
def serving(vlm, engine, settings, pictures=None):
    """The port of a server that runs in a thread."""
    app = create_app(vlm, engine, settings, pictures)
    config = uvicorn.Config(app, "127.0.0.1", 0, log_config=None, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def post(port, body, path="/v1/chat/completions", headers=(), method="POST"):
    """Status, headers and JSON of a response; the body is a dict, or bytes as they are."""
    link = HTTPConnection("127.0.0.1", port, timeout=60)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    link.request(method, path, content, {"Content-Type": "application/json", **dict(headers)})
    response = link.getresponse()
    text = response.read()
    link.close()
    assert b"Traceback" not in text
    assert b"/vlcache_jax/" not in text
    return response.status, dict(response.getheaders()), json.loads(text)


def begin(port, body, headers=()):
    """A connection that has sent its request, and not read its response."""
    content = json.dumps(body).encode()
    link = socket.create_connection(("127.0.0.1", port), timeout=60)
    own = {"Host": "a", "Content-Type": "application/json", "Content-Length": len(content)}
    lines = [f"{name}: {value}" for name, value in {**own, **dict(headers)}.items()]
    head = "\r\n".join(["POST /v1/chat/completions HTTP/1.1", *lines, "", ""])
    link.sendall(head.encode() + content)
    return link

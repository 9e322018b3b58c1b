"""Pictures of requests: where they may come from, and how large they may be."""

import base64
import io
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from tests.serving.servers import png
from tests.tiny import picture
from vlcache_jax.serving.http import pictures as module
from vlcache_jax.serving.http.errors import ApiError
from vlcache_jax.serving.http.pictures import Pictures, _public

SHOWN = picture(20, 10, 1)
CONTENT = base64.b64decode(png(SHOWN).partition(",")[2])


class Server(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        self.server.seen.append((self.path, self.headers["Host"]))
        port = self.server.server_port
        targets = {
            "/private": f"http://localhost:{port}/a.png",
            "/other": "http://elsewhere.example/a.png",
            "/file": "file:///etc/passwd",
            "/loop": "/loop",
            "/on": "/a.png",
        }
        if self.path in targets:
            self.send_response(302)
            self.send_header("Location", targets[self.path])
            self.end_headers()
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"a")
                time.sleep(0.05)
        elif self.path == "/missing":
            self.send_error(404)
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(CONTENT if self.path.startswith("/a.png") else b"x" * 3000)

    def log_message(self, *_):
        pass


@contextmanager
def hosted():
    server = Server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def server():
    with hosted() as server:
        yield server


@pytest.fixture
def fetched(server, monkeypatch):
    """Reads pictures of the host "pictures.test", which the tests' own server plays."""
    monkeypatch.setattr(module, "_public", lambda address: address == "127.0.0.1")
    names = {"pictures.test": ["127.0.0.1"], "localhost": ["127.0.0.2"], "gone.test": []}
    hosts = [f"{name}:{server.server_port}" for name in ("Pictures.test", "localhost", "gone.test")]
    own = Pictures(hosts, most_bytes=2000, seconds=0.6, resolve=lambda host, port: names[host])
    server.seen.clear()
    return lambda path, host="pictures.test": own.read(
        [f"http://{host}:{server.server_port}{path}"]
    )


@pytest.mark.parametrize("path", ["/a.png", "/on", "/a.png?size=5&b=%20", "/a.png#part"])
def test_a_picture_of_a_host_that_is_allowed(fetched, server, path):
    [found] = fetched(path)
    assert np.array_equal(np.asarray(found), np.asarray(SHOWN))
    assert server.seen[0][1] == f"pictures.test:{server.server_port}"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/private", "localhost is no public address"),
        ("/other", "not fetched from elsewhere.example"),
        ("/file", "a URL of http or https"),
        ("/loop", "redirected more than 3 times"),
        ("/slow", "could not be fetched|cannot|none that can be read"),
        ("/missing", "answers 404"),
        ("/large", "more than 2000 bytes"),
        ("/a b\r\nHost: c", "could not be fetched"),
    ],
)
def test_what_is_not_fetched(fetched, path, message):
    began = time.monotonic()
    with pytest.raises(ApiError, match=message) as caught:
        fetched(path)
    assert time.monotonic() - began < 3
    assert caught.value.status_code == 400


def test_hosts_that_are_none_or_lead_inside(fetched, server):
    for host in ("localhost", "gone.test"):
        with pytest.raises(ApiError, match="no public address"):
            fetched("/a.png", host)
    with pytest.raises(ApiError, match="no user name"):
        fetched("/a.png", "a:b@pictures.test")
    assert not server.seen
    for url in ("http://[::1", "http://:80/", "ftp://pictures.test/a", "http://pictures.test/"):
        with pytest.raises(ApiError):
            Pictures(["other"]).read([url])


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "0.0.0.0"),
        *("100.64.0.1", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "ff02::1"),
    ],
)
def test_addresses_that_are_not_public(address):
    assert not _public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"])
def test_addresses_that_are_public(address):
    assert _public(address)


def test_what_a_data_uri_may_be():
    [found] = Pictures().read([png(SHOWN).replace("image/png;", "IMAGE/PNG;charset=utf-8;")])
    assert np.array_equal(np.asarray(found), np.asarray(SHOWN))
    percent = "data:image/png," + "".join(f"%{byte:02x}" for byte in CONTENT)
    assert np.array_equal(np.asarray(Pictures().read([percent])[0]), np.asarray(SHOWN))
    for url in ("data:", "data:,", "data:image/png;base64", "data:image/svg+xml,<svg/>", ""):
        with pytest.raises(ApiError):
            Pictures().read([url])


def test_limits_of_pictures_at_them_and_one_above():
    own = Pictures(most=2, most_pixels=200)
    assert len(own.read([png(SHOWN)] * 2)) == 2
    with pytest.raises(ApiError, match="at most 2"):
        own.read([png(SHOWN)] * 3)
    with pytest.raises(ApiError, match="201 pixels: at most 200"):
        own.read([png(picture(201, 1))])


def test_damaged_pictures():
    rng, jpeg, refused = np.random.default_rng(0), io.BytesIO(), []
    picture(30, 30).save(jpeg, "JPEG")
    for content in (CONTENT, jpeg.getvalue()):
        for _ in range(60):
            bad = bytearray(content[: rng.integers(1, len(content))])
            bad[rng.integers(0, len(bad))] ^= 255
            url = "data:image/png;base64," + base64.b64encode(bad).decode()
            try:
                Pictures().read([url])
            except ApiError as error:
                refused.append(error)
    assert len(refused) > 60
    assert all(error.status_code == 400 and "\n" not in error.detail for error in refused)

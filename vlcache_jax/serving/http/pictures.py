"""Pictures of a request: data URIs, and, from hosts that are allowed, files that are fetched."""

import base64
import binascii
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import BytesIO
from typing import Any
from urllib.parse import SplitResult, unquote_to_bytes, urljoin, urlsplit

from PIL import Image, UnidentifiedImageError

from vlcache_jax.errors import short
from vlcache_jax.requests.images import load_image
from vlcache_jax.serving.http.errors import ApiError

REDIRECTS = 3
"""Most of one picture."""

PORTS = {"http": 80, "https": 443}

Resolve = Callable[[str, int], list[str]]
"""The addresses of a host."""


class Pictures:
    """Reads the pictures of requests.

    Args:
        hosts: from which pictures are fetched, "name" or "name:port"; none by default.
        most: pictures of a request.
        most_pixels: of a picture.
        most_bytes: of a picture that is fetched.
        seconds: that fetching all of a request may take.
        resolve: finds the addresses of a host.
    """

    def __init__(
        self,
        hosts: Sequence[str] = (),
        *,
        most: int = 16,
        most_pixels: int = 40_000_000,
        most_bytes: int = 20_000_000,
        seconds: float = 10.0,
        resolve: Resolve | None = None,
    ):
        self._hosts = {host.lower() for host in hosts}
        self._most, self._most_pixels, self._most_bytes = most, most_pixels, most_bytes
        self._seconds, self._resolve = seconds, resolve or _addresses

    def read(self, urls: Sequence[str]) -> list[Image.Image]:
        """The pictures at some URLs.

        Raises:
            ApiError: there are too many, or one cannot be had, is too large or no picture.
        """
        if len(urls) > self._most:
            raise ApiError(400, f"{len(urls)} pictures: a request has at most {self._most}")
        until = time.monotonic() + self._seconds
        return [self._picture(url, until) for url in urls]

    def _picture(self, url: str, until: float) -> Image.Image:
        content = _of_data(url) if url[:5].lower() == "data:" else self._fetch(url, until)
        try:
            with Image.open(BytesIO(content)) as opened:
                pixels = opened.width * opened.height
            if pixels > self._most_pixels:
                raise _bad(f"a picture of {pixels} pixels: at most {self._most_pixels} are served")
            return load_image(content)
        except UnidentifiedImageError:
            raise _bad("a picture is none that can be read: send PNG, JPEG or WebP") from None
        except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise _bad(str(error) or "a picture is damaged") from None

    def _fetch(self, url: str, until: float) -> bytes:
        """The content at a URL; each redirection is checked as the first address was."""
        if not self._hosts:
            message = "pictures are not fetched here: send a data URI, data:image/png;base64,..."
            raise _bad(message)
        for _ in range(REDIRECTS + 1):
            there = self._allowed(url)
            try:
                status, target, content = self._get(there, until)
            except (OSError, ValueError, http.client.HTTPException):
                raise _bad(f"a picture could not be fetched from {there.hostname}") from None
            if status in (301, 302, 303, 307, 308) and target:
                url = urljoin(url, target)
            elif status == 200:
                return content
            else:
                raise _bad(f"{there.hostname} answers {status} for a picture")
        raise _bad(f"a picture is redirected more than {REDIRECTS} times")

    def _allowed(self, url: str) -> SplitResult:
        """The parts of a URL that may be asked."""
        try:
            there = urlsplit(url)
            port, host = there.port, there.hostname
        except ValueError:
            raise _bad("a picture's URL is none") from None
        if there.scheme not in PORTS or not host:
            raise _bad("a picture has a data URI, or a URL of http or https")
        if "@" in there.netloc:
            raise _bad("a picture's URL has no user name and no password")
        own = PORTS[there.scheme]
        names = {f"{host}:{port or own}"} | ({host} if port in (None, own) else set())
        if not names & self._hosts:
            raise _bad(f"pictures are not fetched from {short(host)}: send a data URI")
        return there

    def _get(self, there: SplitResult, until: float) -> tuple[int, str | None, bytes]:
        """Status, target and content of one request, to an address that was checked."""
        host, port = str(there.hostname), there.port or PORTS[there.scheme]
        found = self._resolve(host, port)
        if not found or not all(map(_public, found)):
            raise _bad(f"{short(host)} is no public address: pictures are not fetched from it")
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        link: Any = socket.create_connection((found[0], port), timeout=left)
        # However slowly something comes: a socket's own time limit begins anew with every byte.
        end = threading.Timer(left, lambda: _shut(link))
        end.start()
        try:
            if there.scheme == "https":
                link = ssl.create_default_context().wrap_socket(link, server_hostname=host)
            connection = http.client.HTTPConnection(host, port)
            connection.sock = link  # the address that was checked, not the name once more
            path = (there.path or "/") + (f"?{there.query}" if there.query else "")
            connection.request("GET", path, headers={"Accept": "image/*", "Connection": "close"})
            with connection.getresponse() as response:
                content = bytearray()
                while response.status == 200 and (piece := response.read1(1 << 16)):
                    content += piece
                    if len(content) > self._most_bytes:
                        raise _bad(f"a picture has more than {self._most_bytes} bytes")
                return response.status, response.getheader("Location"), bytes(content)
        finally:
            end.cancel()
            link.close()


def _of_data(url: str) -> bytes:
    """The content of a data URI."""
    head, comma, data = url.partition(",")
    kind = head[5:].split(";")[0].strip().lower()
    if not comma or not kind.startswith("image/"):
        raise _bad("a picture's data URI begins with data:image/png;base64, or another image type")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(data)
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError):
        raise _bad("a picture's data URI is not valid base64") from None


def _addresses(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(each[4][0]) for each in found]


def _public(address: str) -> bool:
    """Whether an address belongs to the public internet, the one that is inside of it, too."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inside = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in ipaddress.ip_network("64:ff9b::/96"):
            inside = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inside and not _public(str(inside)):
            return False
    return ip.is_global and not ip.is_multicast


def _shut(link: socket.socket) -> None:
    with suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)


def _bad(message: str) -> ApiError:
    return ApiError(400, message, param="messages", code="invalid_image")

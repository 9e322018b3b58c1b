"""Pages in a real browser; importing this skips the tests of a machine that has none.

The browser is the system's chromium (`apt-get install chromium`); none is downloaded.
"""

import shutil
from contextlib import contextmanager

import pytest

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="NO BROWSER TEST: playwright is not installed"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip(
        "NO BROWSER TEST: there is no chromium here (apt-get install chromium)",
        allow_module_level=True,
    )

HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>'

COLOUR = """(colour) => {
    const context = new OffscreenCanvas(1, 1).getContext("2d");
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
}"""
"""A CSS colour as [red, green, blue], from 0 to 255."""


KNOWN = """(scheme) => new Promise((done) => {
    const query = matchMedia(`(prefers-color-scheme: ${scheme})`);
    // Once more: the page's listeners run before it.
    const look = () => requestAnimationFrame(query.matches ? done : look);
    look();
})"""
"""Waits until a page knows that it is light or dark."""


@contextmanager
def opened_page(path):
    """A file in the browser, as of `opened_address`.

    At the end there must be no complaint, and no address but the file's own.
    """
    with opened_address(path.as_uri()) as opened:
        yield opened
    check_quiet(path.as_uri(), *opened[1:])


@contextmanager
def opened_address(address):
    """A page in the browser; its complaints and all addresses it asked for, so far."""
    complaints, requests = [], []
    with sync_api.sync_playwright() as playwright:
        # Without the sandbox, which does not start for root, nor in most containers.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme="light")
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        yield page, complaints, requests
        browser.close()


def check_quiet(address, complaints, requests):
    """Nothing was complained of, and nothing asked for but the page itself."""
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [address]


def choose_scheme(page, scheme):
    """Switch to light or dark; chromium says so before the page knows."""
    page.emulate_media(color_scheme=scheme)
    # Not wait_for_function: it evaluates strings, which a page's policy may forbid.
    page.evaluate(KNOWN, scheme)


def check_no_overflow(page, width):
    """Nothing is wider than a window of this width."""
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("document.body.scrollWidth") <= width


def contrast(colours):
    """Contrast of two colours, as of WCAG: from 1 to 21."""
    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)


def luminance(rgb):
    """Relative luminance of a colour, as of WCAG."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

"""What the HTML pages share: each is one file that needs nothing else, no network and no server.

A page's template extends `base.html.jinja`; its own style comes behind that of all pages.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from vlcache_jax.files import check_file, whole_file
from vlcache_jax.results.numbers import number, share
from vlcache_jax.results.report import human_bytes

HERE = Path(__file__).parent


def template(folder: Path) -> Template:
    """A folder's `page.html.jinja`, with its `page.css`; it escapes all that it is given."""
    environment = Environment(
        loader=FileSystemLoader([folder, HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"share": share, "bytes": human_bytes, "number": number}
    environment.globals["style"] = included(HERE / "base.css") + included(folder / "page.css")
    return environment.get_template("page.html.jinja")


def included(file: Path) -> Markup:
    """A style or a script of the package, as it stands in a page."""
    return Markup(file.read_text(encoding="utf-8"))


def write_report(
    path: str | Path, numbers: Callable[[], Any], page: Callable[[], str], *, force: bool
) -> None:
    """Write a page (.html) or its numbers (.json); the file appears whole or not at all.

    Args:
        path: the file.
        numbers: gives plain values for JSON.
        page: gives the page.
        force: whether a file that is there is overwritten.

    Raises:
        FileExistsError: the file exists and `force` is not set.
        FileNotFoundError: its directory does not exist.
        ValueError: its name ends otherwise.
    """
    target = check_file(path, "report", force=force)
    if target.suffix == ".json":
        text = json.dumps(numbers(), ensure_ascii=False, allow_nan=False)
    else:
        text = page()
    with whole_file(target, force=force) as file:
        file.write(text.encode())

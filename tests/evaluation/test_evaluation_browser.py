"""The page of an evaluation in a real browser: it opens, asks for nothing, and can be read."""

import pytest

from tests.browser import (
    COLOUR,
    HOSTILE,
    check_no_overflow,
    check_quiet,
    choose_scheme,
    contrast,
    luminance,
    opened_page,
)
from tests.evaluations import BUDGETS, made_up_evaluation, made_up_setting
from vlcache_jax.evaluation.page import render

METHODS = ["vl-cache", "h2o", "snapkv", "pyramidkv", "streaming", "sparse", HOSTILE]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A page of as many methods as there are hues, one with HTML in its name; what it did."""
    settings = [
        made_up_setting(method, budget, top1=0.8 + budget / 5 + number / 100)
        for number, method in enumerate(METHODS)
        for budget in BUDGETS
    ]
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(made_up_evaluation(settings, requests=2)), encoding="utf-8")
    with opened_page(path) as opened:
        yield opened


@pytest.fixture
def page(opened):
    page, _, _ = opened
    page.set_viewport_size({"width": 1400, "height": 900})
    choose_scheme(page, "light")
    return page


def test_it_opens_without_a_complaint_and_asks_for_nothing(page, opened):
    _, complaints, requests = opened
    assert page.get_by_role("img").count() == 2
    check_quiet(page.url, complaints, requests)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_points_can_be_seen(page, scheme):
    choose_scheme(page, scheme)
    ground, texts, marks = page.evaluate(
        f"""() => {{
        const rgb = {COLOUR};
        const all = (name, what) => [...document.querySelectorAll(name)].map(
            (element) => rgb(getComputedStyle(element)[what]));
        const texts = ["body", ".lead", ".caution", ".quiet", "dt", "th", "td", ".legend"];
        return [
            all("body", "backgroundColor")[0],
            [...texts.flatMap((name) => all(name, "color")), ...all("svg text", "fill")],
            [...all(".mark", "fill"), ...all(".whisker", "stroke"), ...all("line.limit", "stroke")],
        ];
    }}"""
    )
    assert (luminance(ground) < 0.1) == (scheme == "dark")
    points = len(METHODS) * len(BUDGETS)
    assert len(marks) == len(METHODS) + 2 * 2 * points + 1
    assert len({tuple(mark) for mark in marks}) == len(METHODS) + 1
    assert min(contrast([text, ground]) for text in texts) >= 4.5  # WCAG 2.2, 1.4.3
    assert min(contrast([mark, ground]) for mark in marks) >= 3  # WCAG 2.2, 1.4.11


@pytest.mark.parametrize("width", [360, 1400])
def test_nothing_overflows(page, width):
    check_no_overflow(page, width)


def test_all_that_is_drawn_lies_in_the_drawings(page):
    outside = page.evaluate(
        """() => [...document.querySelectorAll("svg[role=img]")].flatMap((svg) => {
        const frame = svg.getBoundingClientRect();
        return [...svg.querySelectorAll("text, path, polyline")].filter((element) => {
            const box = element.getBoundingClientRect();
            return box.left < frame.left || box.right > frame.right
                || box.top < frame.top || box.bottom > frame.bottom;
        }).map((element) => element.outerHTML);
    })"""
    )
    assert outside == []


def test_html_in_names_is_text(page):
    assert page.title() == "Which budget is safe: made up"
    assert page.locator("img").count() == 0
    for place in (".legend", "ul.card", "tbody", "svg[role=img]"):
        assert HOSTILE in page.locator(place).first.text_content()

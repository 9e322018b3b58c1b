"""The page of an inspection in a real browser: it opens, asks for nothing, and its slider works."""

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
from tests.inspections import made_up_inspection
from vlcache_jax.results.inspection.page import render


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A page of two methods and two pictures, with HTML in texts and names; what it did so far."""
    inspection = made_up_inspection(
        ("vl-cache 0.1", "h2o 0.1"),
        names=("a.png", f"{HOSTILE}.png"),
        pieces=("<s>", "What", f" {HOSTILE}", "?"),
        answers=[("A", " shelf"), ("A", HOSTILE)],
    )
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(inspection), encoding="utf-8")
    with opened_page(path) as opened:
        yield opened


@pytest.fixture
def page(opened):
    """The page as it is when it is opened, but for the tables, which are unfolded."""
    page, _, _ = opened
    page.set_viewport_size({"width": 1400, "height": 900})
    choose_scheme(page, "light")
    page.locator("#layer").fill("0")
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    return page


def heat_maps(page):
    return page.evaluate("[...document.querySelectorAll('canvas')].map((c) => c.toDataURL())")


def test_it_opens_without_a_complaint_and_asks_for_nothing(page, opened):
    _, complaints, requests = opened
    assert page.locator("canvas").count() == 8
    check_quiet(page.url, complaints, requests)


def test_the_slider_changes_heat_maps_tokens_bars_and_tables(page):
    slider = page.get_by_role("slider", name="Layer")
    slider.focus()
    seen = []
    for step in range(4):
        if step:
            page.keyboard.press("ArrowRight")
        state = page.evaluate(
            """() => [
            [...document.querySelectorAll("canvas")].map((canvas) => canvas.toDataURL()),
            [...document.querySelectorAll(".tokens span")].map(
                (span) => getComputedStyle(span).backgroundColor),
            [...document.querySelectorAll("[data-table] td")].map((cell) => cell.textContent),
            [...document.querySelectorAll(".chosen")].map((band) => band.dataset.layer),
            document.getElementById("layer-name").textContent,
        ]"""
        )
        seen.append(state)
    assert slider.input_value() == "3"  # the last of three layers
    for part in zip(*seen, strict=True):
        assert len({str(state) for state in part}) == 4
    for heat_map in zip(*(state[0] for state in seen), strict=True):
        assert len(set(heat_map)) > 1
    assert seen[0][3] == []
    assert seen[2][3] == ["1"] * 6  # four charts of one method, two of the other
    page.keyboard.press("Home")
    assert heat_maps(page) == seen[0][0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_heat_maps_have_the_colours_of_the_shares(page, scheme):
    """The middle of each patch, against a token's colour in the style of the page."""
    choose_scheme(page, scheme)
    page.locator("#layer").fill("2")
    seen, wrong = page.evaluate(
        f"""() => {{
        const rgb = {COLOUR};
        const data = JSON.parse(document.getElementById("data").textContent);
        const probe = document.querySelector(".tokens").appendChild(document.createElement("span"));
        let seen = 0, wrong = 0;
        for (const canvas of document.querySelectorAll("canvas")) {{
            const picture = data.pictures[canvas.dataset.picture];
            const outcome = data.outcomes[canvas.closest("[data-outcome]").dataset.outcome];
            const counts = atob(outcome.counts);
            const copy = new OffscreenCanvas(canvas.width, canvas.height);
            const pixels = copy.getContext("2d", {{ willReadFrequently: true }});
            pixels.drawImage(canvas, 0, 0);
            picture.tokens.forEach((token, i) => {{
                if (picture.part[i] !== canvas.dataset.part) return;
                const [left, top, right, bottom] = picture.rectangles[i];
                const x = (left + right) / 2 * canvas.width / picture.size[0];
                const y = (top + bottom) / 2 * canvas.height / picture.size[1];
                const share = counts.charCodeAt(1 * data.tokens + token) / outcome.heads;
                probe.style.setProperty("--share", share);
                const wanted = rgb(getComputedStyle(probe).backgroundColor);
                const drawn = pixels.getImageData(x, y, 1, 1).data;
                seen += 1;
                wrong += wanted.some((value, c) => Math.abs(value - drawn[c]) > 1);
            }});
        }}
        probe.remove();
        return [seen, wrong];
    }}"""
    )
    assert (seen, wrong) == (2 * 2 * (4 + 16), 0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(page, scheme):
    choose_scheme(page, scheme)
    ground, *texts = page.evaluate(
        f"""() => {{
        const rgb = {COLOUR};
        const of = (element, what) => rgb(getComputedStyle(element)[what]);
        const page = of(document.body, "backgroundColor");
        const names = ["body", ".lead", ".verdict.same", ".verdict.differs", "summary", "th", "td"];
        const found = names.map((name) => [of(document.querySelector(name), "color"), page]);
        const probe = document.querySelector(".tokens").appendChild(document.createElement("span"));
        for (let share = 0; share <= 1; share += 1 / 64) {{
            probe.style.setProperty("--share", share);
            found.push([of(probe, "color"), of(probe, "backgroundColor")]);
        }}
        probe.remove();
        return [page, ...found];
    }}"""
    )
    assert (luminance(ground) < 0.1) == (scheme == "dark")
    assert len(texts) == 7 + 65
    for colours in texts:
        assert contrast(colours) >= 4.5  # WCAG 2.2, 1.4.3


def test_a_change_of_the_scheme_draws_the_heat_maps_anew(page):
    before = heat_maps(page)
    choose_scheme(page, "dark")
    assert all(a != b for a, b in zip(before, heat_maps(page), strict=True))


@pytest.mark.parametrize("width", [360, 1400])
def test_nothing_overflows(page, width):
    check_no_overflow(page, width)


def test_html_in_names_and_prompts_is_text(page):
    assert page.title() == "What the cache keeps: made up"
    assert page.locator("img").count() == 0
    texts = page.evaluate(
        """() => ["h3", ".asked", "mark", ".tokens", "[data-table] td"].map((name) =>
        [...document.querySelectorAll(name)].map((element) => element.textContent).join())"""
    )
    for text in texts:
        assert HOSTILE in text.replace('\\"', '"')  # tables show tokens as JSON


def test_figures_have_words(page):
    page.locator("#layer").fill("1")
    words = page.locator("[role=img]").evaluate_all("all => all.map((one) => one.ariaLabel)")
    assert all(words)
    assert sum("Heat map" in text and "% kept" in text for text in words) == 8
    assert page.locator("#layer").get_attribute("aria-valuetext") == "0 (0 to 2)"
    patch = page.locator("canvas").first
    patch.hover(position={"x": 5, "y": 5})
    assert patch.get_attribute("title").startswith("token 1: ")

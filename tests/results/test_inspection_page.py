"""The page of an inspection: what is in it, that all of it is escaped, and how large it becomes."""

import base64
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.inspections import made_up_inspection
from tests.pages import handlers, plain, read, targets
from vlcache_jax.results.inspection.bars import BOTTOM, TOP, charts
from vlcache_jax.results.inspection.page import LONGEST_SIDE, data_uri, render
from vlcache_jax.results.numbers import scale_end

HOSTILE = '<img src=x onerror="alert(1)"></script><b>&amp;'


def page_of(inspection):
    return read(render(inspection))


def data_of(page):
    (script,) = page.find("script", id="data")
    return json.loads(script.text)


@pytest.fixture(scope="module")
def compared():
    """Two methods, one of which answers otherwise from its second token on."""
    return made_up_inspection(
        ("vl-cache 0.1", "h2o 0.1"),
        names=("a.png", "b.png"),
        answers=[("A", " shelf"), ("A", " box")],
    )


@pytest.fixture(scope="module")
def page(compared):
    return page_of(compared)


def test_the_script_is_given_the_exact_counts(compared, page):
    data = data_of(page)
    assert data["tokens"] == len(compared.visual)
    for outcome, given in zip(compared.outcomes, data["outcomes"], strict=True):
        counts = np.frombuffer(base64.b64decode(given["counts"]), np.uint8)
        expected = np.zeros((given["layers"], data["tokens"]), int)
        for (layer, _, _), token in np.ndenumerate(outcome.trace.kept):
            expected[layer, token] += token >= 0
        np.testing.assert_array_equal(counts.reshape(expected.shape), expected)


def test_the_script_is_given_the_places_of_the_patches(compared, page):
    for picture, given in zip(compared.pictures, data_of(page)["pictures"], strict=True):
        assert tuple(given["size"]) == picture.image.size
        assert given["tokens"] == picture.positions.tolist()
        assert given["part"].count("newline") == given["rectangles"].count(None) == 4
        places = [place or [np.nan] * 4 for place in given["rectangles"]]
        np.testing.assert_allclose(places, picture.rectangles, atol=0.006)


def test_each_picture_has_a_heat_map_of_each_part_and_method(page):
    canvases = [canvas.attributes for canvas in page.find("canvas")]
    assert len(canvases) == 2 * 2 * 2
    assert {(c["data-picture"], c["data-part"]) for c in canvases} == {
        (picture, part) for picture in "01" for part in ("base", "grid")
    }
    images = [image.attributes["href"] for image in page.find("image")]
    assert len(images) == 2  # the heat maps show the same two
    for uri in images:
        kind, encoded = uri.removeprefix("data:image/").split(";base64,")
        assert Image.open(io.BytesIO(base64.b64decode(encoded))).format == kind.upper()


def test_tokens_are_shaded_before_the_script_runs(compared, page):
    prompts = page.find("p", class_="tokens")
    for outcome, prompt in zip(compared.outcomes, prompts, strict=True):
        share, spans = compared.kept_share(outcome), prompt.find("span")
        assert [span.text for span in spans[3:]] == ["What", " is", " it", "?↵\n"]
        assert plain(spans[1].text) == "a.png: 24 visual tokens"
        for span in spans:
            first, last = map(int, span.attributes["data-tokens"].split("-"))
            shown = float(span.attributes["style"].removeprefix("--share: "))
            assert shown == pytest.approx(share[first : last + 1].mean(), abs=6e-4)


def test_the_first_token_that_differs_is_marked(page):
    full, same, differs = page.find("article")
    assert full.find("mark") == same.find("mark") == []
    assert [mark.text for mark in differs.find("mark")] == [" box"]
    assert differs.find("p", class_="answer")[0].text == "A box"
    verdict = plain(differs.find("p", class_="verdict differs")[0].text)
    assert verdict == "Differs from token 2 on: box instead of shelf"


@pytest.mark.parametrize(
    ("tokens", "shown", "verdict"),
    [
        (("A",), "A[end]", "Differs from token 2 on: [end] instead of shelf"),
        (("A", " shelf", "."), "A shelf.", "Differs from token 3 on: . instead of [end]"),
    ],
)
def test_an_answer_that_ends_earlier_or_later(tokens, shown, verdict):
    article = page_of(made_up_inspection(answers=[tokens])).find("article")[1]
    assert article.find("p", class_="answer")[0].text == shown
    assert plain(article.find("p", class_="verdict differs")[0].text) == verdict


def test_layers_are_a_chart_and_a_table(compared, page):
    layers = compared.layers(compared.outcomes[0])
    tables = page.find("details")[-1].find("table")
    rows = [[cell.text for cell in row.find("td")] for row in tables[0].find("tr")[1:]]
    assert len(tables) == 2
    assert [row[0] for row in rows] == [str(layer["budget"]) for layer in layers]
    assert [row[6] for row in rows] == [f"{100 * layer['hit_rate']:.1f} %" for layer in layers]
    drawn = page.find("figure", class_="chart")
    assert len(drawn) == 2 * 4
    for figure in drawn[:6]:
        assert figure.find("svg")[0].attributes["aria-label"].count("; layer") == 2
    for figure in drawn[6:]:  # h2o has no sparsity and no beta
        assert "Not measured" in figure.text


def test_bars_are_as_high_as_their_numbers(compared):
    layers = [compared.layers(outcome) for outcome in compared.outcomes]
    top = scale_end(max(layer["budget"] for method in layers for layer in method))
    for method, drawn in zip(layers, charts(layers, ("visual", "text", "recent")), strict=True):
        for number, layer in enumerate(method):
            for part in ("visual", "text", "recent"):
                (bar,) = [b for b in drawn[0].bars if (b.layer, b.part) == (number, part)]
                assert bar.height == pytest.approx((BOTTOM - TOP) * layer[part] / top)
            stack = [bar for bar in drawn[0].bars if bar.layer == number]
            assert BOTTOM - min(bar.y for bar in stack) == pytest.approx(
                (BOTTOM - TOP) * layer["budget"] / top
            )


@pytest.mark.parametrize(
    ("largest", "end"), [(0, 1), (0.07, 0.08), (1, 1), (33, 40), (101, 120), (1000, 1000)]
)
def test_scales_end_at_round_numbers(largest, end):
    assert scale_end(largest) == pytest.approx(end)


def test_bytes_times_settings_and_versions_are_told(compared, page):
    tables = {plain(t.find("tr")[0].text): t for t in page.find("table")}
    numbers = tables["full cachevl-cache 0.1h2o 0.1"]
    lines = {
        row.children[0].text: [c.text for c in row.find("td")] for row in numbers.find("tr")[1:]
    }
    assert lines["kept share"] == [
        f"{100 * one.cache.kept_share:.1f} %" for one in (compared.full, *compared.outcomes)
    ]
    assert lines["time of all further tokens"] == ["0.500 s"] * 3
    assert "score.window8" in tables["vl-cache 0.1"].text
    assert "jax0.10.2" in tables["versions"].text


def test_everything_is_escaped():
    hostile = made_up_inspection(
        (f"vl-cache {HOSTILE}",),
        names=(HOSTILE,),
        pieces=("<s>", HOSTILE, "'\"`", "{{ 7 * 7 }}"),
        answer=("A", HOSTILE),
        answers=[("A", f" {HOSTILE}", HOSTILE)],
    )
    settings = hostile.settings | {HOSTILE: {"a": [HOSTILE]}}
    hostile = replace(hostile, model=HOSTILE, settings=settings, versions={HOSTILE: HOSTILE})
    page = page_of(hostile)
    assert page.find("img") == page.find("b") == []
    assert len(page.find("script")) == 2
    assert handlers(page) == []
    assert page.find("dd")[0].text == HOSTILE
    assert page.find("dd")[1].text == hostile.prompt
    assert page.find("mark")[0].text == f" {HOSTILE}"
    assert "{{ 7 * 7 }}" in page.find("p", class_="tokens")[-1].text
    assert HOSTILE in page.find("h3")[2].text
    data = data_of(page)
    assert data["pieces"][-3:] == [HOSTILE, "'\"`", "{{ 7 * 7 }}"]
    assert data["outcomes"][0]["label"] == f"vl-cache {HOSTILE}"


def test_no_address_leads_out_of_the_page(compared, page):
    text = render(compared)
    for sign in ("://", "url(", "@import", "import("):
        assert sign not in text
    found = targets(page)
    assert len(found) == 1 + 2 + 8  # icon, pictures, and the heat maps upon them
    assert all(target.startswith(("data:", "#picture-")) for target in found)
    assert "default-src 'none'" in text


@pytest.mark.parametrize("grid_side", [0, 4])
def test_parts_and_pictures_may_be_missing(grid_side):
    inspection = made_up_inspection(grid_side=grid_side)
    assert len(page_of(inspection).find("canvas")) == (2 if grid_side else 1)
    page = page_of(made_up_inspection(names=(), grid_side=grid_side))
    assert page.find("canvas") == []
    assert page.find("p", class_="tokens")[0].find("span")[0].text == "<s>"


def test_large_pictures_are_scaled_down():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (300, 1600, 3), dtype=np.uint8)
    uri = data_uri(Image.fromarray(noise))
    shown = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert (shown.format, shown.size) == ("JPEG", (LONGEST_SIDE, round(300 * LONGEST_SIDE / 1600)))
    flat = data_uri(Image.new("RGB", (40, 30), "red"))
    assert flat.startswith("data:image/png")


def test_a_page_of_a_large_model_and_five_methods_is_small():
    labels = [f"method {number}" for number in range(5)]
    inspection = made_up_inspection(
        labels, layers=32, heads=8, base_side=24, grid_side=47, size=(1200, 1000)
    )
    assert len(inspection.visual) > 2800
    assert len(render(inspection).encode()) < 3_000_000


def test_more_heads_than_a_byte_counts_are_refused():
    with pytest.raises(NotImplementedError, match="256 kv heads"):
        render(made_up_inspection(layers=1, heads=256))

"""The page of an evaluation: what is in it, where its points are, and that all of it is escaped."""

import pytest

from tests.evaluations import BUDGETS, made_up_evaluation, made_up_setting, several_methods
from tests.pages import handlers, plain, read, targets
from vlcache_jax.evaluation.page import render
from vlcache_jax.evaluation.plots import BOTTOM, HUES, LEFT, RIGHT, SHAPES, TOP, plots

HOSTILE = '<img src=x onerror="alert(1)"></style></script><b>&amp;{{ 7 * 7 }}'


def page_of(evaluation):
    return read(render(evaluation))


def rows_of(page):
    """The table of all settings, by label."""
    table = page.find("div", aria_label="All settings")[0].find("table")[0]
    rows = table.find("tbody")[0].find("tr")
    return {row.find("th")[0].text: [cell.text for cell in row.find("td")] for row in rows}


def sentences(page):
    return [plain(item.text) for item in page.find("ul", class_="card")[0].find("li")]


@pytest.fixture(scope="module")
def page():
    return page_of(several_methods())


def test_what_was_evaluated_is_told(page):
    facts = [plain(dd.text) for dd in page.find("dl", class_="facts")[0].find("dd")]
    assert facts == [
        "made up",
        "12, answered by the full cache with 340 tokens in all",
        "95 % of the tokens have to be the full cache's",
    ]
    assert plain(page.find("title")[0].text) == "Which budget is safe: made up"
    assert "jax0.10.2" in plain(page.find("table")[-1].text).replace(" ", "")


def test_the_choice_of_each_method_is_a_sentence(page):
    assert sentences(page) == [
        "vl-cache: 0.2 is the smallest budget whose interval lies at 95 % or above.",
        "h2o: no budget that was tried has its interval at 95 % or above.",
    ]


def test_a_choice_names_the_bits_of_a_quantized_cache():
    settings = [
        made_up_setting(budget=0.2, top1=0.99),
        made_up_setting(budget=0.2, kv_bits="4", top1=0.98),
        made_up_setting("h2o", 0.4, kv_bits="akvq", top1=0.999),
    ]
    evaluation = made_up_evaluation(settings, tolerance=0.955)
    assert sentences(page_of(evaluation)) == [
        "vl-cache: 0.2 with 4 bits is the smallest budget whose interval lies at 95.5 % or above.",
        "h2o: 0.4 with akvq is the smallest budget whose interval lies at 95.5 % or above.",
    ]
    assert evaluation.choice == {"vl-cache": "0.2", "h2o": "0.4"}
    assert evaluation.chosen == {"vl-cache": settings[1], "h2o": settings[2]}


@pytest.mark.parametrize(
    ("requests", "words"), [(1, "of 1 request:"), (9, "of 9 requests:"), (10, None)]
)
def test_few_requests_are_noted(requests, words):
    evaluation = made_up_evaluation([made_up_setting(top1=0.9)], requests=requests)
    notes = page_of(evaluation).find("p", role="note")
    assert [words in plain(note.text) for note in notes] == ([True] if words else [])


def test_all_numbers_of_a_setting_are_in_the_table(page):
    rows = rows_of(page)
    assert list(rows) == [setting.label for setting in several_methods().settings]
    assert rows["vl-cache 0.1"] == [
        "10.0 %", "94.0 % (92.0 to 96.0)", "0.03 (0.02 to 0.04)", "0.06", "61.0 %", "10.5",
    ]  # fmt: skip
    assert rows["vl-cache 0.4"][-1] == "-"  # no answer differs
    head = [cell.text for cell in page.find("div", aria_label="All settings")[0].find("th")[:7]]
    meanings = page.find("dl", class_="facts meanings")[0]
    assert [term.text for term in meanings.find("dt")] == head
    assert all(plain(meaning.text) for meaning in meanings.find("dd"))


def test_plots_say_their_numbers_in_words(page):
    same, kl = page.find("svg", role="img")
    settings = several_methods().settings
    for drawn in (same, kl):
        words = drawn.attributes["aria-label"]
        titles = [title.text for title in drawn.find("title")]
        assert sorted(titles) == sorted(words.split(". ", 1)[1].split("; "))
        assert len(titles) == len(drawn.find("path", class_="whisker")) == len(settings)
    assert "h2o 0.1: 10.0 % of the bytes, 85.0 % (83.0 to 87.0)" in same.attributes["aria-label"]
    assert "h2o 0.1: 10.0 % of the bytes, 0.075 (0.065 to 0.085)" in kl.attributes["aria-label"]


def test_a_method_has_one_look_in_legend_and_plots(page):
    legend = page.find("ul", class_="legend")[0].find("li")
    assert [plain(item.text) for item in legend] == ["vl-cache", "h2o", "vl-cache, 4 bits"]
    looks = [(i.attributes["style"], i.find("path")[0].attributes["d"]) for i in legend]
    assert len({hue for hue, _ in looks}) == len({shape for _, shape in looks}) == 3
    for drawn in page.find("svg", role="img"):
        for (hue, shape), series in zip(looks, drawn.find("g", class_="series"), strict=True):
            marks = series.find("path", class_="mark")
            assert (series.attributes["style"], len(marks)) == (hue, len(BUDGETS))
            assert {mark.attributes["d"] for mark in marks} == {shape}


def test_many_methods_all_look_otherwise():
    settings = [made_up_setting(f"method-{n}", top1=0.9) for n in range(len(HUES) * len(SHAPES))]
    same, kl = plots(made_up_evaluation(settings))
    assert len({(series.hue, series.shape) for series in same.series}) == len(settings)
    places = [point.x for series in same.series for point in series.points]
    assert LEFT < min(places) < max(places) < RIGHT
    assert [point.x for series in kl.series for point in series.points] == places


def test_points_are_where_the_scales_have_their_numbers():
    """Same tokens from 85 % to 100 %, KL from 0.001 to 0.1; of one method, so none is aside."""
    settings = [
        made_up_setting(budget=0.1, top1=0.85, kl=0.1,
                        intervals={"top1": (0.85, 0.925), "kl": (0.0, 0.1)}),
        made_up_setting(budget=0.01, top1=0.925, kl=0.01,
                        intervals={"top1": (0.85, 1.0), "kl": (0.001, 0.1)}),
        made_up_setting(budget=1.0, top1=1.0, kl=0.0,
                        intervals={"top1": (1.0, 1.0), "kl": (0.0, 0.0)}),
    ]  # fmt: skip
    same, kl = plots(made_up_evaluation(settings, tolerance=0.8875))
    middle = (TOP + BOTTOM) / 2
    assert [text for _, text in same.rows] == ["100 %", "96.25 %", "92.5 %", "88.75 %", "85 %"]
    ticks = ["≤ 0.001", "0.002", "0.005", "0.01", "0.02", "0.05", "0.1"]
    assert [text for _, text in kl.rows] == ticks
    assert same.limit == (pytest.approx(same.rows[3][0]), "tolerance 88.75 %")
    first, second, last = same.series[0].points
    columns = {text: x for x, text in same.columns}
    assert list(columns) == ["1 %", "2 %", "5 %", "10 %", "20 %", "50 %", "100 %"]
    assert first.x == pytest.approx(columns["1 %"])
    assert second.x == pytest.approx(columns["10 %"]) == pytest.approx((first.x + last.x) / 2)
    assert last.x == pytest.approx(columns["100 %"])
    assert [point.y for point in (first, second, last)] == pytest.approx([middle, BOTTOM, TOP])
    assert first.ends == pytest.approx((BOTTOM, TOP))
    first, second, last = kl.series[0].points
    assert [point.y for point in (first, second, last)] == pytest.approx([middle, TOP, BOTTOM])
    assert first.ends == second.ends == pytest.approx((BOTTOM, TOP))  # 0 is at the edge


@pytest.mark.parametrize("kl", [0.0, -1e-9, 1e-8])
def test_a_kl_of_nothing_is_at_the_edge(kl):
    setting = made_up_setting(top1=1.0, kl=kl, intervals={"top1": (1.0, 1.0), "kl": (kl, kl)})
    _, drawn = plots(made_up_evaluation([setting]))
    assert drawn.series[0].points[0].y == BOTTOM
    assert drawn.rows[0] == (BOTTOM, "≤ 1e-07")


def test_a_long_scale_has_powers_of_ten_alone():
    settings = [made_up_setting(budget=budget, top1=0.5) for budget in (0.0003, 0.9)]
    columns = plots(made_up_evaluation(settings))[0].columns
    assert [text for _, text in columns] == ["0.1 %", "1 %", "10 %", "100 %"]


def test_answers_without_tokens_have_no_numbers():
    settings = [made_up_setting(top1=None), made_up_setting("h2o", top1=None)]
    page = page_of(made_up_evaluation(settings, tokens=0))
    assert page.find("svg", role="img") == []
    assert page.text.count("Nothing to compare") == 2
    assert rows_of(page)["vl-cache 0.1"] == ["10.0 %", "-", "-", "-", "100.0 %", "-"]
    assert [sentence.split(": ")[1][:9] for sentence in sentences(page)] == ["no budget"] * 2


def test_some_settings_may_have_no_numbers():
    settings = [made_up_setting(budget=0.1, top1=None), made_up_setting(budget=0.2, top1=0.9),
                made_up_setting("h2o", top1=None)]  # fmt: skip
    for drawn in page_of(made_up_evaluation(settings)).find("svg", role="img"):
        assert len(drawn.find("g", class_="series")) == 1
        assert [title.text[:12] for title in drawn.find("title")] == ["vl-cache 0.2"]


def test_everything_is_escaped():
    setting = made_up_setting(HOSTILE, kv_bits=HOSTILE, top1=0.99, budget=0.1)
    hostile = made_up_evaluation([setting], model=HOSTILE, requests=2, versions={HOSTILE: HOSTILE})
    page = page_of(hostile)
    assert page.find("img") == page.find("b") == page.find("script") == handlers(page) == []
    assert page.find("dd")[0].text == HOSTILE
    assert HOSTILE in sentences(page)[0]
    assert list(rows_of(page)) == [setting.label]
    assert HOSTILE in page.find("svg", role="img")[0].attributes["aria-label"]
    assert [cell.text for cell in page.find("table")[-1].find("td")] == [HOSTILE]


def test_no_address_leads_out_of_the_page(page):
    text = render(several_methods())
    for sign in ("://", "url(", "@import"):
        assert sign not in text
    assert targets(page) == ["data:,"]
    policy = page.find("meta", http_equiv="Content-Security-Policy")[0].attributes["content"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

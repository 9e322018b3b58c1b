"""What an inspection holds, of a tiny model: arrays, pictures, texts, files and figures."""

import json
import sys
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import vlcache_jax
from tests.inspections import made_up_inspection
from tests.tiny import picture
from vlcache_jax import RTN, Custom, FullCache, VLCache
from vlcache_jax.cache.quantizers import make_quantizer
from vlcache_jax.errors import short
from vlcache_jax.results.inspection import figures

METHODS = (VLCache(0.3, quantize=make_quantizer("4")),)
TEXT = "one <image> two <image> é?"


@pytest.fixture(scope="module")
def vlm(model_dir):
    return vlcache_jax.load(model_dir)


@pytest.fixture(scope="module")
def seen(vlm, tmp_path_factory):
    """Two pictures and two answers; the second picture has a file."""
    file = tmp_path_factory.mktemp("pictures") / "<b>.png"
    picture(30, 90).save(file)
    stages = []
    found = vlcache_jax.inspect(
        vlm,
        [picture(70, 40), file],
        TEXT,
        methods=METHODS,
        max_new_tokens=6,
        progress=lambda *stage: stages.append(stage),
    )
    labels = ["full", "vl-cache+rtn 0.3"]
    assert stages == [(label, done, 2) for done, label in enumerate(labels)]
    assert [outcome.label for outcome in (found.full, *found.outcomes)] == labels
    return found


def outcomes_of(found):
    return [found.full, *found.outcomes]


def kept_of(outcome):
    """Positions that each head of each layer keeps."""
    return [[{p for p in head if p >= 0} for head in layer] for layer in outcome.trace.kept]


def test_shares_are_counts_of_layers_and_heads(seen):
    m = len(seen.pieces)
    for outcome in outcomes_of(seen):
        kept = kept_of(outcome)
        by_layer = [[sum(p in head for head in layer) / 2 for p in range(m)] for layer in kept]
        np.testing.assert_array_equal(seen.kept_by_layer(outcome), by_layer)
        np.testing.assert_allclose(seen.kept_share(outcome), np.mean(by_layer, axis=0))
    assert (seen.kept_share(seen.full) == 1).all()
    assert (seen.kept_share(seen.outcomes[0]) < 1).any()


def test_layers_are_split_into_what_they_keep(seen):
    m = len(seen.pieces)
    # The shares of the budget that go to the last tokens, in whole tokens.
    ratios = {"vl-cache+rtn 0.3": 0.1, "full": 0}
    for outcome in outcomes_of(seen):
        assert len(seen.layers(outcome)) == 2
        for layer, heads in zip(seen.layers(outcome), kept_of(outcome), strict=True):
            budget, recent = layer["budget"], layer["recent"]
            assert budget == outcome.cache.layer_budgets[layer["layer"]]
            assert recent == int(budget * ratios[outcome.label])
            last = set(range(m - recent, m))
            assert all(last <= head for head in heads)
            visual = np.mean([sum(seen.visual[p] for p in head - last) for head in heads])
            text = np.mean([sum(not seen.visual[p] for p in head - last) for head in heads])
            assert (layer["visual"], layer["text"]) == (visual, text)
            assert visual + text + recent == budget
            has = outcome.label.startswith("vl-cache")
            assert (layer["sparsity"] is not None) == (layer["beta"] is not None) == has
            rates = outcome.trace.hit_rate[layer["layer"]]
            assert layer["hit_rate"] == pytest.approx(rates.mean())
            assert 0 <= layer["hit_rate"] <= layer["mass_recall"] + 1 <= 2.001
    assert all(layer["hit_rate"] == 1 for layer in seen.layers(seen.full))


def test_answers_are_compared_with_the_full_caches(seen):
    full = seen.full
    assert full.first_difference is None
    for outcome in outcomes_of(seen):
        assert "".join(outcome.pieces) == outcome.text
        at = outcome.first_difference
        if at is None:
            assert outcome.text == full.text
        else:
            assert outcome.pieces[:at] == full.pieces[:at]
            assert outcome.pieces[at:] != full.pieces[at:]
        assert outcome.timings.prefill_s is not None
    assert full.cache.kept_share == 1
    assert seen.outcomes[0].cache.kv_bits == "4"


def test_pictures_are_found_in_the_prompt(vlm, seen):
    first, second = seen.pictures
    assert (first.name, second.name) == ("picture 1", "<b>.png")
    assert second.image.size == (30, 90)
    np.testing.assert_array_equal(np.asarray(first.image), np.asarray(picture(70, 40)))
    places = np.concatenate([first.positions, second.positions])
    np.testing.assert_array_equal(places, np.flatnonzero(seen.visual))
    # Between them stands the text between their marks.
    between = seen.pieces[first.positions[-1] + 1 : second.positions[0]]
    assert "two" in "".join(between)
    # 70 x 40 is 98 x 56 in a grid of 112 x 56, and all patches hold a part of it. 30 x 90 is
    # 38 x 112 in 56 x 112, from pixel 9 on: of four columns of patches the middle two are kept.
    edges = (0, 0, 70, 40), (5 * 30 / 38, 0, 33 * 30 / 38, 90)
    for found, rows, expected in zip(seen.pictures, (4, 8), edges, strict=True):
        assert np.sum(found.part == 0) == 16
        assert np.sum(found.part == 2) == rows
        area = found.rectangles[found.part == 1]
        assert (*area[:, :2].min(axis=0), *area[:, 2:].max(axis=0)) == pytest.approx(expected)


def test_pieces_are_the_prompt(vlm, seen):
    assert seen.prompt == TEXT
    assert "".join(seen.pieces) == "<s>user: one \n two \n é?\nassistant:"
    assert seen.pieces[0] == "<s>"
    at = seen.pieces.index("é")
    assert seen.pieces[at - 1] == ""  # the first of its two bytes
    assert not seen.visual[at - 1]
    assert all(not piece for piece, visual in zip(seen.pieces, seen.visual, strict=True) if visual)


def test_json_is_all_of_it(seen, tmp_path):
    file = tmp_path / "numbers.json"
    seen.save(file)
    values = json.loads(file.read_text(encoding="utf-8"))
    assert values == json.loads(json.dumps(seen.as_json(), allow_nan=False))
    assert values["visual"] == seen.visual.tolist()
    for outcome, found in zip(seen.outcomes, values["outcomes"], strict=True):
        assert [[set(head) for head in layer] for layer in found["kept"]] == kept_of(outcome)
        assert found["cache"]["layer_budgets"] == [row["budget"] for row in found["layers"]]
    assert values["full"]["kept"] is None
    for found, shown in zip(seen.pictures, values["pictures"], strict=True):
        assert (shown["width"], shown["height"]) == found.image.size
        assert shown["rectangles"].count(None) == np.sum(found.part == 2)
        assert shown["rectangles"][0] == found.rectangles[0].tolist()
    method = values["settings"]["methods"]["vl-cache+rtn 0.3"]
    assert (method["name"], method["budget"]) == ("vl-cache", 0.3)
    assert (method["quantize"]["name"], method["quantize"]["bits"]) == ("rtn", 4)
    assert values["settings"]["dtype"] == "float32"
    assert values["versions"]["jax"] == jax.__version__


def test_files_are_whole_or_not_there(seen, tmp_path, monkeypatch):
    page = tmp_path / "report.html"
    seen.save(page)
    before = page.read_text(encoding="utf-8")
    assert "&lt;b&gt;.png" in before
    with pytest.raises(FileExistsError, match="--force"):
        seen.save(page)

    def fail(_):
        raise RuntimeError("drawing failed")

    with monkeypatch.context() as patch:
        patch.setattr("vlcache_jax.results.inspection.page.render", fail)
        with pytest.raises(RuntimeError, match="drawing failed"):
            seen.save(page, force=True)
    assert page.read_text(encoding="utf-8") == before
    with pytest.raises(ValueError, match=r"must end in \.html .* or \.json"):
        seen.save(tmp_path / "report.txt")
    with pytest.raises(FileNotFoundError, match="no directory"):
        seen.save(tmp_path / "none" / "report.html")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_bad_input_is_refused_before_the_parameters_are_read(vlm, tmp_path):
    cases: list[tuple[type[Exception], str, Any, Any]] = [
        (ValueError, "nothing to inspect", None, []),
        (FileNotFoundError, "no image file", tmp_path / "none.png", METHODS),
        (ValueError, "is not an image", [None], METHODS),
        (ValueError, "positions", None, METHODS),
    ]

    def never():
        raise AssertionError("the parameters were read")

    unread = vlcache_jax.VLM(vlm.config, never, vlm.processor, stop_ids=())
    for error, message, images, methods in cases:
        text = "what?" * 500 if message == "positions" else "what?"
        with pytest.raises(error, match=message):
            vlcache_jax.inspect(unread, images, text, methods=methods)


# Figures


@pytest.fixture
def made_up():
    return made_up_inspection(("vl-cache 0.1", "h2o 0.1"), names=("a.png", "b.png"))


def test_figures_are_files(made_up, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(figures, "DPI", 40)
    folder = tmp_path / "figures"
    files = made_up.save_figures(folder)
    assert sorted(folder.iterdir()) == sorted(files)
    for file in files:
        with Image.open(file) as image:
            assert (image.format, image.info["dpi"]) == ("PNG", pytest.approx((40, 40), abs=0.1))
            colours = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
            assert len(colours) > 20
    with pytest.raises(FileExistsError, match=r"heat\.png exists"):
        made_up.save_figures(folder)
    assert made_up.save_figures(folder, force=True) == files
    with pytest.raises(ValueError, match="is a file"):
        made_up.save_figures(files[0])
    with pytest.raises(FileNotFoundError, match="no directory"):
        made_up.save_figures(tmp_path / "none" / "figures")


def test_a_heat_map_has_the_patches_that_are_kept(made_up):
    pytest.importorskip("matplotlib")
    figure = figures.draw_heat(made_up)
    *maps, bar = figure.axes
    assert len(maps) == 8  # two pictures, their base tiles and grids, by two methods
    columns = [made_up.kept_share(outcome) for outcome in made_up.outcomes]
    largest = max(share[made_up.visual].max() for share in columns)
    assert bar.get_ylim() == pytest.approx((0, largest))
    for number, axes in enumerate(maps):
        row, column = divmod(number, 2)
        shown = made_up.pictures[row // 2]
        own = shown.part == row % 2
        share = columns[column][shown.positions[own]]
        corners = [list(path.get_extents().extents) for path in axes.collections[0].get_paths()]
        expected = shown.rectangles[own][share > 0]
        np.testing.assert_allclose(corners, expected, atol=1e-9)
        colours = np.asarray(axes.collections[0].get_facecolor())
        order = np.argsort(share[share > 0])
        green = colours[order, 1]  # the more of it is kept, the redder it is
        assert (np.diff(green) <= 1e-9).all()


def test_bars_and_lines_are_the_layers_numbers(made_up):
    pytest.importorskip("matplotlib")
    layers = [made_up.layers(outcome) for outcome in made_up.outcomes]
    figure = figures.draw_layers(made_up)
    budgets, shares = figure.axes[:2], figure.axes[2:]
    for axes, rows in zip(budgets, layers, strict=True):
        tops = [max(bar.get_y() + bar.get_height() for bar in bars)
                for bars in zip(*axes.containers, strict=True)]  # fmt: skip
        assert tops == pytest.approx([row["budget"] for row in rows])
        heights = [bar.get_height() for bar in axes.containers[0]]
        assert heights == pytest.approx([row["visual"] for row in rows])
    assert [len(axes.lines) for axes in shares] == [2, 0]
    assert shares[0].lines[1].get_ydata() == pytest.approx([row["beta"] for row in layers[0]])
    hits, recalls = figures.draw_hits(made_up).axes
    for axes, name in ((hits, "hit_rate"), (recalls, "mass_recall")):
        for line, rows in zip(axes.lines, layers, strict=True):
            assert line.get_ydata() == pytest.approx([row[name] for row in rows])


def test_a_prompt_without_pictures_has_figures_too():
    pytest.importorskip("matplotlib")
    made = made_up_inspection(names=())
    assert "no picture" in figures.draw_heat(made).axes[0].get_xlabel()


def test_without_matplotlib_the_extra_is_named(made_up, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"vlcache-jax\[bench\]"):
        made_up.save_figures(tmp_path / "figures")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
def test_no_two_columns_have_one_label(vlm):
    """Settings of one name are told apart by what differs between them."""

    def own(layer):
        return layer.k.sum(-1).swapaxes(1, 2)

    methods = [
        VLCache(0.3),
        VLCache(0.3, threshold=0.1),
        VLCache(0.3, threshold=0.1, recent_ratio=0.5),
        VLCache(0.2),
        RTN(bits=2, transform=True),
        RTN(bits=4),
        Custom(0.3),
        Custom(0.3, score=own),
    ]
    found = vlcache_jax.inspect(vlm, text="a b c", methods=methods, max_new_tokens=1)
    labels = [outcome.label for outcome in found.outcomes]
    assert labels == [
        "vl-cache 0.3, recent_ratio=0.1, threshold=0.01",
        "vl-cache 0.3, recent_ratio=0.1, threshold=0.1",
        "vl-cache 0.3, recent_ratio=0.5, threshold=0.1",
        "vl-cache 0.2",
        "full+rtn, bits=2, transform=True",
        "full+rtn, bits=4, transform=False",
        "custom 0.3, score=post-vision",
        f"custom 0.3, score={short(own.__qualname__)}",
    ]
    assert len({*labels, found.full.label}) == 9
    assert list(found.settings["methods"]) == [found.full.label, *labels]


@pytest.mark.parametrize(
    "methods",
    [[VLCache(0.3), VLCache(0.3)], [VLCache("0.30"), VLCache(0.3)], [FullCache()], ["full"]],
)
def test_two_columns_that_cannot_be_told_apart_are_refused(vlm, methods):
    with pytest.raises(ValueError, match="several columns would be called") as refused:
        vlcache_jax.inspect(vlm, text="a b c", methods=methods, max_new_tokens=1)
    assert "\n" not in str(refused.value)

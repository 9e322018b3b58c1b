"""The server's page in a real browser: ask, watch and stop, and what it says of errors."""

import base64
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.browser import check_no_overflow, choose_scheme, opened_address
from tests.serving.servers import asked, png, post, serving, wait
from tests.serving.test_engine import T
from tests.tiny import picture
from vlcache_jax.serving import Engine, SlotGroup
from vlcache_jax.serving.http import ServerSettings

SETTINGS = ServerSettings("tiny", "vl-cache", "0.3", default_tokens=8)
SHOWN = picture(70, 40, 1)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "shown.png"
    SHOWN.save(path)
    return path


@pytest.fixture(scope="module")
def port(vlm, engine):
    with serving(vlm, engine, SETTINGS) as port:
        yield port


@pytest.fixture(scope="module")
def opened():
    with opened_address("about:blank") as opened:
        yield opened


@pytest.fixture
def page(opened, port):
    """The page as it is when it is opened; it asks its own server alone, without a complaint."""
    page, complaints, requests = opened
    page.set_viewport_size({"width": 1400, "height": 900})
    choose_scheme(page, "light")
    requests.clear()
    page.goto(address(port))
    page.get_by_text("tiny", exact=True).wait_for()
    yield page
    assert complaints == []
    assert all(url.startswith((address(port), "data:")) for url in requests), requests


def address(port):
    return f"http://127.0.0.1:{port}/"


def ask(page, text):
    """Ask, and wait for the end."""
    before = page.locator("article").count()
    page.get_by_label("Question", exact=True).fill(text)
    page.keyboard.press("Enter")
    page.locator("article").nth(before).wait_for()
    page.get_by_role("button", name="Stop").wait_for(state="hidden")
    return page.locator("article").nth(before)


def facts(part):
    names, values = part.locator("dt").all_inner_texts(), part.locator("dd").all_inner_texts()
    return dict(zip(names, values, strict=True))


def told(port, said, **fields):
    """What the server answers to questions and answers in turns; test_http.py looks at that."""
    body: dict[str, Any] = asked(said[0], png(SHOWN)) | {"kv_map": True} | fields
    for role, text in zip(("assistant", "user"), said[1:], strict=False):
        body["messages"].append({"role": role, "content": text})
    status, _, answer = post(port, body)
    assert status == 200
    return answer["choices"][0]["message"]["content"], answer["usage"]


def test_questions_about_a_picture_beside_the_full_cache(page, port, file):
    page.get_by_label("Pictures").set_input_files(file)
    page.get_by_alt_text("Picture 1").wait_for()
    turn = ask(page, "word one")
    wanted = [told(port, ["word one"], kv_method=method) for method in ("vl-cache", "full")]
    columns, titles = turn.locator("section").all(), ["vl-cache, 0.3", "full cache"]
    for column, title, (text, usage) in zip(columns, titles, wanted, strict=True):
        assert column.locator("h3").inner_text() == title
        assert column.locator(".answer").text_content() == text
        assert column.locator(".answer").get_attribute("aria-live") == "polite"
        assert column.locator(".answer").get_attribute("aria-busy") == "false"
        shown = facts(column)
        assert shown["prompt tokens"] == str(usage["prompt_tokens"])
        assert shown["answer tokens"].split(",")[0] == str(usage["completion_tokens"])
        assert f"({100 * usage['kv_cache']['kept_share']:.1f} %)" in shown["cache kept"]
        assert shown["first token"] <= shown["whole answer"]
    # Without what is marked, both say the same.
    assert len({text for text, _ in wanted}) == 2
    bare = """(part) => {
        const copy = part.querySelector(".answer").cloneNode(true);
        copy.querySelectorAll("mark").forEach((mark) => mark.remove());
        return copy.textContent.replace(/\\s/g, "");
    }"""
    assert len({column.evaluate(bare) for column in columns}) == 1
    for column in columns:
        count = column.locator("mark").count()
        assert column.locator(".verdict").inner_text().endswith(f": {count} marked.")
    # The heat map, and in words.
    found = wanted[0][1]["kv_cache"]["map"]
    mean = np.mean(found["pictures"][0]["kept"])
    words = f"{100 * mean:.1f} % of the tokens of the picture are kept"
    assert turn.get_by_role("img", name=words).count() == 1
    assert f"{100 * found['text']:.1f} % of the tokens of the text are kept." in turn.inner_text()
    seen = []
    for scheme in ("light", "dark"):
        choose_scheme(page, scheme)
        seen.append(drawn(turn))
        for width in (360, 1400):
            check_no_overflow(page, width)
    assert seen[0] != seen[1]
    # The next question comes behind the turns so far, and its picture was run already.
    column = ask(page, "two").locator("section").first
    text, usage = told(port, ["word one", wanted[0][0], "two"])
    assert column.locator(".answer").text_content() == text
    assert facts(column)["prompt tokens"] == str(usage["prompt_tokens"])
    assert int(facts(column)["cached tokens"]) > 0


def drawn(turn):
    """The colours of a heat map, which lies on all of the picture."""
    url = turn.locator("canvas").evaluate("(canvas) => canvas.toDataURL()")
    image = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
    assert image.width / image.height == pytest.approx(70 / 40, rel=0.01)
    found = np.unique(np.asarray(image).reshape(-1, 4), axis=0).tolist()
    assert len(found) > 2
    assert all(alpha == 255 for *_, alpha in found)
    return found


def test_text_alone_by_another_method_and_a_new_conversation(page, port):
    page.get_by_label("Method").select_option("full")
    assert page.get_by_label("Budget").is_disabled()
    assert not page.get_by_label("The answer of the full cache").is_visible()
    turn = ask(page, "one")
    want = post(port, asked("one", kv_method="full"))[2]["choices"][0]["message"]["content"]
    assert turn.locator(".answer").all_text_contents() == [want]
    assert turn.locator("canvas").count() == 0
    page.get_by_role("button", name="New conversation").click()
    assert page.locator("article").count() == 0
    assert ask(page, "one").locator(".answer").all_text_contents() == [want]


GIVE = """([event, url]) => {
    const bytes = Uint8Array.from(atob(url.split(",")[1]), (one) => one.charCodeAt(0));
    const given = new DataTransfer();
    given.items.add(new File([bytes], "a.png", { type: "image/png" }));
    document.dispatchEvent(event === "drop" ? new DragEvent("drop", { dataTransfer: given })
        : new ClipboardEvent("paste", { clipboardData: given }));
}"""


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_pictures_are_dropped_and_pasted(page, event):
    page.evaluate(GIVE, [event, png(SHOWN)])
    page.get_by_alt_text("Picture 1").wait_for()
    page.get_by_role("button", name="No pictures").click()
    assert page.get_by_alt_text("Picture 1").count() == 0


@pytest.mark.usefixtures("slow")
def test_it_is_used_by_keys_alone_and_escape_stops(engine, page):
    names: list[str] = []
    for _ in range(6):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.id"))
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert page.evaluate(outline) == "solid"
    assert names == ["files", "question", "method", "budget", "compare", "send"]
    page.get_by_label("Question", exact=True).focus()
    page.keyboard.type("a")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("b")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="a b").wait_for()
    page.get_by_role("button", name="Stop").wait_for()
    page.keyboard.press("Escape")
    page.get_by_text("Stopped.").first.wait_for()
    page.get_by_role("button", name="Stop").wait_for(state="hidden")
    wait(lambda: engine.load[::2] == (0, 0))  # the server was told


def test_errors_are_one_line_and_the_question_is_not_lost(page, opened):
    page.get_by_label("Question", exact=True).focus()
    page.keyboard.press("Enter")
    alert = page.get_by_role("alert")
    assert alert.inner_text() == "Write a question first."
    page.get_by_label("Budget").fill("7")
    page.get_by_label("The answer of the full cache").uncheck()
    page.get_by_label("Question", exact=True).fill("one")
    page.keyboard.press("Enter")
    alert.filter(has_text="budget").wait_for()
    page.get_by_role("button", name="Stop").wait_for(state="hidden")
    assert "7" in alert.inner_text()
    assert "\n" not in alert.inner_text()
    assert page.get_by_label("Question", exact=True).input_value() == "one"
    assert page.locator("article").count() == 0
    forget(opened, "status of 400")


def forget(opened, *parts):
    """Browsers themselves tell of each response that is an error."""
    complaints = opened[1]
    assert all(any(part in text for part in parts) for text in complaints), complaints
    complaints.clear()


def test_a_key_is_asked_for_where_the_server_wants_one(vlm, engine, opened):
    page = opened[0]
    with serving(vlm, engine, replace(SETTINGS, api_key="sesame")) as port:
        page.goto(address(port))
        field = page.get_by_label("API key")
        for key, seen in (("wrong", "API key is missing or wrong"), ("sesame", "tiny")):
            field.fill(key)
            page.keyboard.press("Enter")
            page.get_by_text(seen).first.wait_for()
        field.wait_for(state="hidden")
        assert ask(page, "one").locator(".answer").count() == 2
        assert page.get_by_role("alert").inner_text() == ""
        forget(opened, "status of 401")


def test_a_server_that_starts_fails_or_goes(vlm, opened):
    page = opened[0]
    engine = Engine(vlm, ["full"], [SlotGroup(1, 9, 1.0)], prompt_rows=T)
    with serving(vlm, engine, SETTINGS) as port:
        policy = page.goto(address(port)).headers["content-security-policy"]
        page.get_by_text("The server is starting").wait_for()
        engine.error = OSError("gone")
        page.get_by_text("The server has failed").wait_for()
    page.get_by_text("The server cannot be reached").wait_for()
    forget(opened, "status of 503", "status of 500", "ERR_")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy

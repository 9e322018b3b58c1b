"""A text that a question is about: where it goes, and which tokens are its own."""

import json

import numpy as np
import pytest

import vlcache_jax
from tests.requests.test_messages import STRICT_TEMPLATE, make, say
from tests.tiny import IMAGES_FIRST_TEMPLATE, picture
from vlcache_jax.requests.inputs import CONTEXT

CONTEXTS = ["The sky is blue.", "  a\n\nb  ", "x", "Grüße, 世界 🎈 and <s> more", "what?"]


def about(inputs, row=0):
    """Which of a prompt's tokens are the context's, bool [m]."""
    return inputs.visual_index[row, : inputs.length[row]] == CONTEXT


def texts(process, inputs, row=0):
    """The prompt as text, and that of the context's tokens in it."""
    ids = inputs.tokens[row, : inputs.length[row]]
    return process.tokenizer.decode(ids), process.tokenizer.decode(ids[about(inputs, row)])


@pytest.fixture(scope="module")
def decoder(text_dir):
    return vlcache_jax.load(text_dir, lazy=True).processor


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("family", ["llava", "text"])
def test_it_stands_in_front_of_the_question(family, context, decoder):
    process = decoder if family == "text" else make()
    inputs = process(None, "what?", context=context)
    same = process(None, f"{context.strip()}\n\nwhat?")
    np.testing.assert_array_equal(inputs.tokens, same.tokens)
    whole, own = texts(process, inputs)
    assert own == context.strip()
    assert whole.index(own) < whole.rindex("what?")
    assert not (same.visual_index == CONTEXT).any()
    assert np.ptp(np.flatnonzero(about(inputs))) + 1 == about(inputs).sum()  # one run


def test_of_the_same_words_the_first_ones_are_the_context(decoder):
    inputs = decoder(None, "yes yes", context="yes yes")
    places = np.flatnonzero(about(inputs))
    again = decoder(None, "yes yes").length[0]
    assert places[-1] < inputs.length[0] - (again - places[0]) + 1
    assert texts(decoder, inputs)[1] == "yes yes"


@pytest.mark.parametrize("template", [None, IMAGES_FIRST_TEMPLATE])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_pictures_come_before_it(family, template):
    process = make(family=family) if template is None else make(template, family)
    inputs = process([picture(60, 40)], "what is it?", context="A lamp.")
    index = inputs.visual_index[0, : inputs.length[0]]
    assert texts(process, inputs)[1] == "A lamp."
    assert np.flatnonzero(index >= 0).max() < np.flatnonzero(index == CONTEXT).min()
    alone = process([picture(60, 40)], "A lamp.\n\nwhat is it?")
    np.testing.assert_array_equal(inputs.tokens, alone.tokens)
    visual = alone.visual_index >= 0
    np.testing.assert_array_equal(inputs.visual_index[visual], alone.visual_index[visual])


def test_marks_stay_where_they_are():
    process = make()
    inputs = process([picture(60, 40)], "one <image> two?", context="A lamp.")
    index = inputs.visual_index[0, : inputs.length[0]]
    assert texts(process, inputs)[1] == "A lamp."
    assert np.flatnonzero(index >= 0).min() > np.flatnonzero(index == CONTEXT).max()


def test_it_belongs_to_the_first_message_of_the_user():
    process = make(STRICT_TEMPLATE)
    turns = [say("user", "one?"), say("assistant", "1"), say("user", "two?")]
    whole, own = texts(process, process(None, turns, context="A lamp."))
    assert own == "A lamp."
    assert "A lamp.\n\none?" in whole
    with pytest.raises(ValueError, match="where the context could go"):
        make()(None, [say("assistant", "1")], context="A lamp.")


def test_a_raw_prompt_has_it_directly_in_front(decoder):
    inputs = decoder(None, " what?", context=" A lamp. ", raw_prompt=True)
    np.testing.assert_array_equal(
        inputs.tokens, decoder(None, " A lamp.  what?", raw_prompt=True).tokens
    )
    assert texts(decoder, inputs)[1].strip() == "A lamp."


def test_each_prompt_of_a_batch_has_its_own(decoder):
    asked, contexts = ["a?", "b?", "c?"], ["A lamp.", None, "Two lamps."]
    batch = decoder(None, asked, context=contexts)
    for row, (question, context) in enumerate(zip(asked, contexts, strict=True)):
        alone = decoder(None, question, context=context)
        np.testing.assert_array_equal(about(batch, row), about(alone))
        assert texts(decoder, batch, row) == texts(decoder, alone)
    assert not about(batch, 1).any()


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ("", "empty"),
        (" \n", "empty"),
        (5, "must be a string"),
        (["a", "b"], "must be a string"),
        ("long " * 2000, "positions: shorten the text or its context"),
    ],
)
def test_what_is_no_context_is_refused(decoder, context, message):
    with pytest.raises(ValueError, match=message):
        decoder(None, "what?", context=context)


def test_as_many_as_there_are_texts(decoder):
    with pytest.raises(ValueError, match="2 texts but 1 entries in context"):
        decoder(None, ["a", "b"], context=["x"])


def test_codes_that_are_no_characters_do_not_mislead(decoder):
    whole, own = texts(decoder, decoder(None, "wh\ufdd1at?", context="A \ufdd0 la\ufdd1mp."))
    assert own == "A \ufffd la\ufffdmp."
    assert "wh\ufffdat?" in whole


def test_a_template_that_leaves_it_out_is_refused():
    with pytest.raises(ValueError, match="leaves the context out"):
        make("{{ 'always the same' }}")(None, "what?", context="A lamp.")


def test_a_tokenizer_that_tells_no_characters_is_refused(decoder, monkeypatch):
    monkeypatch.setattr(type(decoder.tokenizer), "is_fast", False)
    decoder(None, "what?")
    with pytest.raises(NotImplementedError, match=r"tokenizer\.json"):
        decoder(None, "what?", context="A lamp.")


def test_answers_tell_it_and_methods_take_it_for_a_picture(text_dir):
    """The window of VL-Cache is what follows it, and what is kept of it is told apart."""
    vlm = vlcache_jax.load(text_dir)
    ask = {"text": "what is it about?", "context": "A lamp and a chair. " * 9, "max_new_tokens": 2}
    answer = vlm.generate(**ask, cache=vlcache_jax.VLCache(0.3), trace=True)
    assert answer.trace is not None
    own = answer.trace.prompt_is_context
    inputs = vlm.processor(None, ask["text"], context=ask["context"])
    np.testing.assert_array_equal(own, about(inputs))
    assert (answer.context_tokens, answer.visual_tokens) == (own.sum(), 0)
    assert answer.trace.window_start == np.flatnonzero(own).max() + 1
    kept = [
        np.isin(np.flatnonzero(own), head).sum() for heads in answer.trace.kept for head in heads
    ]
    assert answer.cache.kept_visual == pytest.approx(np.mean(kept))
    plain = vlm.generate(text=f"{ask['context'].strip()}\n\n{ask['text']}", max_new_tokens=2)
    assert plain.tokens == vlm.generate(**ask).tokens
    assert plain.context_tokens == 0
    batch = vlm.generate(
        text=["a?", ask["text"]], context=[None, ask["context"]], max_new_tokens=2,
        cache=vlcache_jax.VLCache(0.3),
    )  # fmt: skip
    assert batch[1].tokens == answer.tokens
    assert [each.context_tokens for each in batch] == [0, own.sum()]


def test_pages_and_reports_say_context(text_dir, tmp_path):
    from vlcache_jax.results import display
    from vlcache_jax.results.inspection import inspect

    vlm = vlcache_jax.load(text_dir)
    found = inspect(
        vlm, None, "what?", methods=[vlcache_jax.H2O(0.4)], context="A lamp. " * 9,
        max_new_tokens=2,
    )  # fmt: skip
    assert list(found.kinds) == ["context", "text"]
    assert found.kinds["context"] == found.context.sum()
    for layer in found.layers(found.outcomes[0]):
        parts = sum(layer[kind] for kind in (*found.kinds, "recent"))
        assert parts == pytest.approx(layer["budget"])
    found.save(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "visual" not in page.split("<body>")[1].split("<script")[0]
    assert f"{found.context.sum()} context" in page
    assert json.loads(json.dumps(found.as_json()))["context"] == found.context.tolist()
    facts = display.answer_facts(vlm.generate(text="what?", context="A lamp.", max_new_tokens=1))
    assert "context" in display.prompt_rows(facts)["prompt tokens"]
    assert "visual" not in display.answer_rows(facts)["kept per layer"]

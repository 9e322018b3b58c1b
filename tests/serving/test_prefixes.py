"""What requests have in common is run once, and changes no answer."""

from typing import Any

import jax
import numpy as np
import pytest

from tests.serving.test_engine import CHUNK, T, model
from tests.tiny import picture
from vlcache_jax.cache.methods import make_method
from vlcache_jax.serving import Engine, SlotGroup
from vlcache_jax.serving.prefixes import BLOCK, keys_of

METHODS = ("full", "vl-cache", "h2o")
GROUPS = [SlotGroup(3, 9, 1.0)]
SHOWN = picture(90, 90, 1)


@pytest.fixture(scope="module")
def vlm():
    return model()


@pytest.fixture(scope="module")
def engine(vlm):
    own: dict[str, Any] = {"prompt_rows": T, "prefill_chunk": CHUNK, "chunk": 4}
    with Engine(vlm, METHODS, GROUPS, logprobs=3, prefix_bytes=10**8, **own) as engine:
        engine.warm_up()
        yield engine


def asked(text, method="vl-cache", images: Any = SHOWN, **options):
    cache = make_method(method, None if method == "full" else "0.3")
    marks = "<image>" if images else ""
    own = {"raw_prompt": True, "cache": cache, "max_new_tokens": 8} | options
    return {"images": images, "text": marks + text} | own


def cached(engine, vlm, **asked):
    ticket = engine.submit(vlm.request(**asked))
    want = vlm.generate(**asked)
    assert (ticket.answer.text, ticket.answer.tokens) == (want.text, want.tokens)
    return ticket.cached_tokens


@pytest.mark.parametrize("method", METHODS)
def test_a_second_question_is_answered_as_by_itself(vlm, engine, method, compilations):
    own = picture(90, 90, 50 + len(method))  # no other case has seen it
    wanted = [asked(text, method, own) for text in ("word word", "a", "word " * 12)]
    answers = [vlm.generate(**each) for each in wanted]
    compilations.clear()
    tickets = [engine.submit(vlm.request(**each)) for each in wanted]
    for ticket, want in zip(tickets, answers, strict=True):
        assert (ticket.answer.text, ticket.answer.tokens) == (want.text, want.tokens)
    assert not compilations
    first, *others = (ticket.cached_tokens for ticket in tickets)
    assert first == 0
    # H2O looks from every row, and remembers of each.
    assert all(count > 0 for count in others) is (method != "h2o")


def test_another_picture_or_another_beginning_shares_nothing(vlm, engine):
    assert cached(engine, vlm, **asked("one two")) == 0
    assert cached(engine, vlm, **asked("one two", images=picture(90, 90, 99))) == 0
    before = asked("one two")
    before["text"] = "a" + before["text"]
    assert cached(engine, vlm, **before) == 0


def test_text_alone_is_shared_up_to_a_whole_block(vlm, engine):
    words = "word " * 20
    length = vlm.request(text=words, raw_prompt=True).groups[0].length[0]
    assert BLOCK < length < 2 * BLOCK
    assert cached(engine, vlm, **asked(words, "full", None)) == 0
    assert cached(engine, vlm, **asked(words + "other", "full", None)) == BLOCK
    assert cached(engine, vlm, **asked("other " + words, "full", None)) == 0


def test_what_was_used_longest_ago_goes_first(vlm):
    most = 150_000
    own: dict[str, Any] = {"prompt_rows": T, "prefill_chunk": CHUNK, "prefix_bytes": most}
    with Engine(vlm, ["full"], GROUPS, prefix_store="host", **own) as engine:
        engine.warm_up()
        for seed in range(6):
            _ = engine.submit(vlm.request(**asked("a", "full", picture(90, 90, seed)))).answer
            arrays = jax.tree.leaves(engine.prefixes._kept)
            assert engine.prefixes.bytes == sum(array.nbytes for array in arrays) <= most
        assert cached(engine, vlm, **asked("a", "full", picture(90, 90, 5))) > 0
        assert cached(engine, vlm, **asked("a", "full", picture(90, 90, 0))) == 0


def test_keys_depend_on_everything_in_front(vlm):
    def keys(text, seed=0):
        [inputs] = vlm.request(**asked(text, images=picture(90, 90, seed))).groups
        return keys_of(inputs)

    one, other = keys("word " * 20), keys("word " * 20 + "b")
    assert one.pictures == other.pictures
    assert one.blocks == other.blocks[: len(one.blocks)]
    assert not {*one.blocks} & {*keys("word " * 20, 1).blocks}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"prefix_bytes": -1}, "prefix_bytes=-1"), ({"prefix_store": "disk"}, "device, host")],
)
def test_bad_settings(vlm, options, message):
    with pytest.raises(ValueError, match=message):
        Engine(vlm, ["full"], GROUPS, prompt_rows=T, **options)


def test_how_likely_tokens_are(vlm, engine):
    request = vlm.request(**asked("word", temperature=1.0, seed=3))
    ticket, plain = engine.submit(request, logprobs=3), engine.submit(request)
    answer = ticket.answer
    assert answer.tokens == plain.answer.tokens
    assert len(ticket.told) == len(answer.tokens)
    assert not plain.told
    for one in ticket.told:
        assert one.values.shape == one.ids.shape == (3,)
        assert np.all(np.diff(one.values) <= 0)
        assert one.drawn <= one.values[0] + 1e-6 < 1e-5
    full = vlm.request(**asked("word", "full"))
    ticket = engine.submit(full, logprobs=0)
    tokens = ticket.answer.tokens
    # The same of the whole text, as one prompt.
    [inputs], generate = full.groups, full.generate
    row, length = inputs.tokens[0].copy(), int(inputs.length[0])
    row[length : length + len(tokens)] = tokens
    longer = type(inputs)(
        row[None], np.array([length + len(tokens)], np.int32), inputs.visual_index, inputs.tiles
    )
    logits = jax.jit(generate.stages.prompt_logits)(vlm.params, longer)[0]
    logprobs = jax.nn.log_softmax(logits[length - 1 : length - 1 + len(tokens)])
    want = np.take_along_axis(np.asarray(logprobs), np.array(tokens)[:, None], 1)[:, 0]
    np.testing.assert_allclose([one.drawn for one in ticket.told], want, atol=1e-4)
    with pytest.raises(ValueError, match="tells those of 3"):
        engine.submit(full, logprobs=4)

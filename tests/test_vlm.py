"""The friendly object: answers, streams, errors before work, and how many programs it compiles."""

import dataclasses
import threading

import jax
import numpy as np
import pytest
from PIL import Image

import vlcache_jax
from tests.tiny import picture
from vlcache_jax.cache.state import whole_capacity
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.running.programs import Programs


@pytest.fixture(scope="module")
def vlm(model_dir):
    return vlcache_jax.load(model_dir)


def test_a_stream_says_what_generate_says(vlm):
    ask = {"images": picture(70, 40), "text": "what?", "max_new_tokens": 40}
    whole = vlm.generate(**ask)
    stream = vlm.stream(**ask)
    with pytest.raises(ValueError, match="read to its end"):
        _ = stream.answer
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == whole.text == stream.answer.text
    assert stream.answer.tokens == whole.tokens
    assert len(whole.tokens) == 40
    assert stream.answer.cache == dataclasses.replace(
        whole.cache, tail_bytes=stream.answer.cache.tail_bytes
    )


def test_a_stop_token_is_left_out(vlm, model_dir):
    ask = {"images": picture(70, 40), "text": "what?", "max_new_tokens": 40}
    tokens = vlm.generate(**ask).tokens
    other = vlcache_jax.load(model_dir)
    other.stop_ids = (tokens[20],)
    expected = tokens[: tokens.index(tokens[20])]
    stream = other.stream(**ask)
    "".join(stream)
    assert other.generate(**ask).tokens == stream.answer.tokens == expected


def test_the_report_counts_true_bytes(vlm):
    answer = vlm.generate(picture(70, 40), "what?", max_new_tokens=5)
    text, cache = vlm.config.text, answer.cache
    row = 2 * text.num_kv_heads * text.head_dim * 4
    assert answer.visual_tokens > 16
    assert cache.full_bytes == text.num_layers * answer.prompt_tokens * row
    assert (cache.kept_bytes, cache.kept_share) == (cache.full_bytes, 1.0)
    assert cache.allocated_bytes >= cache.full_bytes
    assert cache.allocated_bytes % (128 * row) == 0
    assert cache.tail_bytes == text.num_layers * 4 * row
    assert (cache.method, cache.budget_requested, cache.budget) == ("full", "1.0", 1.0)
    assert cache.compression_ratio == 0
    assert cache.layer_budgets == [answer.prompt_tokens] * text.num_layers
    assert cache.kept_visual == answer.visual_tokens
    assert cache.kept_text == answer.prompt_tokens - answer.visual_tokens


def test_nothing_of_a_call_is_left_for_the_next(vlm):
    ask = {"text": "what?", "max_new_tokens": 8}
    first = vlm.generate(picture(70, 40), **ask)
    other = vlm.generate(picture(70, 40, seed=5), **ask)
    again = vlm.generate(picture(70, 40), **ask)
    assert first.tokens == again.tokens != other.tokens
    assert again.timings.compile_s == 0


def test_requests_are_answered_in_order_the_next_one_read_meanwhile(vlm, monkeypatch):
    read, second_was_read = [], threading.Event()
    prompts = ["one", "and two", "three"]

    def requests():
        for prompt in prompts:
            read.append(prompt)
            if len(read) == 2:
                second_was_read.set()
            yield {"text": prompt, "max_new_tokens": 3}

    def answer(request, answer=vlm._answer):
        assert second_was_read.wait(timeout=60)  # while the first one runs, in another thread
        return answer(request)

    alone = [vlm.generate(text=prompt, max_new_tokens=3).tokens for prompt in prompts]
    monkeypatch.setattr(vlm, "_answer", answer)
    answers = vlm.generate_each(requests())
    assert read == []
    assert [answer.tokens for answer in answers] == alone
    assert read == prompts


def test_a_bad_request_is_refused_in_its_turn(vlm):
    answers = vlm.generate_each([{"text": "fine", "max_new_tokens": 2}, {"text": ""}])
    assert len(next(answers).tokens) <= 2
    with pytest.raises(ValueError, match="the prompt is empty"):
        next(answers)
    assert list(vlm.generate_each([])) == []


def test_kinds_of_images(vlm, tmp_path):
    image = picture(40, 30)
    image.save(tmp_path / "image.png")
    answers = [
        vlm.generate(source, "what?", max_new_tokens=4).tokens
        for source in (
            image,
            np.asarray(image),
            tmp_path / "image.png",
            str(tmp_path / "image.png"),
        )
    ]
    assert all(tokens == answers[0] for tokens in answers)


def test_a_single_text_gives_an_answer_and_a_list_gives_a_list(vlm):
    single = vlm.generate(text="hi", max_new_tokens=3)
    many = vlm.generate(text=["hi"], max_new_tokens=3)
    assert [answer.tokens for answer in many] == [single.tokens]


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        ({"text": "x", "max_new_tokens": 0}, ValueError, "max_new_tokens=0"),
        ({"text": "x", "max_new_tokens": -2}, ValueError, "max_new_tokens=-2"),
        ({"text": "x", "max_new_tokens": 5000}, ValueError, "positions: at most"),
        ({"text": "x" * 2000}, ValueError, "positions"),
        ({"text": "x", "temperature": -1.0}, ValueError, "temperature"),
        ({"text": "<image> <image>", "images": [picture(5, 5)]}, ValueError, "2 <image> marks"),
        ({"text": "x", "images": "missing.png"}, FileNotFoundError, "missing.png"),
    ],
)
@pytest.mark.parametrize("call", ["generate", "stream"])
def test_bad_input_is_refused_before_the_parameters_are_read(model_dir, call, ask, error, message):
    lazy = vlcache_jax.load(model_dir, lazy=True)
    lazy._read_params = lambda: pytest.fail("the parameters were read")
    with pytest.raises(error, match=message):
        getattr(lazy, call)(**ask)


def test_a_stream_is_for_one_prompt(vlm):
    with pytest.raises(ValueError, match="one prompt"):
        vlm.stream(text=["a", "b"])


def test_unknown_dtype_is_refused(model_dir):
    with pytest.raises(ValueError, match="float8"):
        vlcache_jax.load(model_dir, dtype="float8")


def test_dtype_is_that_of_parameters_and_cache(model_dir):
    vlm = vlcache_jax.load(model_dir, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(vlm.params)} == {"bfloat16"}
    answer = vlm.generate(text="hello", max_new_tokens=2)
    full = vlcache_jax.load(model_dir).generate(text="hello", max_new_tokens=2)
    assert 2 * answer.cache.full_bytes == full.cache.full_bytes


@pytest.mark.full
def test_a_hundred_pictures_compile_one_program_per_bucket(vlm, compilations):
    rng = np.random.default_rng(0)
    sizes = rng.integers(32, 2000, (100, 2))
    vlm.programs = Programs()
    compilations.clear()
    buckets, real_rows, rows = set(), 0, 0
    for width, height in sizes:
        image = Image.new("RGB", (int(width), int(height)), tuple(rng.integers(0, 256, 3).tolist()))
        text = "what is here? " + "more " * int(rng.integers(0, 8))
        inputs: ModelInputs = vlm.processor([image], text)
        vlm.generate([image], text, max_new_tokens=4)
        buckets.add((inputs.tokens.shape[1], inputs.tiles.shape[0]))
        real_rows += int(inputs.length[0])
        rows += inputs.tokens.shape[1]
    prompts = {rows for rows, _ in buckets}
    pools = {whole_capacity(vlm.config.text.num_layers, rows) for rows in prompts}
    # A prefill for each bucket, a cache build for its prompts, decoding for its pool; one start.
    assert len(compilations) == len(buckets) + len(prompts) + len(pools) + 1
    assert len(buckets) <= 8
    assert len(buckets) > 1
    assert 1 - real_rows / rows <= 0.25

"""The server, as clients see it: openai-python, plain HTTP, and connections that misbehave."""

import json
import logging
import urllib.request
from dataclasses import replace
from http.client import HTTPConnection

import numpy as np
import openai
import pytest

from tests.serving.servers import LONG, asked, begin, png, post, serving, wait
from tests.serving.test_engine import T
from tests.tiny import picture
from vlcache_jax.cache.methods import make_method
from vlcache_jax.cache.quantizers import make_quantizer
from vlcache_jax.serving import Engine, SlotGroup
from vlcache_jax.serving.http import JsonLines, ServerSettings
from vlcache_jax.serving.http.bodies import ChatBody

SETTINGS = ServerSettings("tiny", "vl-cache", "0.3", api_key="sesame", default_tokens=8)
KEY = {"Authorization": "Bearer sesame"}
SHOWN = picture(70, 40, 1)


@pytest.fixture(scope="module")
def port(vlm, engine):
    with serving(vlm, engine, SETTINGS) as port:
        yield port


@pytest.fixture(scope="module")
def client(port):
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="sesame", max_retries=0
    ) as client:
        yield client


def own(vlm, text, *images, method="vl-cache", budget: str | None = "0.3", **options):
    """What the model answers by itself."""
    parts = [*[{"type": "image"}] * len(images), {"type": "text", "text": text}]
    cache = make_method(method, budget)
    messages = [{"role": "user", "content": parts}]
    own = {"images": [*images], "cache": cache, "max_new_tokens": 8} | options
    return vlm.generate(messages=messages, **own)


def test_openai_chat(vlm, client):
    answer = client.chat.completions.create(**asked("word one", png(SHOWN)))
    want = own(vlm, "word one", SHOWN)
    [choice] = answer.choices
    assert choice.message.content == want.text
    assert choice.finish_reason == want.finish_reason
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (want.prompt_tokens, len(want.tokens))
    assert usage.kv_cache["kept_bytes"] == want.cache.kept_bytes < want.cache.full_bytes
    again = client.chat.completions.create(**asked("word one", png(SHOWN)))
    assert again.choices[0].message.content == want.text


def test_openai_stream(vlm, client):
    options = {"include_usage": True}
    chunks = [*client.chat.completions.create(**asked("one"), stream=True, stream_options=options)]
    want = own(vlm, "one")
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(pieces) == want.text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == want.finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(want.tokens)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_fields_of_our_own_and_several_turns(vlm, client):
    body = {"kv_method": "full", "ignore_eos": True, "min_tokens": 2, "top_k": -1}
    answer = client.chat.completions.create(**asked("one"), extra_body=body, max_tokens=9)
    want = own(vlm, "one", method="full", budget=None, ignore_eos=True, max_new_tokens=9)
    assert answer.choices[0].message.content == want.text
    assert answer.usage.completion_tokens == 9
    assert answer.choices[0].finish_reason == "length"
    said = [
        {"role": "developer", "content": "a"},
        *asked("one", png(SHOWN))["messages"],
        {"role": "assistant", "content": "word"},
        {"role": "user", "content": [{"type": "text", "text": "two"}]},
    ]
    answer = client.chat.completions.create(model="tiny", messages=said)
    parts = [{"type": "image"}, {"type": "text", "text": "one"}]
    roles = ("system", "user", "assistant", "user")
    contents = ("a", parts, "word", "two")
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    cache = make_method("vl-cache", "0.3")
    want = vlm.generate([SHOWN], messages=messages, cache=cache, max_new_tokens=8)
    assert answer.choices[0].message.content == want.text


def test_choices_are_the_draws_of_a_batch(vlm, client):
    drawn = {"temperature": 1.0, "seed": 5}
    answer = client.chat.completions.create(**asked("word"), n=3, **drawn)
    cache = make_method("vl-cache", "0.3")
    want = vlm.generate(text=["word"] * 3, cache=cache, max_new_tokens=8, **drawn)
    assert [choice.message.content for choice in answer.choices] == [one.text for one in want]
    assert answer.usage.prompt_tokens == want[0].prompt_tokens
    chunks = client.chat.completions.create(**asked("word"), n=3, stream=True, **drawn)
    pieces = ["", "", ""]
    for chunk in chunks:
        pieces[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert pieces == [one.text for one in want]


@pytest.mark.parametrize("stream", [False, True])
def test_how_likely_tokens_are(client, stream):
    made = client.chat.completions.create(
        **asked("word"), logprobs=True, top_logprobs=3, max_tokens=6, stream=stream
    )
    parts = [c.choices[0].logprobs for c in made] if stream else [made.choices[0].logprobs]
    content = [token for part in parts if part is not None for token in part.content]
    assert 1 <= len(content) <= 6
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)  # greedy
        assert token.top_logprobs[0].token == token.token
        assert np.sum(np.exp([each.logprob for each in token.top_logprobs])) <= 1 + 1e-6


def test_completions_of_texts(vlm, client):
    prompts = ["word", "one two"]
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=6, logprobs=2)
    cache = make_method("vl-cache", "0.3")
    wanted = [
        vlm.generate(text=each, raw_prompt=True, cache=cache, max_new_tokens=6) for each in prompts
    ]
    assert [choice.text for choice in answer.choices] == [want.text for want in wanted]
    assert len(answer.choices[0].logprobs.tokens) == len(wanted[0].tokens)
    assert answer.usage.prompt_tokens == sum(want.prompt_tokens for want in wanted)
    chunks = client.completions.create(model="tiny", prompt="word", max_tokens=6, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == wanted[0].text


def test_the_map_tells_what_is_kept_of_each_patch(vlm, client, compilations):
    images = [SHOWN, picture(40, 75, 2)]
    want = own(vlm, "word", *images, trace=True)
    made = asked("word", *(png(image) for image in images))
    compilations.clear()
    answers = [
        client.chat.completions.create(**made, extra_body={"kv_method": method, "kv_map": True})
        for method in ("vl-cache", "full")
    ]
    assert not compilations
    found, whole = (answer.usage.kv_cache["map"] for answer in answers)
    for one, other in zip(found["pictures"], whole["pictures"], strict=True):
        assert other == {"rectangles": one["rectangles"], "kept": [1.0] * len(one["kept"])}
    assert whole["text"] == 1
    heads = [positions.tolist() for layer in want.trace.kept for positions in layer]
    share = np.mean([[i in kept for i in range(want.trace.m)] for kept in heads], axis=0)
    visual = want.trace.prompt_is_visual
    assert found["text"] == pytest.approx(share[~visual].mean(), abs=1e-4)
    left, lengths = share[visual].tolist(), []
    places = vlm.processor.patches([(image.height, image.width) for image in images])
    for image, place, shown in zip(images, places, found["pictures"], strict=True):
        width, height = image.size
        wanted = [
            (x0 / width, y0 / height, x1 / width, y1 / height, left.pop(0))
            for x0, y0, x1, y1 in place.rectangles
        ]
        wanted = [one for one in wanted if one[2] > one[0] and one[3] > one[1]]
        rows = [(*where, kept) for where, kept in zip(*shown.values(), strict=True)]
        np.testing.assert_allclose(rows, wanted, atol=1e-4)
        lengths.append(len(rows))
    assert not left
    assert min(lengths) > 16  # the grid's, too
    assert len(set(share)) > 2


def test_the_map_of_texts_has_no_pictures(client):
    made = {"model": "tiny", "prompt": ["word", "one two"], "max_tokens": 2}
    usage = client.completions.create(**made, extra_body={"kv_map": True}).usage
    assert usage.kv_cache["map"]["pictures"] == []
    assert 0 < usage.kv_cache["map"]["text"] < 1
    assert "map" not in client.completions.create(**made).usage.kv_cache


def test_bits_of_the_server_are_those_of_a_request_that_names_none():
    for given, want in ((None, "2"), (16, None), (4, "4")):
        body = ChatBody.model_validate(asked() | {"kv_bits": given})
        assert body.options(8, 0, "vl-cache", "2")["cache"].quantize == make_quantizer(want)


def test_a_large_picture_and_the_other_routes(vlm, client, port):
    large = picture(1700, 1700, 3)
    uri = png(large)
    assert len(uri) > 8e6
    answer = client.chat.completions.create(**asked("a", uri))
    assert answer.choices[0].message.content == own(vlm, "a", large).text
    [listed] = client.models.list().data
    assert (listed.id, listed.max_model_len) == ("tiny", T)
    assert client.models.retrieve("tiny").id == "tiny"
    assert post(port, b"", "/health", method="GET")[::2] == (200, {"status": "ok"})
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="no") as other:
        with pytest.raises(openai.AuthenticationError, match="API key"):
            other.models.list()
        with pytest.raises(openai.AuthenticationError):
            other.with_options(api_key="sesam").chat.completions.create(**asked(), n=0)


def lines(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return response.read().decode().splitlines()


def test_metrics_have_the_names_that_are_read(client, port):
    client.chat.completions.create(**asked())
    found = {line.split("{")[0] for line in lines(port) if not line.startswith("#")}
    names = [
        "prompt_tokens_total",
        "generation_tokens_total",
        "request_success_total",
        "e2e_request_latency_seconds_sum",
        "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_count",
        "request_time_per_output_token_seconds_sum",
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "request_queue_time_seconds_sum",
        "request_prefill_time_seconds_sum",
        "request_decode_time_seconds_sum",
    ]
    assert {f"vllm:{name}" for name in names} <= found


# What is refused

BAD = [
    ({"model": "other"}, 404, "model"),
    ({"model": None}, 400, "model"),
    ({"model": "tiny", "messages": []}, 400, "messages"),
    ({"messages": None}, 400, "messages"),
    ({"messages": "a"}, 400, "messages"),
    ({"messages": [{"role": "tool", "content": "a"}]}, 400, "messages.0.role"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content"),
    ({"messages": [{"role": "user", "content": ""}]}, 400, None),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, 400,
     "messages.0.content.0.type"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, 400,
     "messages.0.content.0.text"),
    (asked("a", "data:image/png;base64,AAA="), 400, "messages"),
    (asked("a", "data:image/png;base64,"), 400, "messages"),
    (asked("a", "data:image/png;base64,%%%"), 400, "messages"),
    (asked("a", "data:text/html;base64,AAAA"), 400, "messages"),
    (asked("a", "http://example.com/a.png"), 400, "messages"),
    (asked("a", "file:///etc/passwd"), 400, "messages"),
    (asked("a", "/etc/passwd"), 400, "messages"),
    (asked("a", *[png(picture(5, 5))] * 17), 400, None),
    (asked("<image>"), 400, None),
    (asked("word " * 400), 400, None),
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"temperature": True}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_p": 1.5}, 400, "top_p"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 1.5}, 400, "max_tokens"),
    ({"max_tokens": 10**30}, 400, "max_tokens"),
    ({"max_tokens": LONG + 1}, 400, None),
    ({"min_tokens": 9, "max_tokens": 8}, 400, None),
    ({"n": 0}, 400, "n"),
    ({"n": 9}, 400, "n"),
    ({"seed": 1.5}, 400, "seed"),
    ({"stop": ""}, 400, None),
    ({"stop": ["a"] * 17}, 400, "stop"),
    ({"top_logprobs": 21, "logprobs": True}, 400, "top_logprobs"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
    ({"tools": [{"type": "function"}]}, 400, "tools"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format.type"),
    ({"kv_method": "random"}, 400, None),
    ({"kv_method": "no such"}, 400, "kv_method"),
    ({"kv_budget": 2}, 400, "kv_method"),
    ({"kv_bits": 2}, 400, None),
    ({"kv_map": "yes"}, 400, "kv_map"),
    ({"stream_options": {"include_usage": "yes"}, "stream": True}, 400,
     "stream_options.include_usage"),
    ({"stream": 1}, 400, "stream"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "status", "param"), BAD)
def test_bad_fields_are_named(port, fields, status, param):
    found, _, body = post(port, asked() | fields, headers=KEY)
    assert (found, body["error"]["param"]) == (status, param)
    assert "\n" not in body["error"]["message"]
    assert body["error"]["type"] == "not_found_error" if status == 404 else "invalid_request_error"


CUT = json.dumps(asked()).encode()
RAW = [
    (b"", 400), (CUT[:-3], 400), (b"[1]", 400), (b"null", 400), (b'"a"', 400), (b"\xff\xfe", 400),
    (b"[" * 100_000, 400), (CUT[:-1] + b', "temperature": NaN}', 400),
    (CUT[:-1] + b', "seed": ' + b"9" * 5000 + b"}", 400),
    (CUT.replace(b"word word", b"\\ud800 \\u0000"), 200),
    (CUT.replace(b"word word", b"\x00"), 400),
    (CUT[:-1] + b', "user": "a", "metadata": {"b": [1]}, "store": true}', 200),
]  # fmt: skip


@pytest.mark.parametrize(("content", "status"), RAW)
def test_bodies_that_are_no_requests(port, content, status):
    found, headers, body = post(port, content, headers=KEY)
    assert found == status, body
    assert ("error" in body) is (status != 200)
    assert headers["x-request-id"].startswith("req-")


def test_other_routes_and_methods(port):
    assert post(port, asked(), "/v1/nothing")[0] == 404
    assert post(port, b"", method="GET")[0] == 405
    assert post(port, asked())[0] == 401
    for key in ("", "Bearer", "sesame x", "Bearer sésame"):
        headers = {"Authorization": key.encode("latin-1").decode("latin-1")}
        assert post(port, asked(), headers=headers)[0] == 401
    given = post(port, asked(), headers=KEY | {"X-Request-Id": "mine-1"})[1]
    assert given["x-request-id"] == "mine-1"
    assert post(port, asked(), headers=KEY | {"X-Request-Id": "{<"})[1]["x-request-id"] != "{<"


def test_limits_at_them_and_one_above(vlm, engine):
    body = json.dumps(asked("a")).encode()
    for most, status in ((len(body), 200), (len(body) - 1, 413)):
        own = replace(SETTINGS, api_key=None, max_body=most)
        with serving(vlm, engine, own) as port:
            assert post(port, body)[0] == status
            chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
            head = {"Transfer-Encoding": "chunked"}
            assert raw(port, head, chunked)[0] == status
    with serving(vlm, engine, replace(SETTINGS, api_key=None, body_seconds=0.3)) as port:
        status, answer = raw(port, {"Content-Length": "500"}, b"{")
        assert status == 408
        assert answer["error"]["message"] == "the body comes too slowly"


def raw(port, headers, content):
    """The response to a body that is sent as it is."""
    link = HTTPConnection("127.0.0.1", port, timeout=20)
    link.putrequest("POST", "/v1/chat/completions")
    for name, value in {"Content-Type": "application/json", **headers}.items():
        link.putheader(name, value)
    link.endheaders(content)
    response = link.getresponse()
    answer = response.status, json.loads(response.read())
    link.close()
    return answer


# What runs beside each other


def test_whoever_goes_frees_the_slot(engine, port):
    for stream in (True, False):
        body = asked("a", max_tokens=LONG, ignore_eos=True, stream=stream)
        link = begin(port, body, KEY)
        wait(lambda: engine.load.running > 0)
        link.close()
        wait(lambda: engine.load[::2] == (0, 0))


@pytest.mark.usefixtures("slow")
def test_a_full_queue_says_when_to_come_again(engine, port):
    body = asked("a", max_tokens=LONG, ignore_eos=True)
    links = []

    def full():
        if engine.load.running == 1 and engine.load.waiting == 4:
            return True
        links.append(begin(port, body, KEY))
        return False

    try:
        wait(full)
        status, headers, body = post(port, asked("a", max_tokens=LONG), headers=KEY)
        assert (status, body["error"]["type"]) == (503, "overloaded_error")
        assert int(headers["retry-after"]) > 0
    finally:
        for link in links:
            link.close()
    wait(lambda: engine.load[::2] == (0, 0))
    assert post(port, asked("a"), headers=KEY)[0] == 200


def test_the_log_has_no_prompt_and_no_key(vlm, engine, caplog):
    handler_format = JsonLines()
    for told in (False, True):
        caplog.clear()
        with (
            caplog.at_level(logging.INFO, "vlcache.serve"),
            serving(vlm, engine, replace(SETTINGS, log_prompts=told)) as port,
        ):
            body = asked("one two", surprise=1, kv_budget=0.25)
            assert post(port, body, headers=KEY)[0] == 200
            text = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": png(SHOWN)}]
            late = {"model": "tiny", "messages": [{"role": "user", "content": text}]}
            for _ in range(2):
                assert post(port, late, headers=KEY)[0] == 200
        written = [json.loads(handler_format.format(record)) for record in caplog.records]
        events = [line["event"] for line in written]
        assert events.count("answered") == 3
        assert events.count("text_first") == 1
        assert next(x for x in written if x["event"] == "fields_ignored")["fields"] == ["surprise"]
        assert ("one two" in str(written)) is told
        assert "sesame" not in str(written)


def test_before_it_is_ready_and_after_its_end(vlm):
    engine = Engine(vlm, ["full"], [SlotGroup(1, 9, 1.0)], prompt_rows=T)
    with serving(vlm, engine, replace(SETTINGS, api_key=None)) as port:
        assert post(port, b"", "/health", method="GET")[0] == 503
        status, headers, _ = post(port, asked())
        assert (status, headers["retry-after"]) == (503, "2")
        engine.error = OSError("gone")
        assert post(port, b"", "/health", method="GET")[0] == 500
        assert post(port, asked())[0] == 500

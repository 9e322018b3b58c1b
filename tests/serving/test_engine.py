"""Requests in slots are answered as alone, in any company, and none ends another."""

import threading
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import vlcache_jax
from tests.tiny import picture, tiny_config, tiny_processor
from vlcache_jax import Buckets, Processor
from vlcache_jax.cache.methods import make_method
from vlcache_jax.models.families import init_params
from vlcache_jax.requests.detokenize import Detokenizer
from vlcache_jax.running.parts import Runner
from vlcache_jax.serving import Engine, QueueFull, SlotGroup
from vlcache_jax.serving.slots import Slots
from vlcache_jax.streaming import Written

CONFIG = tiny_config("llava_next")
T = 160
PARTS = ("see", "extend", "finish")
CHUNK = 96


class Scale(NamedTuple):
    """How much is tried; `longest` are the most tokens of a long answer."""

    methods: tuple[str, ...]
    requests: int
    faults: int
    longest: int
    in_use: int

    @property
    def groups(self):
        return SlotGroup(4, 9, 0.2), SlotGroup(16, self.longest, 1.0)


SHORT = Scale(("full", "vl-cache", "snapkv"), 60, 30, 33, 1)
WHOLE = Scale(("full", "vl-cache", "snapkv", "h2o", "consensus"), 200, 500, 129, 6)


def model(config=CONFIG, stop_ids=(33,), **options):
    # Larger weights than a fresh model's: its answers would all be one token, again and again.
    params = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, init_params(config, seed=1))
    processor = Processor(config, tiny_processor("llava_next"), Buckets((T,), (15,)))
    return vlcache_jax.VLM(config, lambda: params, processor, stop_ids=stop_ids, **options)


@pytest.fixture(scope="module")
def vlm():
    return model()


@pytest.fixture(scope="module", params=[SHORT, pytest.param(WHOLE, marks=pytest.mark.full)],
                ids=["short", "whole"])  # fmt: skip
def scale(request):
    return request.param


@pytest.fixture(scope="module")
def engine(vlm, scale):
    own: dict[str, Any] = {"prompt_rows": T, "prefill_chunk": CHUNK, "chunk": 2}
    with Engine(vlm, scale.methods, scale.groups, **own) as engine:
        seen = []
        engine.warm_up(lambda *state: seen.append(state))
        assert [done for _, done, _ in seen] == list(range(len(seen)))
        assert seen[-1] == ("the first requests", len(seen) - 1, len(seen) - 1)
        yield engine


def asked(rng, number, scale):
    """A request by chance, of lengths that have few programs where it is asked alone."""
    pictures = [picture(70, 40, seed) for seed in rng.integers(0, 4, rng.choice([0, 1, 1, 2]))]
    method = rng.choice(scale.methods)
    short, longest = method != "full" and rng.random() < 0.3, scale.longest
    budget = rng.choice([f"{rng.uniform(0.155, 0.2):.3f}", f"{rng.integers(28, 36)}tok"])
    return {
        "images": pictures or None,
        "text": "<image>" * len(pictures) + "word " * rng.integers(1, 9 if pictures else 28),
        "raw_prompt": True,
        "cache": make_method(method, None if method == "full" else budget),
        "max_new_tokens": int(
            rng.integers(6, 10) if short else rng.integers(longest - 15, longest + 1)
        ),
        "temperature": float(rng.choice([0, 0, 1.0])),
        "seed": number,
        "stop": "e" if rng.random() < 0.2 else (),
    }


@pytest.fixture(scope="module")
def alone(vlm, scale):
    """Requests, and their answers by `vlm.generate`; made once for all tests."""
    rng, made = np.random.default_rng(0), []

    def of(count):
        while len(made) < count:
            one = asked(rng, len(made), scale)
            made.append((one, vlm.generate(**one)))
        return made[:count]

    return of


def check(ticket, want):
    pieces, answer = list(ticket), ticket.answer
    assert answer.tokens == want.tokens
    assert answer.text == want.text == "".join(pieces)
    assert answer.cache.layer_budgets == want.cache.layer_budgets
    assert (answer.cache.kept_visual, answer.cache.kept_bytes) == (
        pytest.approx(want.cache.kept_visual),
        want.cache.kept_bytes,
    )


class Event(NamedTuple):
    """What was run: a stage, for which group, for whose tickets; all slots that are in use."""

    stage: str
    group: Any
    running: set[int]
    in_use: int


@pytest.fixture
def events(engine, monkeypatch):
    """What the engine's thread has run: each stage, its group and whose slots are in use."""
    seen, do = [], Runner.do

    def watched(self, stage, *args, **static):
        if threading.current_thread().name == "vlcache-engine":
            group = next((one for one in engine.groups if args[2] is one.pool), None)
            running = {id(ticket) for _, ticket in group.running} if group else set()
            seen.append(Event(stage, group, running, engine.load.running))
        return do(self, stage, *args, **static)

    monkeypatch.setattr(Runner, "do", watched)
    return seen


def test_every_answer_is_that_of_the_request_alone(vlm, engine, scale, alone, events, compilations):
    """In two orders; some are dropped at once, some when their text begins."""
    wanted = alone(scale.requests)
    compilations.clear()
    for order in range(2):
        rng, tickets, dropped = np.random.default_rng(order), [], {}
        events.clear()
        for number in rng.permutation(len(wanted)):
            one, want = wanted[number]
            while engine.load.waiting > 30:  # arrivals by chance, but never a full queue
                threading.Event().wait(rng.uniform(0, 0.01))
            ticket, fate = engine.submit(vlm.request(**one)), rng.random()
            if fate < 0.1:
                ticket.cancel()
            tickets.append((ticket, want, fate))
            if fate > 0.9:
                begun = next(ticket, "")
                assert want.text.startswith(begun)
                ticket.cancel()
                dropped[id(ticket)] = len(events)
        for ticket, want, fate in tickets:
            if 0.1 <= fate <= 0.9:
                check(ticket, want)
            elif not ticket.cancelled or "".join(ticket) != want.text:
                with pytest.raises(CancelledError):
                    _ = ticket.answer
        idle(engine)
        for ticket, since in dropped.items():
            assert sum(ticket in event.running for event in events[since:]) <= 1
        check_gaps(events, scale)
    assert not compilations


def check_gaps(events, scale):
    """Between two chunks of an answer: one part of a prompt, and a chunk of each other group."""
    chunks = [(i, event) for i, event in enumerate(events) if event.stage == "decode_chunk"]
    assert np.mean([event.in_use for _, event in chunks]) > scale.in_use
    for group in {id(event.group) for _, event in chunks}:
        own = [i for i, event in chunks if id(event.group) == group]
        for first, second in pairwise(own):
            if events[first].running & events[second].running:
                between = Counter(event.stage for event in events[first + 1 : second])
                assert sum(between[part] for part in PARTS) <= 1, between
                assert between["decode_chunk"] <= len(scale.groups) - 1, between


def idle(engine):
    """Wait until nothing runs: then no slot is lost."""
    for _ in range(1000):
        if engine.load[::2] == (0, 0):
            break
        threading.Event().wait(0.01)
    assert engine.load[::2] == (0, 0)
    assert all(ticket is None for group in engine.groups for ticket in group.tickets)


# Faults

DEVICE = "the device failed while the request ran"
FAULTS = [
    *((stage, after) for stage in (*PARTS, "build_into", "admit", "decode_chunk")
      for after in (False, True)),
    ("push", False),
    ("answer", False),
]  # fmt: skip
"""Where an exception is raised, and whether arrays that are given up are gone by then."""


def test_faults_leave_it_serving(vlm, engine, scale, alone, monkeypatch):
    """Each ends the request that it belongs to, or those whose slots are gone, and no other."""
    rng, due = np.random.default_rng(1), []

    def faulty(owner, name):
        """Raise once, the first time that what is due is called, in the engine's thread."""
        original = getattr(owner, name)

        def call(self, *args, **static):
            own = args[0] if owner is Runner else name
            after = due[0][1] if due and due[0][0] == own else None
            if after is None or threading.current_thread().name != "vlcache-engine":
                return original(self, *args, **static)
            due.clear()
            if after:
                original(self, *args, **static)
            raise OSError("injected")

        monkeypatch.setattr(owner, name, call)

    faulty(Runner, "do")
    faulty(Detokenizer, "push")
    faulty(Written, "answer")
    wanted = [pair for pair in alone(30) if pair[0]["images"] and pair[1].prompt_tokens > CHUNK]
    for number in range(scale.faults):
        fault = FAULTS[number % len(FAULTS)]
        due.append(fault)
        some = [wanted[i] for i in rng.integers(0, len(wanted), 3)]
        tickets = [(engine.submit(vlm.request(**one)), want) for one, want in some]
        failed = []
        for ticket, want in tickets:
            try:
                check(ticket, want)
            except (OSError, RuntimeError) as error:
                failed.append(str(error))
        lost = fault[0] == "decode_chunk" or (fault[1] and fault[0] in ("build_into", "admit"))
        own, others = failed.count("injected"), failed.count(DEVICE)
        assert own == (fault[0] != "decode_chunk"), fault
        assert others >= (fault[0] == "decode_chunk") if lost else others == 0, fault
        assert len(failed) == own + others
        assert not due
        idle(engine)


# What is refused


@pytest.mark.parametrize(
    ("request_of", "error", "message"),
    [
        ({"cache": "random"}, ValueError, "this engine serves full, vl-cache, snapkv"),
        ({"max_new_tokens": 200}, ValueError, "slots for a budget of 0.2 and 9 new tokens; a bud"),
        ({"text": ["a", "b"]}, ValueError, "one prompt at a time"),
        ({"trace": True}, NotImplementedError, "traces"),
        ({"text": "a" * 200}, ValueError, "this engine takes at most 160"),
        ({"images": [picture(300, 5)] * 6}, ValueError, "30 tiles, of 15 at most"),
    ],
)
def test_what_is_not_served_is_refused_in_one_line(vlm, engine, request_of, error, message):
    request = vlm.request(**{"text": "a", "max_new_tokens": 2} | request_of)
    with pytest.raises(error, match=message) as caught:
        engine.submit(request)
    assert "\n" not in str(caught.value)


def test_what_is_no_request_of_this_model(vlm, engine, text_dir):
    other = vlcache_jax.load(text_dir, lazy=True).request(text="a", max_new_tokens=2)
    for request in (other, "a", {"text": "a"}):
        with pytest.raises(ValueError, match="of its own model"):
            engine.submit(request)
    with pytest.raises(RuntimeError, match="warm already"):
        engine.warm_up()


def test_more_stop_tokens_than_there_are_places(vlm, engine):
    request = vlm.request(text="a", max_new_tokens=2)
    stops = np.zeros((1, 16), np.int32)
    with pytest.raises(ValueError, match="8 stop tokens"):
        engine.submit(request._replace(settings=replace(request.settings, stop_ids=stops)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"methods": []}, ValueError, "at least one"),
        ({"methods": "full"}, ValueError, "a list of methods"),
        ({"groups": [8]}, ValueError, "one of `SlotGroup`"),
        ({"groups": SlotGroup()}, ValueError, "one of `SlotGroup`"),
        ({"groups": []}, ValueError, "at least one"),
        ({"methods": ["full", vlcache_jax.AKVQ()]}, ValueError, "same quantizer"),
        ({"methods": [vlcache_jax.AKVQ(residual=32)]}, NotImplementedError, "packs new tokens"),
        ({"methods": [vlcache_jax.AKVQ()]}, ValueError, "no slot is made for full"),
        ({"prompt_rows": 0}, ValueError, "prompt_rows=0"),
        ({"prefill_chunk": 1.5}, ValueError, "prefill_chunk=1.5"),
        ({"queue": 0}, ValueError, "queue=0"),
        ({"chunk": True}, ValueError, "chunk=True"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_compiled(vlm, arguments, error, message):
    with pytest.raises(error, match=message):
        Engine(vlm, **{"groups": [SlotGroup(1, 9, 0.2)], "prompt_rows": T} | arguments)


@pytest.mark.parametrize("arguments", [{"slots": 0}, {"new_tokens": 0}, {"budget": 2}])
def test_bad_slots(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        SlotGroup(**arguments)


# The queue and the end


@pytest.mark.parametrize("end", ["drain", "drop", "device"])
def test_a_full_queue_refuses_and_the_end_answers_or_drops(vlm, end, monkeypatch):
    request, tickets = vlm.request(text="a", max_new_tokens=9), []
    engine = Engine(vlm, ["full"], [SlotGroup(1, 9, 1.0)], prompt_rows=T, queue=2)
    with pytest.raises(RuntimeError, match="call warm_up"):
        engine.submit(request)
    engine.warm_up()

    def fill():
        while True:
            tickets.append(engine.submit(request))

    def broken(*_):
        raise OSError("gone")

    with pytest.raises(QueueFull, match="2 requests wait"):
        fill()
    if end == "device":  # not even new slots can be made
        monkeypatch.setattr(Slots, "decode", broken)
        monkeypatch.setattr(Slots, "clear", broken)
        for ticket in tickets[-2:]:
            with pytest.raises(RuntimeError, match=r"closed|device"):
                _ = ticket.answer
        assert isinstance(engine.error, OSError)
    engine.close(drain=end == "drain")
    assert all(ticket.done for ticket in tickets)
    if end == "drain":
        assert len({ticket.answer.text for ticket in tickets}) == 1
    else:
        with pytest.raises(RuntimeError, match="closed"):
            _ = tickets[-1].answer
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(request)

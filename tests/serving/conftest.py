"""A tiny model and its engine, for all tests of the server."""

import time
from typing import Any

import pytest

from tests.serving.servers import LONG
from tests.serving.test_engine import CHUNK, T, model
from vlcache_jax.serving import Engine, SlotGroup
from vlcache_jax.serving.slots import Slots


@pytest.fixture(scope="session")
def vlm():
    return model()


@pytest.fixture(scope="session")
def engine(vlm):
    groups = [SlotGroup(3, 9, 1.0), SlotGroup(1, LONG, 1.0)]
    own: dict[str, Any] = {"prompt_rows": T, "prefill_chunk": CHUNK, "chunk": 2, "queue": 4}
    methods, kept = ["full", "vl-cache"], {"logprobs": 20, "prefix_bytes": 10**7}
    with Engine(vlm, methods, groups, **kept, **own) as engine:
        engine.warm_up()
        yield engine


@pytest.fixture
def slow(monkeypatch):
    """Each chunk of decode steps takes a fifth of a second."""
    decode = Slots.decode

    def later(*args, **options):
        time.sleep(0.2)
        return decode(*args, **options)

    monkeypatch.setattr(Slots, "decode", later)

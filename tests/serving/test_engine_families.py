"""Requests in slots, of every family and with quantized caches."""

import pytest

from tests.serving.test_engine import check, model
from tests.sessions.test_session import loaded
from tests.tiny import picture
from vlcache_jax import AKVQ, FullCache, VLCache
from vlcache_jax.serving import Engine, SlotGroup

SHORT = {"max_new_tokens": 5}


def served(vlm, methods, groups, requests, compilations):
    wanted = [vlm.generate(**one) for one in requests]
    with Engine(vlm, methods, groups, prompt_rows=160, prefill_chunk=96) as engine:
        engine.warm_up()
        compilations.clear()
        tickets = [engine.submit(vlm.request(**one)) for one in requests]
        for ticket, want in zip(tickets, wanted, strict=True):
            check(ticket, want)
        assert not compilations


@pytest.mark.full
def test_quantized_caches_of_several_budgets(compilations):
    packed = AKVQ(pivots=3)
    vlm, groups = model(), [SlotGroup(3, 5, 0.3), SlotGroup(2, 9, 1.0)]
    methods = [VLCache(quantize=packed), FullCache(quantize=packed)]
    caches = [VLCache(0.3, quantize=packed), FullCache(quantize=packed)]
    caches += [VLCache("9tok", quantize=packed)]
    images = [picture(70, 40), None, picture(60, 60, 2)]
    requests = [{"images": one, "text": "what?", "cache": cache, **SHORT}
                for cache in caches for one in images]  # fmt: skip
    served(vlm, methods, groups, requests, compilations)


@pytest.mark.full
@pytest.mark.parametrize("family", ["text_dir", "onevision_dir", "qwen_dir", "qwen3_dir"])
def test_every_family(family, request, compilations):
    """Prompts with pictures and without them run by the same programs."""
    vlm = loaded(request.getfixturevalue(family))
    requests = [{"text": "what is this?", "cache": 0.3}, {"text": "x", "cache": "full"}]
    if family == "text_dir":
        requests.append({"context": "some words that it is about", "text": "and?", "cache": 0.3})
    else:
        requests.append({"images": picture(56, 56), "text": "what?", "cache": 0.3})
        requests.append({"images": [picture(56, 28, 1), picture(28, 56, 2)], "text": "x"})
    requests = [one | SHORT for one in requests]
    served(vlm, ["full", "vl-cache"], [SlotGroup(2, 9, 1.0)], requests, compilations)

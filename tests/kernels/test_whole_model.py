"""A whole model by the kernels, interpreted, and by XLA: prefill, scores, budgets, decoding."""

import jax
import numpy as np
import pytest

from tests.kernels.cases import compiled
from tests.tiny import picture, tiny_config, tiny_processor
from vlcache_jax import Buckets, Generate, Processor, VLCache
from vlcache_jax.models.families import init_params

CONFIG = tiny_config("llava_next")


@pytest.fixture(scope="module")
def params():
    # Larger weights than a fresh model's: its answers would all be one token, again and again.
    return jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, init_params(CONFIG, seed=1))


@pytest.fixture(scope="module")
def inputs():
    processor = Processor(CONFIG, tiny_processor("llava_next"), Buckets(prompt=(96,), tiles=(3,)))
    return processor([[picture(60, 40)], None], ["what?", "only text, no picture"])


def test_both_backends_give_the_same_answers(params, inputs):
    outputs = []
    for backend in ("triton", "xla"):
        generate = Generate(CONFIG, VLCache(0.3), max_new_tokens=8, backend=backend)
        outputs.append(compiled(generate)(params, inputs, jax.random.key(0)))
    ours, theirs = outputs
    assert np.array_equal(ours.tokens, theirs.tokens)
    assert np.array_equal(ours.lengths, theirs.lengths)
    assert np.array_equal(ours.kept, theirs.kept)
    assert (np.asarray(ours.kept) < inputs.length[:, None]).all()
    assert np.array_equal(ours.kept_visual, theirs.kept_visual)
    assert len({tuple(row) for row in np.asarray(ours.tokens).tolist()}) == 2

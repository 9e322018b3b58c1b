"""Decoding from a compressed cache is what transformers does with its own cache, pruned alike."""

from functools import partial

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import vlcache_jax
from tests import hf
from tests.models import test_qwen_vl as qwen
from tests.tiny import picture
from vlcache_jax import H2O, Buckets, Generate, SnapKV, VLCache

BOUND = 1e-4
STEPS = 32
CASES = [
    *((kind, VLCache(budget))
      for kind in ("llava-1.5 Llama MHA", "NeXT Mistral GQA") for budget in (0.1, 0.5)),
    *(("qwen2_5_vl", method(0.2)) for method in (VLCache, SnapKV, H2O)),
    ("qwen3_vl", VLCache(0.2)),
]  # fmt: skip
PROMPT = "<image>\nwhat is this? and what is that?"


@pytest.fixture(scope="module")
def models(request, tmp_path_factory):
    """A Hugging Face model, ours made of its files, and the former's inputs of a raw prompt."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    if request.param in hf.QWEN:
        model = hf.qwen_model(request.param)
        ours = vlcache_jax.load(
            hf.save(model, folder, request.param), buckets=Buckets(prompt=(160,), tiles=(0, 96))
        )
        return model, ours, qwen.hf_inputs
    family, decoder, shape = hf.KINDS[request.param]
    model = hf.hf_model(family, decoder, shape, seed=3)
    ours = vlcache_jax.load(
        hf.save(model, folder, family), buckets=Buckets(prompt=(160,), tiles=(0, 5))
    )
    return model, ours, partial(hf.hf_inputs, family)


def prune(cache, kept):
    """Keep of each layer and kv head the rows of the trace: [L, K, max], padded with -1."""
    for layer, positions in zip(cache.layers, kept, strict=True):
        rows = torch.as_tensor(positions[:, positions[0] >= 0], dtype=torch.int64)  # [K, k]
        index = rows[None, :, :, None].expand(1, -1, -1, layer.keys.shape[-1])
        layer.keys = layer.keys.gather(2, index)
        layer.values = layer.values.gather(2, index)


def first_token_attention(model, inputs, places):
    """What the first decoded token pays to the prompt: [L, N, m], its own key left out."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        prompt = model(**inputs, use_cache=True)
        m = prompt.logits.shape[1]
        output = model(
            input_ids=prompt.logits[:, -1].argmax(-1, keepdim=True),
            past_key_values=prompt.past_key_values,
            position_ids=places[0],
            output_attentions=True,
        )
    model.set_attn_implementation("sdpa")
    weights = np.stack([layer[0, :, 0, :m].numpy() for layer in output.attentions])
    return weights / weights.sum(-1, keepdims=True)


def pruned_decoding(model, inputs, kept, places):
    """Greedy tokens and the logits after the prompt's, from the pruned cache of the prompt.

    `places` are where the new tokens stand, of a single axis [1, 1] each or of three [3, 1, 1].
    """
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
        prune(output.past_key_values, kept)
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        tokens, logits = [int(token)], []
        for place in places:
            # A single query and no mask: it sees every key that is there, at its true position.
            step_output = model(
                input_ids=token,
                past_key_values=output.past_key_values,
                position_ids=place,
                use_cache=True,
            )
            logits.append(step_output.logits[0, -1].numpy())
            token = step_output.logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(int(token))
    return tokens, np.stack(logits)


@pytest.mark.parametrize(
    ("models", "method"), CASES, indirect=["models"], scope="module",
    ids=[f"{kind} {method.label} {method.budget}" for kind, method in CASES],
)  # fmt: skip
def test_decoding_equals_a_pruned_cache_of_transformers(models, method):
    model, ours, hf_inputs = models
    images = [picture(90, 60)]
    inputs = ours.processor(images, PROMPT, raw_prompt=True)
    generate = Generate(ours.config, method, STEPS + 1, trace=True)
    stages, settings = generate.stages, generate.settings(1)
    pool, state, trace = jax.jit(stages.begin)(ours.params, inputs, settings)
    assert trace is not None
    length = int(inputs.length[0])
    visual = inputs.visual_index[0, :length] >= 0
    row = trace.row(0, generate.cache, visual, np.zeros_like(visual))
    kept = row.kept
    assert (kept >= 0).sum() < 1.2 * method.budget * length * kept.shape[0] * kept.shape[1]
    theirs, first = hf_inputs(images, PROMPT), int(inputs.next_position()[0])
    axes = (1, 1) if inputs.positions is None else (3, 1, 1)
    places = [torch.full(axes, first + step) for step in range(STEPS)]
    expected_tokens, expected = pruned_decoding(model, theirs, kept, places)
    step = jax.jit(stages.decode_step, donate_argnums=2)
    tokens, logits = [int(state.token[0])], []
    for _ in range(STEPS):
        state, own = step(ours.params, pool, state)
        tokens.append(int(state.token[0]))
        logits.append(own[0])
    assert tokens == expected_tokens
    assert len(set(tokens)) > 4
    assert hf.relative_error(np.stack(logits), expected) < BOUND
    assert int(state.position[0]) == first + STEPS
    # CacheHitRate and mass recall, from the attention of the first decoded token.
    weights = first_token_attention(model, theirs, places)
    weights = weights.reshape(*kept.shape[:2], -1, length).mean(2)  # [L, K, m]
    for layer, head in np.ndindex(*kept.shape[:2]):
        k, own = row.budget[layer], weights[layer, head]
        held = set(kept[layer, head, :k].tolist())
        best = sorted(range(length), key=lambda j, own=own: (-own[j], j))[:k]
        assert row.hit_rate[layer, head] == pytest.approx(len(held & set(best)) / k, abs=1e-6)
        assert row.mass_recall[layer, head] == pytest.approx(own[list(held)].sum(), rel=1e-4)
    # The comparison is sharp: it notices other tokens in the places of the kept ones.
    others = np.where(kept >= 0, (kept + 1) % length, -1)
    _, wrong = pruned_decoding(model, theirs, others, places[:1])
    assert hf.relative_error(wrong, expected[:1]) > 10 * BOUND

"""Every method against its formula in plain numpy, fed with Hugging Face's attention matrices.

The attention is that of each prompt alone in torch; ours, of all prompts in one padded batch. What
is decided has to be identical, not merely close: no case hangs on how a float was rounded, and
`Expected.gap` tells that none does.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import vlcache_jax
from tests import hf
from tests.cache import numpy_methods
from tests.cache.numpy_methods import Expected
from tests.tiny import IMAGE_TOKEN_ID, picture, tiny_processor
from vlcache_jax import (
    H2O,
    TGVKV,
    VLM,
    AdaReTaKe,
    AirCache,
    Buckets,
    CacheMethod,
    Consensus,
    Custom,
    FullCache,
    Generate,
    Layer,
    MixKV,
    Prompt,
    PyramidKV,
    RandomKV,
    SnapKV,
    StreamingLLM,
    Trace,
    VLCache,
)
from vlcache_jax.cache import method as base
from vlcache_jax.cache import score
from vlcache_jax.cache.method import Observation
from vlcache_jax.cache.trace import trace_batch

ROWS = 160
"""The one prompt bucket."""

GAP = 1e-5
"""Least relative distance of two numbers whose order decides: far above float32's rounding."""

PROMPTS = {
    "image, then text": ([(50, 50)], "<image>\nwhat is in it?"),
    "interleaved": ([(90, 40), (30, 60)], "is <image> the larger one or <image>, or neither?"),
    "several": ([(40, 40), (64, 40)], "<image><image> which?"),
    "no image": ([], "no picture at all, only words and some more words to read"),
    "no text after": ([(60, 40)], "describe this: <image>"),
    "one token": ([], "<s>"),
}

LLAVA = (
    "llava",
    "llama",
    {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 4},
)
NEXT = ("llava_next", "mistral", {"num_key_value_heads": 2, "num_hidden_layers": 4})
MODELS = {
    # family, decoder, shape; factor of each layer's q and k weights; seed
    "LLaVA-1.5 MHA": (*LLAVA, (0.5, 0.5, 0.5, 0.5), 9),
    "NeXT GQA": (*NEXT, (0.5, 0.5, 0.5, 0.5), 10),
    "dense and sparse": (*NEXT, (0.55, 1.0, 1.8, 2.2), 5),
    "equal scores": (*NEXT, (0.0, 0.0, 0.0, 0.0), 0),
}

BUDGETS = ("1tok", 0.01, 0.1, 0.5, "40tok", 1.0, "500tok")

MAIN = {
    "vl-cache": (VLCache, {}),
    "h2o": (H2O, {}),
    "snapkv": (SnapKV, {}),
    "pyramidkv": (PyramidKV, {}),
    "streaming-llm": (StreamingLLM, {}),
    "random": (RandomKV, {}),
    "aircache": (AirCache, {}),
    "tgv-kv": (TGVKV, {}),
    "mixkv": (MixKV, {}),
    "adaretake": (AdaReTaKe, {}),
    "consensus": (Consensus, {}),
    "row-maximum x uniform": (Custom, {"score": "row-maximum", "allocation": "uniform"}),
}
SETTINGS = MAIN | {
    "vl-cache, shared heads": (VLCache, {"shared_heads": True}),
    "vl-cache, renormalized": (VLCache, {"renormalize": True}),
    "vl-cache, nothing recent": (VLCache, {"recent_ratio": 0}),
    "vl-cache, much recent": (VLCache, {"recent_ratio": 0.29}),
    "vl-cache, small windows": (VLCache, {"fallback_window": 5, "max_window": 8}),
    "vl-cache, threshold": (VLCache, {"threshold": 0.1}),
    "h2o, shared heads": (H2O, {"shared_heads": True}),
    "snapkv, small": (SnapKV, {"window": 6, "kernel": 3}),
    "snapkv, shared heads": (SnapKV, {"shared_heads": True}),
    "pyramidkv, small": (PyramidKV, {"window": 6, "slope": 3}),
    "streaming-llm, no sinks": (StreamingLLM, {"sinks": 0}),
    "aircache, many are elite": (AirCache, {"share": 0.1}),
    "aircache, shared heads": (AirCache, {"shared_heads": True}),
    "tgv-kv, shared heads": (TGVKV, {"shared_heads": True}),
    "mixkv, small": (MixKV, {"window": 6, "kernel": 3}),
    "h2o, text kept": (H2O, {"keep_text": True}),
    "random, another seed": (RandomKV, {"seed": 7, "recent_ratio": 0.5}),
    "row-maximum x sparsity": (Custom, {"score": "row-maximum", "allocation": "sparsity"}),
    "row-maximum, shared heads": (Custom, {"score": "row-maximum", "shared_heads": True}),
    "post-vision x uniform": (Custom, {"score": "post-vision", "allocation": "uniform"}),
    "post-vision x pyramid": (Custom, {"score": "post-vision", "allocation": "pyramid"}),
    "snapkv x sparsity": (Custom, {"score": "snapkv", "allocation": "sparsity"}),
    "h2o x pyramid": (Custom, {"score": "h2o", "allocation": "pyramid"}),
    "h2o x sparsity": (Custom, {"score": "h2o", "allocation": "sparsity", "recent_ratio": 0.2}),
    "random x sparsity": (Custom, {"score": "random", "allocation": "sparsity"}),
    "streaming-llm x sparsity": (Custom, {"score": "streaming-llm", "allocation": "sparsity"}),
}


def cases() -> list[tuple[str, str, float | str]]:
    """Model, setting and budget: of every kind with each model, the methods at every budget."""
    found = []
    for setting in SETTINGS:
        budgets = {
            "NeXT GQA": BUDGETS if setting in MAIN else (0.1, 0.5),
            "LLaVA-1.5 MHA": (0.1, 0.5) if setting in MAIN else (),
            "dense and sparse": (0.1, 0.5),
            "equal scores": (0.1, "40tok") if setting in MAIN else (0.1,),
        }
        if any(
            name in setting for name in ("snapkv", "pyramidkv", "mixkv", "row-max", "consensus")
        ):
            # Averages over neighbours share nearly all of their sum where attention is peaked:
            # their difference vanishes in float32, and there is no order to compare.
            del budgets["dense and sparse"]
        found += [(model, setting, budget) for model in budgets for budget in budgets[model]]
    return found


@dataclass(frozen=True)
class Recorder(FullCache):
    """Compresses nothing: it hands out the queries and keys that every method is shown."""

    def observe(self, layer: Layer) -> Observation:
        return Observation(layer.q, layer.k)


@dataclass(frozen=True)
class Case:
    """A model, and what it makes of the prompts: attention in torch, queries and keys here.

    attention, visual: of each prompt alone, [L, N, m, m] and [m].
    q, k, lengths: of all prompts in one batch, [B, L, T, N, H], [B, L, T, K, H] and [B].
    """

    vlm: VLM
    attention: tuple[np.ndarray, ...]
    visual: tuple[np.ndarray, ...]
    q: jax.Array
    k: jax.Array
    lengths: jax.Array


def ask(*names: str) -> tuple[list[list[Any]], list[str]]:
    """Prompts as `generate` takes them: images and texts."""
    asked = [PROMPTS[name] for name in names or PROMPTS]
    return [[picture(*size) for size in sizes] for sizes, _ in asked], [text for _, text in asked]


def torch_attention(model: Any, processor: Any, images: list[Any], text: str) -> Any:
    """Attention matrices [L, N, m, m] and visual tokens [m] of one prompt."""
    text = text.removeprefix("<s>")  # the processor puts it there itself
    inputs = processor(images=images or None, text=text, return_tensors="pt")
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions
    attention = np.stack([layer[0].numpy() for layer in weights])
    return attention, inputs["input_ids"][0].numpy() == IMAGE_TOKEN_ID


@partial(jax.jit, static_argnums=0)
def record(generate: Generate, params: Any, inputs: Any) -> Observation:
    """Run the prompts: one program for all models of a shape."""
    settings = generate.settings(len(inputs.length))
    return generate.stages.prefill(params, inputs, settings)[0].seen


def make_case(name: str, folder: Any) -> Case:
    family, decoder, shape, factors, seed = MODELS[name]
    model = hf.hf_model(family, decoder, shape, seed=seed)
    with torch.no_grad():
        for layer, factor in zip(model.model.language_model.layers, factors, strict=True):
            layer.self_attn.q_proj.weight *= factor
            # The keys stay as they are where the queries are 0.
            layer.self_attn.k_proj.weight *= factor or 1.0
    path = hf.save(model, folder / "model", family)
    model.set_attn_implementation("eager")
    images, texts = ask()
    theirs = tiny_processor(family)
    alone = [torch_attention(model, theirs, *prompt) for prompt in zip(images, texts, strict=True)]
    attention, visual = zip(*alone, strict=True)
    vlm = vlcache_jax.load(path, buckets=Buckets(prompt=(ROWS,), tiles=(16,)))
    inputs = vlm.processor(images, texts, raw_prompt=True)
    seen = record(Generate(vlm.config, cache=Recorder()), vlm.params, inputs)
    assert seen.scores is not None
    assert seen.measured is not None
    return Case(vlm, attention, visual, seen.scores, seen.measured, jnp.asarray(inputs.length))


@pytest.fixture(scope="module")
def case_of(tmp_path_factory) -> Callable[[str], Case]:
    return cache(lambda name: make_case(name, tmp_path_factory.mktemp("methods")))


# Compiled once per shape. The rest of a method runs eagerly: each method and budget is a program of
# its own, and there are hundreds of them.
window_scores = jax.jit(
    score.window_scores, static_argnames=("threshold", "maxima", "scale", "backend")
)
allocate = jax.jit(base.allocate)


def traces(method: CacheMethod, case: Case) -> list[Trace]:
    """Our trace of every prompt of the batch, by the steps that `Generate` takes."""
    batch, layers, rows = case.q.shape[:3]
    visual = np.zeros((batch, rows), bool)
    for row, own in enumerate(case.visual):
        visual[row, : own.size] = own
    prompt = Prompt(case.lengths, jnp.asarray(visual), layers, method.limit.data)
    shown = [
        Layer(index, case.q[:, index], case.k[:, index], case.k[:, index], prompt)
        for index in range(layers)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "window_scores", window_scores)
        patch.setattr(base, "allocate", allocate)
        seen = Observation.stack([method.observe(layer) for layer in shown])
        plan = method.plan(seen, prompt)
    weights = jnp.ones((batch, layers, case.k.shape[3], rows))  # of a decoded token: not looked at
    traced = jax.device_get(trace_batch(method, seen, plan, prompt, weights))
    return [traced.row(row, method, own, np.zeros_like(own)) for row, own in enumerate(case.visual)]


def expected(
    method: CacheMethod, settings: dict[str, Any], case: Case, row: int, trace: Trace
) -> Expected:
    """What the formulas say of a prompt. The random scores are taken from our trace."""
    pair = numpy_methods.METHODS.get(method.name, ("", ""))
    keys = np.asarray(case.k[row, :, : trace.m])
    found = {"score": pair[0], "allocation": pair[1], "noise": trace.scores, "keys": keys}
    found |= {"keep_text": method.keep_text, "uniform_share": method.uniform_share}
    settings = found | settings
    settings.pop("seed", None)
    return numpy_methods.run(
        case.attention[row], case.visual[row], case.k.shape[3], method.budget, **settings
    )


def as_attention(scores: np.ndarray) -> np.ndarray:
    """What text is worth to TGV-KV, which stands above everything, as the attention that it is."""
    return np.where(scores > 1e6, scores / 2.0**100, scores)


def compare(trace: Trace, want: Expected) -> None:
    assert want.gap > GAP, "two numbers of this case are a rounding apart: take another seed"
    assert trace.tau == want.tau
    assert trace.window_start == (None if want.tau is None else trace.m - want.tau)
    for name, tolerance in {"sparsity": 1e-5, "beta": 1e-5, "scores": 1e-3}.items():
        ours, theirs = getattr(trace, name), getattr(want, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            relative = 0.0
            if trace.method == "tgv-kv" and name == "scores":
                ours, theirs, relative = as_attention(ours), as_attention(theirs), 1e-3
            np.testing.assert_allclose(ours, theirs, relative, tolerance, err_msg=name)
    assert trace.budget.tolist() == want.budget
    assert (None if trace.recent is None else trace.recent.tolist()) == want.recent
    kept = [[head[head >= 0].tolist() for head in layer] for layer in trace.kept]
    assert kept == want.kept


@pytest.mark.parametrize(("model", "setting", "budget"), cases())
def test_a_method_is_its_formula(case_of, model, setting, budget):
    case, (kind, settings) = case_of(model), SETTINGS[setting]
    method = kind(budget=budget, **settings)
    for row, trace in enumerate(traces(method, case)):
        compare(trace, expected(method, settings, case, row, trace))


def test_the_full_cache_keeps_everything(case_of):
    case = case_of("NeXT GQA")
    for row, trace in enumerate(traces(FullCache(), case)):
        assert trace.m == case.visual[row].size
        compare(trace, expected(FullCache(), {}, case, row, trace))


@pytest.mark.parametrize("budget", [0.01, 0.1, "20tok"])
def test_an_allocation_of_ones_own_is_fitted_to_the_pool(case_of, budget):
    def ours(prompt, sparsity):
        return prompt.length[:, None] * (1.5 - sparsity)

    def theirs(m, sparsity):
        return np.float32(m) * (1.5 - sparsity)

    case = case_of("dense and sparse")
    method = Custom(budget, allocation=ours)
    for row, trace in enumerate(traces(method, case)):
        settings = {"score": "post-vision", "allocation": theirs}
        want = expected(method, settings, case, row, trace)
        compare(trace, want)
        most = numpy_methods.limits(budget, trace.m).most
        assert sum(want.budget) == min(most, trace.m) * 4  # the sizes ask for more


def of_all(name: str, traced: list[Trace]) -> np.ndarray:
    """A field of the traces of all prompts of more than one token, one row for each."""
    return np.stack([getattr(trace, name) for trace in traced if trace.m > 1])


def test_the_models_span_what_they_are_made_for(case_of):
    case = case_of("dense and sparse")
    tenth, half = (traces(VLCache(budget), case) for budget in (0.1, 0.5))
    sparsity = of_all("sparsity", tenth)
    assert sparsity.min() < 0.25
    assert sparsity.max() > 0.985
    assert of_all("beta", tenth).min() == np.float32(0.01)
    assert of_all("beta", half).max() == 1
    renormalized = traces(VLCache(0.5, renormalize=True), case)
    np.testing.assert_allclose(of_all("beta", renormalized).sum(-1), 2, rtol=1e-5)  # alpha * L
    assert of_all("beta", half).sum(-1).min() < 1.9
    for trace in traces(VLCache(0.5), case_of("equal scores")):
        assert trace.scores is not None
        before = trace.scores[..., : trace.window_start]
        assert (before == before[..., :1]).all()


def key_norms(layer: Layer) -> jax.Array:
    """A score of one's own that is NaN where the keys are."""
    return jnp.linalg.norm(layer.k, axis=-1).swapaxes(1, 2)


@pytest.mark.parametrize("setting", [*SETTINGS, "own score"])
def test_what_stands_behind_a_prompt_is_never_read(case_of, setting):
    clean = case_of("NeXT GQA")
    behind = jnp.arange(ROWS) >= clean.lengths[:, None]
    behind = behind[:, None, :, None, None]
    spoilt = {name: jnp.where(behind, jnp.nan, getattr(clean, name)) for name in ("q", "k")}
    kind, settings = SETTINGS.get(setting, (Custom, {"score": key_norms}))
    method = kind(budget=0.1, **settings)
    for one, other in zip(
        traces(method, clean), traces(method, replace(clean, **spoilt)), strict=True
    ):
        for name in ("sparsity", "beta", "budget", "kept", "scores"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
        assert other.scores is None or np.isfinite(other.scores).all()
        assert ((other.kept >= 0).sum(-1) == other.budget[:, None]).all()


@pytest.mark.parametrize(
    ("model", "setting", "budget"),
    [
        ("dense and sparse", "vl-cache", 0.1),
        ("LLaVA-1.5 MHA", "h2o x pyramid", "20tok"),
    ],
)
def test_generate_traces_the_formula(case_of, model, setting, budget):
    case, (kind, settings) = case_of(model), SETTINGS[setting]
    method = kind(budget=budget, **settings)
    names = ["no image", "interleaved", "no text after"]
    answers = case.vlm.generate(
        *ask(*names), raw_prompt=True, max_new_tokens=1, cache=method, trace=True
    )
    for name, answer in zip(names, answers, strict=True):
        row = list(PROMPTS).index(name)
        assert answer.trace.prompt_is_visual.tolist() == case.visual[row].tolist()
        compare(answer.trace, expected(method, settings, case, row, answer.trace))

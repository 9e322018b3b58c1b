"""A small model end to end: Triton's kernels against XLA in float32.

Random weights, large enough for answers to depend on the prompts. Tokens only, no picture: what a
picture adds are the vision tower's layers, of the same attention.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_suite import checks
from benchmarks.gpu_suite.stages import Context
from vlcache_jax.cache.methods import VLCache
from vlcache_jax.config import LlavaConfig, TextConfig, VisionConfig
from vlcache_jax.generate import Generate
from vlcache_jax.models.llava import Params, init_params
from vlcache_jax.processing import ModelInputs
from vlcache_jax.stages import Stages

BUDGET = 0.3
LOGITS_BOUND = 2e-2
"""Of bfloat16 logits of one decode step."""


def model(context: Context) -> dict[str, Any]:
    """The stage."""
    rows: list[dict[str, Any]] = []
    params, inputs = _params(context), _inputs(context)
    for done, check in enumerate((_tokens, _logits)):
        context.progress(done, 2)
        try:
            rows += check(context, params, inputs)
        except Exception as error:  # one check's trouble is its own
            why = f"{type(error).__name__}: {error}"[:2000]
            row = {"kernel": "model", "case": check.__name__.strip("_"), "ok": False}
            rows.append({**row, "exception": why})
        context.save(rows=rows)
    return checks.summary(rows)


def _config(context: Context) -> LlavaConfig:
    return LlavaConfig(
        family="llava",
        vision=VisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_layers=1,
            num_heads=2,
            image_size=28,
            patch_size=14,
        ),
        text=TextConfig(
            vocab_size=512,
            hidden_size=64 if context.dry else 512,
            intermediate_size=96 if context.dry else 1024,
            num_layers=1 if context.dry else 4,
            num_heads=2 if context.dry else 8,
            num_kv_heads=1 if context.dry else 2,
            head_dim=32 if context.dry else 64,
            max_positions=4096,
        ),
        image_token_id=511,
        vision_layers=1,
    )


def _params(context: Context) -> Params:
    """Each product keeps about the size of what goes in; norms stay as they are."""
    config = _config(context)
    factor = 1.2 / (0.02 * config.text.hidden_size**0.5)
    params = init_params(config, context.seed % 2**31)
    return jax.tree.map(lambda x: factor * x if x.ndim > 1 else x, params)


def _inputs(context: Context) -> ModelInputs:
    rng = np.random.default_rng(context.seed)
    length = np.array([40, 23, 9] if context.dry else [384, 201, 77], np.int32)
    tokens = rng.integers(5, 505, (3, length.max()), np.int32)
    tokens[np.arange(length.max()) >= length[:, None]] = 0
    return ModelInputs(
        tokens=tokens,
        length=length,
        visual_index=np.full_like(tokens, -1),
        tiles=np.zeros((0, 3, 28, 28), np.float32),
    )


def _generate(context: Context, backend: str) -> Generate:
    return Generate(
        _config(context),
        cache=VLCache(BUDGET),
        max_new_tokens=4 if context.dry else 16,
        backend=backend,
        trace=True,
    )


def _tokens(context: Context, params: Params, inputs: ModelInputs) -> list[dict[str, Any]]:
    """Greedy answers and kept rows in float32: the same, to the last one."""
    key = jax.random.key(0)
    ours, expected = (
        jax.device_get(jax.jit(_generate(context, backend))(params, inputs, key))
        for backend in ("triton", "xla")
    )
    assert ours.trace is not None
    assert expected.trace is not None
    words = f"float32, {inputs.tokens.shape[0]} prompts up to {inputs.tokens.shape[1]}"
    varied = len(np.unique(expected.tokens))
    row = {"kernel": "model", "case": f"{words}, {varied} different tokens", "bound": 0.0}
    pairs = {
        "tokens": (ours.tokens, expected.tokens),
        "kept rows": (ours.trace.kept, expected.trace.kept),
    }
    return [
        {**row, "what": what, "error": float((a != b).mean()), "ok": bool((a == b).all())}
        for what, (a, b) in pairs.items()
    ]


def _logits(context: Context, params: Params, inputs: ModelInputs) -> list[dict[str, Any]]:
    """One decode step in bfloat16 from the same cache, against the step in float32."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    settings = _generate(context, "xla").settings(len(inputs.length))
    ours, plain = (_generate(context, backend).stages for backend in ("triton", "xla"))
    pool, state, _ = jax.jit(plain.begin)(params, inputs, settings)

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)

    expected = jax.jit(lambda *arrays: plain.decode_step(*map(wide, arrays))[1])(
        params, pool, state
    )

    def error_of(stages: Stages) -> float:
        logits = jax.jit(lambda *arrays: stages.decode_step(*arrays)[1])(params, pool, state)
        return checks.relative_error(np.asarray(logits), np.asarray(expected))

    error = error_of(ours)
    row = {"kernel": "model", "case": "bfloat16, one decode step", "what": "logits"}
    row |= {"error": error, "bound": LOGITS_BOUND, "ok": error <= LOGITS_BOUND}
    return [{**row, "error_of_xla": error_of(plain)}]  # most of it is bfloat16's, not a kernel's

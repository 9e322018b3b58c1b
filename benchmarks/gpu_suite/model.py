"""A small model end to end: Triton's kernels against XLA in float32.

Random weights, large enough for answers to depend on the prompts. Tokens only, no picture: what a
picture adds are the vision tower's layers, of the same attention.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_suite import checks
from benchmarks.gpu_suite.stages import Context
from benchmarks.measure import reason
from benchmarks.models import SMALL_TOWER
from vlcache_jax.cache.methods import VLCache
from vlcache_jax.models.config import TextConfig
from vlcache_jax.models.families import Params, init_params
from vlcache_jax.models.llava.config import LlavaConfig
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.running.generate import Generate
from vlcache_jax.running.stages import Stages

TEXT = TextConfig(
    vocab_size=512,
    hidden_size=512,
    intermediate_size=1024,
    num_layers=4,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    max_positions=4096,
)
DRY = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 1, "num_heads": 2,
       "num_kv_heads": 1, "head_dim": 32}  # fmt: skip
LOGITS_BOUND = 2e-2
"""Of bfloat16 logits of one decode step."""


def model(context: Context) -> dict[str, Any]:
    """The stage."""
    text = replace(TEXT, **DRY) if context.dry else TEXT
    config = LlavaConfig("llava", text, SMALL_TOWER, image_token_id=511, vision_layers=1)
    params = init_params(config, context.seed % 2**31)
    # Each product keeps about the size of what goes in; norms stay as they are.
    factor = 1.2 / (0.02 * text.hidden_size**0.5)
    params = jax.tree.map(lambda x: factor * x if x.ndim > 1 else x, params)
    generate = {
        backend: Generate(
            config, VLCache(0.3), 4 if context.dry else 16, backend=backend, trace=True
        )
        for backend in ("triton", "xla")
    }
    rows: list[dict[str, Any]] = []
    for check in (_tokens, _logits):
        try:
            rows += check(generate, params, _inputs(context))
        except Exception as error:  # one check's trouble is its own
            row = {"kernel": "model", "case": check.__name__.strip("_"), "ok": False}
            rows.append({**row, "exception": reason(error)})
        context.save(rows=rows)
    return checks.summary(rows)


def _inputs(context: Context) -> ModelInputs:
    rng = np.random.default_rng(context.seed)
    length = np.array([40, 23, 9] if context.dry else [384, 201, 77], np.int32)
    tokens = rng.integers(5, 505, (3, length.max()), np.int32)
    tokens[np.arange(length.max()) >= length[:, None]] = 0
    side = SMALL_TOWER.image_size
    none = np.zeros((0, 3, side, side), np.float32)
    return ModelInputs(tokens, length, np.full_like(tokens, -1), none)


def _tokens(
    generate: dict[str, Generate], params: Params, inputs: ModelInputs
) -> list[dict[str, Any]]:
    """Greedy answers and kept rows in float32: the same, to the last one."""
    ours, expected = (
        jax.device_get(jax.jit(generate[backend])(params, inputs, jax.random.key(0)))
        for backend in ("triton", "xla")
    )
    assert ours.trace is not None
    assert expected.trace is not None
    words = f"float32, {inputs.tokens.shape[0]} prompts up to {inputs.tokens.shape[1]}"
    varied = len(np.unique(expected.tokens))
    row = {"kernel": "model", "case": f"{words}, {varied} different tokens", "bound": 0.0}
    pairs = {
        "tokens": (ours.tokens, expected.tokens),
        "kept rows": (ours.trace.arrays["kept"], expected.trace.arrays["kept"]),
    }
    return [
        {**row, "what": what, "error": float((a != b).mean()), "ok": bool((a == b).all())}
        for what, (a, b) in pairs.items()
    ]


def _logits(
    generate: dict[str, Generate], params: Params, inputs: ModelInputs
) -> list[dict[str, Any]]:
    """One decode step in bfloat16 from the same cache, against the step in float32."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    ours, plain = (generate[backend].stages for backend in ("triton", "xla"))
    settings = generate["xla"].settings(len(inputs.length))
    pool, state, _ = jax.jit(plain.begin)(params, inputs, settings)

    def logits_of(stages: Stages, *arrays: Any) -> np.ndarray:
        return np.asarray(jax.jit(lambda *arrays: stages.decode_step(*arrays)[1])(*arrays))

    arrays = params, pool, state
    (expected,) = checks.in_float32(lambda *wide: plain.decode_step(*wide)[1], *arrays)
    error, error_of_xla = (
        checks.relative_error(logits_of(stages, *arrays), expected) for stages in (ours, plain)
    )
    row = {"kernel": "model", "case": "bfloat16, one decode step", "what": "logits"}
    row |= {"error": error, "bound": LOGITS_BOUND, "ok": error <= LOGITS_BOUND}
    return [{**row, "error_of_xla": error_of_xla}]  # most of it is bfloat16's, not a kernel's

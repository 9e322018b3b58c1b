"""The programs that `benchmarks.memory` compiles: what is asked for, and the committed table's."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.models import MODELS, abstract_inputs
from pallas_kernels.prefill_attention import prefill_attention
from vlcache_jax.cache.methods import DEFAULT_METHOD, FullCache, VLCache, make_method
from vlcache_jax.cache.quantizers import make_quantizer
from vlcache_jax.models.decoder import Embedded
from vlcache_jax.models.families import Params, bind
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.running.generate import Generate
from vlcache_jax.running.parts import CHUNK_ROWS, DONATED

PARTS = ("see", "extend", "finish", "build_cache")
"""Stages that a prompt in chunks, and a question behind a prefix, are run by."""

STAGES = ("decode", "generate", "vision", *PARTS)
DEFAULT = "llava-v1.6-mistral-7b"
BFLOAT16 = jnp.dtype(jnp.bfloat16)


@dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
        device: a name of `GPUS`.
        model: a name of `MODELS`.
        context: prompt rows of each sequence, T.
        batch: sequences.
        budget: share of the cache that the method keeps; 1 for the full cache.
        new_tokens: most tokens of an answer.
        stage: "decode", a chunk of decode steps alone, "generate", all from pixels to tokens, or
            "vision", what the decoder is given of pixels and tokens; or one of `PARTS`.
        backend: of the attention, None for the best.
        kv_bits: how what is kept is quantized, as of `make_quantizer`; "16" for not at all.
        method: what is kept, a name of `METHODS`.
        tiles: of each prompt; None for the most that one image becomes.
        rows: that "extend" or "finish" runs.
    """

    device: str = "h200"
    model: str = DEFAULT
    context: int = 2048
    batch: int = 1
    budget: float = 0.1
    new_tokens: int = 129
    stage: str = "decode"
    backend: str | None = None
    kv_bits: str = "16"
    method: str = VLCache.name
    tiles: int | None = None
    rows: int | None = None

    def generate(self) -> Generate:
        """The program's functions."""
        cache = FullCache() if self.budget >= 1 else make_method(self.method, self.budget)
        cache = replace(cache, quantize=make_quantizer(self.kv_bits))
        return Generate(MODELS[self.model], cache, self.new_tokens, backend=self.backend)

    def inputs(self) -> ModelInputs:
        """Its prompts, as shapes."""
        return abstract_inputs(MODELS[self.model], self.batch, self.context, self.tiles)

    def vision(self, params: Params, inputs: ModelInputs) -> Embedded:
        """What the decoder is given."""
        attend = partial(prefill_attention, causal=False, backend=self.backend)
        return bind(MODELS[self.model])(params).embed_prompt(inputs, attend)

    def part(self, params: Params) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]:
        """One of `PARTS`: the function, its arguments as shapes, and those that are donated."""
        generate, inputs = self.generate(), self.inputs()
        stages, settings = generate.stages, generate.settings(self.batch)
        if self.stage == "see":
            return stages.see, (params, inputs), ()
        looks, size = stages.cache.continued, (self.batch, self.context)
        tables = jax.eval_shape(stages.see, params, inputs)
        buffers = jax.eval_shape(lambda: stages.empty_buffers(*size, BFLOAT16))
        memory = jax.eval_shape(lambda: stages.empty_memory(*size, looks))
        inputs = jax.eval_shape(lambda given: given.without_tiles, inputs)
        behind = params, tables, inputs, buffers, memory
        rows, donated = self.rows or min(CHUNK_ROWS, self.context), DONATED.get(self.stage, ())
        if self.stage == "extend":
            extend = partial(stages.extend, rows=rows, looks=looks)
            return extend, (*behind, inputs.length, inputs.length, settings), donated
        finish, last = partial(stages.finish, rows=rows), (*behind, inputs.length, settings)
        if self.stage == "finish":
            return finish, last, donated
        prefilled, _ = jax.eval_shape(finish, *last)
        return stages.build_cache, (prefilled, inputs, settings), donated


ALL = (
    *(
        Program(model=model, context=context, batch=batch, stage=stage)
        for stage, context, batches in (("decode", 2048, (1, 64)), ("generate", 3072, (1,)))
        for model in ("llava-1.5-7b", "llava-v1.6-mistral-7b", "llava-v1.6-34b")
        for batch in batches
    ),
    Program(model="llava-1.5-7b", batch=64, budget=1.0),
    *(
        Program(model=model, context=8192, batch=batch, budget=budget)
        for model, batch in (("llava-v1.6-mistral-7b", 64), ("llava-v1.6-34b", 32))
        for budget in (1.0, 0.1)
    ),
    Program(context=32768, stage="generate"),
    *(
        Program(context=8192, stage="generate", method=method)
        for method in dict.fromkeys((VLCache.name, DEFAULT_METHOD))
    ),
    *(
        Program(context=context, batch=batch, budget=budget, kv_bits="akvq")
        for context, batch in ((4096, 1), (8192, 64))
        for budget in (1.0, 0.1)
    ),
    *(  # a video of 32 frames of 196 tokens; a picture of 1344 x 1344 pixels; 16k tokens of video
        Program(model=model, context=context, tiles=tiles, stage=stage)
        for model, context, tiles in (
            ("llava-onevision-7b", 8192, 32),
            ("qwen2.5-vl-7b", 3104, 3008),
            ("qwen2.5-vl-7b", 25792, 25696),
            ("qwen3-vl-8b", 3104, 3008),
            ("qwen3-vl-8b", 25792, 25696),
        )
        for stage in ("vision", "generate")
    ),
    *(
        Program(model="qwen2.5-vl-7b", context=8192, batch=64, budget=budget)
        for budget in (1.0, 0.1)
    ),
    *(  # as many pictures as the prompt has room for, in chunks
        Program(context=context, tiles=context // 576, stage=stage, rows=rows)
        for context in (32768, 131072)
        for stage, rows in (("see", None), ("extend", 2048), ("finish", 32), ("build_cache", 32))
    ),
    *(Program(context=3072, stage="finish", rows=32, budget=budget) for budget in (1.0, 0.1)),
)
"""The rows of the committed table."""

"""The programs that `benchmarks.memory` compiles: what is asked for, and the committed table's."""

from dataclasses import dataclass, replace
from functools import partial

import jax.numpy as jnp

from benchmarks.models import MODELS, abstract_inputs
from pallas_kernels.prefill_attention import prefill_attention
from vlcache_jax.cache.methods import DEFAULT_METHOD, FullCache, VLCache, make_method
from vlcache_jax.cache.quantizers import make_quantizer
from vlcache_jax.models.decoder import Embedded
from vlcache_jax.models.families import Params, bind
from vlcache_jax.requests.inputs import ModelInputs
from vlcache_jax.running.generate import Generate

STAGES = ("decode", "generate", "vision")
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
            "vision", what the decoder is given of pixels and tokens.
        backend: of the attention, None for the best.
        kv_bits: how what is kept is quantized, as of `make_quantizer`; "16" for not at all.
        method: what is kept, a name of `METHODS`.
        tiles: of each prompt; None for the most that one image becomes.
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
)
"""The rows of the committed table."""

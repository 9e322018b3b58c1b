"""The families of models by the `model_type` of their config.json, and the parameters of each.

Outside of its definition a model is a pure function of a plain dict of arrays:
`bind(config)(params)` gives the module back inside a traced function.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from vlcache_jax.fields import one_of, read_field
from vlcache_jax.models.config import DECODERS, ModelConfig, refuse_formats
from vlcache_jax.models.decoder import Decoder
from vlcache_jax.models.layers import DType
from vlcache_jax.models.llava.config import LlavaConfig
from vlcache_jax.models.llava.model import Llava
from vlcache_jax.models.llava.names import LLAVA
from vlcache_jax.models.llava.packing import LlavaPacking
from vlcache_jax.models.names import DECODER, Names
from vlcache_jax.models.onevision.config import OnevisionConfig
from vlcache_jax.models.onevision.packing import OnevisionPacking
from vlcache_jax.models.qwen3_vl.config import Qwen3VLConfig
from vlcache_jax.models.qwen3_vl.model import Qwen3VL
from vlcache_jax.models.qwen3_vl.names import QWEN3_VL
from vlcache_jax.models.qwen3_vl.packing import Qwen3VLPacking
from vlcache_jax.models.qwen_vl.config import QwenVLConfig
from vlcache_jax.models.qwen_vl.model import QwenVL
from vlcache_jax.models.qwen_vl.names import QWEN_VL
from vlcache_jax.models.qwen_vl.packing import QwenVLPacking
from vlcache_jax.requests.packing import Packing

Params = dict[str, Any]


class Family(NamedTuple):
    """What belongs to a `model_type`.

    Attributes:
        config: reads the config.json.
        network: the module.
        names: its weights as Hugging Face calls them.
        packing: makes rows of prompts and pictures.
    """

    config: type[ModelConfig]
    network: type[Decoder]
    names: Names
    packing: type[Packing]


_TEXT = Family(ModelConfig, Decoder, DECODER, Packing)
_LLAVA = Family(LlavaConfig, Llava, LLAVA, LlavaPacking)
_ONEVISION = Family(OnevisionConfig, Llava, LLAVA, OnevisionPacking)
_QWEN_VL = Family(QwenVLConfig, QwenVL, QWEN_VL, QwenVLPacking)
_QWEN3_VL = Family(Qwen3VLConfig, Qwen3VL, QWEN3_VL, Qwen3VLPacking)
FAMILIES = {
    **dict.fromkeys(DECODERS, _TEXT),
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_onevision": _ONEVISION,
    "qwen2_5_vl": _QWEN_VL,
    "qwen3_vl": _QWEN3_VL,
}


def family_of(config: ModelConfig) -> Family:
    """What belongs to a model's configuration."""
    return FAMILIES[config.family]


def read_config(data: Any) -> ModelConfig:
    """The configuration of any family from the fields of a `config.json`.

    Raises:
        ValueError: a value is impossible, or the file asks for remote code.
        NotImplementedError: it describes a model that this library does not implement.
    """
    refuse_formats(data)
    return FAMILIES[read_field(data, "model_type", one_of(*FAMILIES))].config.from_hf(data)


def init_params(config: ModelConfig, seed: int = 0, dtype: DType = jnp.float32) -> Params:
    """Random parameters, as a plain nested dict of arrays."""

    @jax.jit  # one program instead of a small one for every shape
    def init() -> Params:
        model = family_of(config).network(config, dtype=dtype, rngs=nnx.Rngs(seed))
        return nnx.to_pure_dict(nnx.state(model))

    return init()


def abstract_params(config: ModelConfig, dtype: DType = jnp.float32) -> Params:
    """The tree of `init_params` as shapes and types; nothing is allocated."""
    return nnx.to_pure_dict(_abstract(config, jnp.dtype(dtype))[1])


@lru_cache(maxsize=32)
def _abstract(config: ModelConfig, dtype: jnp.dtype) -> tuple[Any, Any]:
    network = family_of(config).network
    return nnx.split(nnx.eval_shape(lambda: network(config, dtype=dtype, rngs=nnx.Rngs(0))))


def bind(config: ModelConfig) -> Callable[[Params], Any]:
    """The function that turns parameters into a model, to be called inside a traced function.

    Made once and closed over, it costs nothing per call: the merge happens while tracing (an
    `nnx.jit` would split and merge on every call instead).
    """
    graphdef, _ = _abstract(config, jnp.dtype(jnp.float32))
    return lambda params: nnx.merge(graphdef, params)

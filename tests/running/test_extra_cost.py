"""What looking at a prompt costs, counted from the traced programs: nothing is compiled or run."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from benchmarks.models import MODELS, abstract_inputs, empty_cache
from tests.tiny import tiny_config
from vlcache_jax import DEFAULT_METHOD, FullCache, Generate, VLCache
from vlcache_jax.cache.methods import make_method
from vlcache_jax.models.families import abstract_params

ROWS = 8192


def size(variable: Any) -> int:
    return math.prod(variable.aval.shape) * variable.aval.dtype.itemsize


def count(jaxpr: Any) -> tuple[float, float]:
    """Operations of products and kernels, and bytes that they and gathers read and write."""
    operations, moved = 0.0, 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "pallas_call":
            cost = parameters["cost_estimate"]
            operations, moved = operations + cost.flops, moved + cost.bytes_accessed
            continue
        if name in ("dot_general", "sort"):
            moved += sum(map(size, (*equation.invars, *equation.outvars)))
        if name == "gather":  # of the operand no more is read than is written
            moved += 2 * size(equation.outvars[0])
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            operations += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        times = parameters.get("length", 1) if name == "scan" else 1
        for inside in jaxprs_in_params(parameters):
            own = count(inside)
            operations, moved = operations + times * own[0], moved + times * own[1]
    return operations, moved


def prefill(method: Any) -> tuple[float, float]:
    """Of the prefill of one prompt with a picture, by the shapes of a model of 7B."""
    whole = MODELS["llava-v1.6-mistral-7b"]
    config = replace(whole, text=replace(whole.text, num_layers=4))
    generate = Generate(config, method, 2, backend="triton")
    stages, settings = generate.stages, generate.settings(1)
    arguments = abstract_params(config, jnp.dtype(jnp.bfloat16)), abstract_inputs(config, 1, ROWS)
    return count(jax.make_jaxpr(stages.begin)(*arguments, settings).jaxpr)


def test_the_default_method_costs_little_more_than_vl_cache():
    """The bytes are those of products, sorts and kernels, each kernel reading its keys once."""
    paper, ours = prefill(VLCache()), prefill(make_method(DEFAULT_METHOD))
    assert prefill(FullCache())[0] < paper[0] < ours[0] < 1.01 * paper[0]
    assert ours[1] < 1.015 * paper[1]


def test_decoding_is_the_same_program_whatever_was_kept():
    config = tiny_config("llava_next")

    def step(method: Any) -> str:
        generate = Generate(config, method, 8, backend="triton")
        pool, state = empty_cache(generate, 2, 128, jnp.dtype(jnp.float32))
        arguments = abstract_params(config), pool, state
        return str(jax.make_jaxpr(generate.stages.decode_chunk)(*arguments))

    assert step(make_method(DEFAULT_METHOD, 0.1)) == step(VLCache(0.1))

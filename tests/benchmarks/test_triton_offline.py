"""Kernels compiled to machine code for GPUs that are not here."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from benchmarks.triton_offline import KernelError, compile_kernels

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="the triton wheel is not installed: pip install 'vlcache-jax[offline]'",
)

TILE = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
ROWS = jax.ShapeDtypeStruct((64, 256), jnp.float32)


def multiply(a, b, out):
    out[...] = plgpu.dot(a[...], b[...]).astype(out.dtype)


def scale(a, out):
    out[...] = 2 * a[...] + 1


def centre(a, out):
    out[...] = a[...] - jnp.mean(a[...], axis=1, keepdims=True)


def call(kernel, *args, num_warps=4, **options):
    params = plgpu.CompilerParams(num_warps=num_warps, num_stages=2)
    return pl.pallas_call(kernel, out_shape=args[0], compiler_params=params, **options)(*args)


@needs_triton
@pytest.mark.parametrize("gpu", ["h200", "a100"])
def test_a_matrix_product_runs_on_tensor_cores(gpu):
    (code,) = compile_kernels(lambda a, b: call(multiply, a, b, grid=(3, 2)), TILE, TILE, gpu=gpu)
    assert code.name == "multiply"
    assert code.tensor_core_ops > 0
    assert code.spill_bytes == 0
    assert code.shared_bytes >= 64 * 64 * 2  # at least one operand passes through it
    assert 16 <= code.registers <= 255
    assert (code.num_warps, code.num_stages, code.grid) == (4, 2, (3, 2, 1))


@needs_triton
def test_elementwise_code_needs_neither_tensor_cores_nor_shared_memory():
    (code,) = compile_kernels(lambda a: call(scale, a), ROWS, gpu="h200")
    assert (code.tensor_core_ops, code.shared_bytes, code.spill_bytes) == (0, 0, 0)


@needs_triton
def test_too_many_values_for_one_warp_spill():
    (code,) = compile_kernels(lambda a: call(centre, a, num_warps=1), ROWS, gpu="h200")
    assert code.spill_bytes > 0


@needs_triton
def test_each_kernel_is_listed_once():
    def twice_inside_a_loop(a):
        return jax.lax.fori_loop(0, 9, lambda _, a: call(scale, call(scale, a)), a)

    def different(a):
        return call(scale, call(centre, call(scale, a, num_warps=8), num_warps=8))

    (code,) = compile_kernels(twice_inside_a_loop, ROWS, gpu="h200")
    assert code.name == "scale"
    codes = compile_kernels(different, ROWS, gpu="h200")
    found = [(code.name, code.num_warps) for code in codes]
    assert found == [("scale", 8), ("centre", 8), ("scale", 4)]
    assert compile_kernels(jnp.sin, ROWS, gpu="h200") == []


@needs_triton
def test_a_refusal_names_the_kernel_and_the_reason():
    with pytest.raises(KernelError, match="kernel scale: triton failed") as caught:
        compile_kernels(lambda a: call(scale, a, num_warps=3), ROWS, gpu="h200")
    assert caught.value.kernel == "scale"
    assert "num_warps must be a power of 2" in caught.value.message


@needs_triton
def test_a_compiler_that_aborts_is_outlived():
    with pytest.raises(KernelError, match="LLVM ERROR: Symbol name") as caught:
        compile_kernels(lambda a: call(scale, a, name="not-for-ptx"), ROWS, gpu="h200")
    assert caught.value.kernel == "not-for-ptx"


@needs_triton
@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="pallas_call takes Triton by itself")
@pytest.mark.filterwarnings("ignore:Using ``pl.pallas_call`` for Mosaic:DeprecationWarning")
def test_a_kernel_of_the_other_backend_is_not_passed_over():
    with pytest.raises(ValueError, match="Mosaic GPU"):
        compile_kernels(lambda a: pl.pallas_call(scale, out_shape=a)(a), ROWS, gpu="h200")


def test_an_unknown_gpu_is_refused():
    with pytest.raises(ValueError, match="use one of h200"):
        compile_kernels(jnp.sin, ROWS, gpu="h2oo")


def test_a_missing_wheel_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match=r"pip install 'vlcache-jax\[offline\]'"):
        compile_kernels(jnp.sin, ROWS, gpu="h200")

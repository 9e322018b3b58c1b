"""The choice of a backend and of its block sizes; cuDNN, which is not here, by what it is told."""

import warnings
from dataclasses import astuple, fields
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    add_rms_norm,
    backends,
    prefill_attention,
    sample_tokens,
    tuning,
    window_scores,
)
from pallas_kernels import quantized_decode_attention as quantized
from pallas_kernels import ragged_decode_attention as ragged
from pallas_kernels.backends import Device, check_backend, choose, current_device
from pallas_kernels.prefill_attention import cudnn, reference
from pallas_kernels.rows import LayerRows, NewToken, PackedRows, Segment, Tail
from tests.kernels.cases import FACTORS, SHAPES, assert_close, draw, int32, poison

CPU = Device("cpu", "cpu", None, present=True)
H200 = Device("gpu", "NVIDIA H200", 90, present=True)
ABSENT = Device("gpu", "NVIDIA H200", 90, present=False)
OPERATIONS = {
    "prefill_attention": (prefill_attention.prefill_attention, prefill_attention.BACKENDS),
    "chunk_attention": (prefill_attention.chunk_attention, prefill_attention.CHUNK_BACKENDS),
    "window_scores": (window_scores.window_scores, window_scores.BACKENDS),
    "append_and_attend": (ragged.append_and_attend, ragged.BACKENDS),
    "quantized_append_and_attend": (quantized.append_and_attend, quantized.BACKENDS),
    "add_rms_norm": (add_rms_norm.add_rms_norm, add_rms_norm.BACKENDS),
    "sample_tokens": (sample_tokens.sample_tokens, sample_tokens.BACKENDS),
}
X: Any = np.ones((2, 5), np.float32)


def arguments(operation) -> Any:
    """Small ones that fit each other."""
    rows, pool = jnp.zeros((1, 8, 4, 16)), jnp.zeros((1, 2, 8, 16))
    one, angles = jnp.zeros((1,), jnp.int32), jnp.zeros((1, 8))
    half = pool.astype(jnp.bfloat16)
    words, affine = (jnp.zeros(s, jnp.uint32) for s in ((1, 2, 8, 16), (1, 2, 1, 128)))
    runs = jnp.zeros((1, 1), jnp.int32)

    def layer(rows: Any) -> Any:
        new = NewToken(jnp.zeros((1, 2, 4, 16), rows.dtype), angles, angles)
        return new, Segment(rows, rows, one, one), Tail(rows, rows, one)

    new, dense, tail = layer(half)
    packed = PackedRows(words, words, affine, affine, runs, runs, (2,))
    return {
        "prefill_attention": (rows, rows, rows, one),
        "chunk_attention": (rows, LayerRows(pool, pool, one[0], 4), one, one),
        "window_scores": (rows, rows, one, one),
        "append_and_attend": layer(pool),
        "quantized_append_and_attend": (new, dense, packed, tail),
        "add_rms_norm": (rows[0, 0], rows[0, 0], rows[0, 0, 0]),
        "sample_tokens": (rows[0, 0, :1], jnp.zeros((1,)), one, jnp.ones((1,)), jnp.zeros((1,))),
    }[operation]


def call(operation, **settings):
    function, _ = OPERATIONS[operation]
    if operation == "add_rms_norm":
        settings["eps"] = 1e-5
    return partial(function, **settings), arguments(operation)


@pytest.fixture
def on(monkeypatch):
    """Makes the choice see a device; what did not compile for it before is forgotten."""
    backends._failure.cache_clear()

    def see(device):
        for module in (backends, tuning, cudnn):
            monkeypatch.setattr(module, "current_device", lambda: device)

    return see


def fails(*arrays, **static):
    raise RuntimeError("RESOURCE_EXHAUSTED: shared memory\nand a long trace")


def refuses(*arrays, **static):
    raise NotImplementedError("not this case")


def multiply(x, *, by):
    return by * x


def never(*arrays, **static):
    raise AssertionError("not to be called")


def test_every_operation_ends_with_xla_and_has_factors():
    for _, implementations in OPERATIONS.values():
        assert set(implementations) <= set(backends.BACKENDS)
        assert list(implementations)[-1] == "xla"
    appends = {"append_and_attend", "quantized_append_and_attend"}
    assert OPERATIONS.keys() - FACTORS.keys() == appends


@pytest.mark.parametrize("operation", OPERATIONS)
def test_only_a_request_makes_the_cpu_interpret_a_kernel(operation, on):
    on(CPU)
    for backend, expected in ((None, False), ("xla", False), ("triton", True)):
        function, args = call(operation, backend=backend)
        assert ("pallas_call" in str(jax.make_jaxpr(function)(*args))) is expected


@pytest.mark.parametrize(
    ("operation", "backend"),
    [*product(OPERATIONS, ["cuda-magic"]), *product(list(OPERATIONS)[1:], ["cudnn"])],
)
def test_a_backend_that_is_not_there_is_named(operation, backend):
    function, args = call(operation, backend=backend)
    with pytest.raises(NotImplementedError, match=f"{operation} has no backend '{backend}'"):
        function(*args)


def test_a_backend_is_asked_for_by_name_or_by_the_environment(monkeypatch):
    monkeypatch.delenv("VLCACHE_BACKEND", raising=False)
    assert check_backend(None) is None
    assert check_backend("triton") == "triton"
    with pytest.raises(ValueError, match="backend='magic' is no backend: use one of triton, cudnn"):
        check_backend("magic")
    monkeypatch.setenv("VLCACHE_BACKEND", "xla")
    assert check_backend(None) == "xla"
    assert check_backend("triton") == "triton"
    monkeypatch.setenv("VLCACHE_BACKEND", "magic")
    with pytest.raises(ValueError, match="VLCACHE_BACKEND='magic' is no backend"):
        check_backend(None)
    assert check_backend("cudnn") == "cudnn"
    monkeypatch.setenv("VLCACHE_BACKEND", "")
    assert check_backend(None) is None


@pytest.mark.parametrize(
    ("kind", "capability"),
    [
        ("NVIDIA H200", 90),
        ("NVIDIA A100-SXM4-80GB", 80),
        ("NVIDIA H100 80GB HBM3", 90),
        ("NVIDIA RTX 9999", None),
    ],
)
def test_a_program_may_be_for_a_gpu_that_is_not_here(kind, capability):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert current_device() == Device("gpu", kind, capability, present=False)
    assert current_device().present


def test_the_default_device_counts():
    device = jax.devices("cpu")[0]
    for default in (device, "cpu"):
        with jax.default_device(default):
            assert current_device() == Device("cpu", device.device_kind, None, present=True)


def test_a_compiler_that_fails_is_replaced_with_one_warning(on):
    on(H200)
    run = partial(choose, "multiply", None, {"triton": fails, "xla": multiply})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [run(X, by=3), run(2 * X, by=3)]
    assert [result.tolist() for result in results] == [(3 * X).tolist(), (6 * X).tolist()]
    (warning,) = caught
    assert warning.category is RuntimeWarning
    message = str(warning.message)
    for part in ("multiply:", "triton", "float32[2, 5]", H200.kind, "EXHAUSTED: shared memory"):
        assert part in message
    assert "long trace" not in message
    with pytest.warns(RuntimeWarning, match=r"float32\[1, 5\]"):  # other shapes, another case
        run(X[:1], by=3)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes."),
        RuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
        RuntimeError("RESOURCE_EXHAUSTED: failed to allocate 4.00GiB"),
        MemoryError(),
    ],
)
def test_a_lack_of_memory_that_passes_is_not_remembered(error, on):
    on(H200)
    memory = [error, None, None]

    def scarce(x, *, by):
        if (problem := memory.pop(0)) is not None:
            raise problem
        return by * x + 1

    run = partial(choose, "multiply", None, {"triton": scarce, "xla": multiply}, by=3)
    with pytest.warns(RuntimeWarning, match="multiply: the triton backend does not compile"):
        assert run(X).tolist() == (3 * X).tolist()
    assert run(X).tolist() == (3 * X + 1).tolist()
    assert memory == []


def test_arguments_that_are_trees_are_one_case_by_all_that_is_in_them(on):
    on(H200)
    compiled = []

    def kernel(rows, *, by):
        compiled.append(rows.bits)
        return by * rows.first

    def rows(first, bits):
        return PackedRows(X, X, X, X, first, X, bits)

    run = partial(choose, "multiply", None, {"triton": kernel, "xla": never}, by=3)
    for first, bits in ((X, (2,)), (2 * X, (2,)), (X[:1], (2,)), (X, (4,))):
        assert run(rows(first, bits)).tolist() == (3 * first).tolist()
    # Each is called once to run, and once for each of three cases to be compiled before.
    assert compiled == [(2,), (2,), (2,), (2,), (2,), (4,), (4,)]


def test_a_fallback_goes_on_inside_of_a_larger_program(on):
    on(H200)
    run = partial(choose, "multiply", None, {"triton": fails, "xla": multiply}, by=3)
    with pytest.warns(RuntimeWarning, match="does not compile"):
        assert jax.jit(run)(X).tolist() == (3 * X).tolist()


def test_a_case_that_is_not_supported_is_passed_over_in_silence(on):
    for device in (H200, ABSENT):
        on(device)
        implementations = {"cudnn": refuses, "triton": multiply, "xla": never}
        assert choose("multiply", None, implementations, X, by=3).tolist() == (3 * X).tolist()
        implementations = {"cudnn": refuses, "triton": refuses, "xla": multiply}
        assert choose("multiply", None, implementations, X, by=3).tolist() == (3 * X).tolist()


def test_only_a_gpu_that_is_here_is_compiled_for(on):
    on(ABSENT)
    with pytest.raises(RuntimeError, match="EXHAUSTED"):
        choose("multiply", None, {"triton": fails, "xla": never}, X, by=3)
    on(CPU)
    result = choose("multiply", None, {"triton": never, "xla": multiply}, X, by=3)
    assert result.tolist() == (3 * X).tolist()


@pytest.mark.parametrize("device", [CPU, H200, ABSENT])
def test_a_request_is_never_replaced(device, on):
    on(device)
    for failing, error in ((fails, RuntimeError), (refuses, NotImplementedError)):
        with pytest.raises(error):
            choose("multiply", "triton", {"triton": failing, "xla": never}, X, by=3)


def attend(dtype=jnp.bfloat16, head_dim=64):
    q = jnp.zeros((1, 8, 2, head_dim), dtype)
    one = jnp.ones((1,), jnp.int32)
    return cudnn.prefill_attention(q, q, q, one, causal=True, scale=1.0)


@pytest.mark.parametrize(
    ("device", "changes", "message"),
    [
        (CPU, {}, "needs a GPU"),
        (ABSENT, {}, "needs a GPU"),
        (H200, {"dtype": jnp.float32}, "16 bits, not float32"),
        (H200, {"head_dim": 20}, "no attention for"),
        (H200, {"head_dim": 136}, "no attention for"),
    ],
)
def test_cudnn_refuses_what_it_does_not_do(device, changes, message, on):
    on(device)
    with pytest.raises(NotImplementedError, match=message):
        attend(**changes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("causal", [True, False])
def test_cudnn_is_told_which_keys_are_there(dtype, causal, on, monkeypatch):
    """The same arguments, for JAX's other implementation."""
    on(H200)
    original = jax.nn.dot_product_attention

    def portable(*args, implementation, **settings):
        assert implementation == "cudnn"
        return original(*args, implementation="xla", **settings)

    monkeypatch.setattr(cudnn.jax.nn, "dot_product_attention", portable)
    q, k, v = draw((3, 33, 4, 64), *[(3, 33, 2, 64)] * 2, dtype=dtype)
    lengths = int32(33, 17, 1)
    settings = {"causal": causal, "scale": 0.125}
    expected = np.asarray(reference.prefill_attention(q, k, v, lengths, **settings))
    there = np.arange(33) < lengths[:, None]
    v = poison(v, there[:, :, None, None])
    out = cudnn.prefill_attention(q, k, v, lengths, **settings)
    assert out.dtype == dtype
    assert_close(np.asarray(out)[there], expected[there], dtype)


@pytest.mark.parametrize("operation", tuning.CONFIGS)
@pytest.mark.parametrize("capability", [80, 90])
def test_block_sizes_are_powers_of_two(operation, capability):
    for dtype in SHAPES["dtype"]:
        for size in (16, 32, 64, 128, 4096, 8192):
            candidates = tuning.candidates(operation, capability, dtype, size)
            assert len(set(candidates)) == len(candidates) >= 1
            for candidate in candidates:
                sizes = {f.name: getattr(candidate, f.name) for f in fields(candidate)}
                assert 1 <= sizes.pop("num_stages", 1) <= 8
                assert sizes.pop("num_warps") in (1, 2, 4, 8, 16)
                # A side of a product on tensor cores is 16 or more.
                assert set(sizes.values()) <= {16, 32, 64, 128, 256}


def test_cases_have_names():
    assert tuning.key(jnp.bfloat16, 128) == tuning.key("bfloat16", 128) == "bfloat16/128"


def test_the_measured_block_sizes_of_a_device_are_used(monkeypatch, on):
    row = {"block_q": 16, "block_k": 32, "num_warps": 2, "num_stages": 5}
    table = {"NVIDIA H200": {"prefill_attention": {"bfloat16/128": row}}}
    monkeypatch.setattr(tuning, "table", lambda: table)
    case = "prefill_attention", jnp.bfloat16, 128

    def default(operation, dtype, size, capability=90):
        return tuning.candidates(operation, capability, dtype, size)[0]

    on(H200)
    assert astuple(tuning.best(*case)) == (16, 32, 2, 5)
    for other in ((case[0], jnp.float16, 128), (*case[:2], 64), ("window_scores", *case[1:])):
        assert tuning.best(*other) == default(*other)
    on(Device("gpu", "NVIDIA A1", 80, present=True))
    assert tuning.best(*case) == default(*case, capability=80)
    on(CPU)  # which interprets the code of the newest
    assert tuning.best(*case) == default(*case)


def test_the_committed_table_fits_the_kernels():
    for operations in tuning.table().values():
        for operation, rows in operations.items():
            names = {f.name for f in fields(tuning.CONFIGS[operation])}
            for case, row in rows.items():
                dtype, size = case.split("/")
                assert tuning.key(dtype, int(size)) == case
                assert row.keys() <= names

"""Sum and norm, every backend against float64."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.add_rms_norm import add_rms_norm, reference
from tests.kernels.cases import assert_close, both_backends, compiled, covering, draw, same_bits

run = compiled(add_rms_norm, "eps", "backend")


@both_backends
@covering("add_rms_norm")
def test_against_the_reference(case, backend):
    dtype, width, rows = case
    x, delta, scale = draw((*rows, width), (*rows, width), (width,), dtype=dtype)
    attend = functools.partial(run, eps=1e-5, backend=backend)
    total, normed = attend(x, delta, scale)
    assert same_bits((total, normed), attend(x, delta, scale))
    expected = reference.add_rms_norm(x, delta, scale, eps=1e-5)
    assert total.dtype == normed.dtype == dtype
    assert same_bits([total], [expected[0]])
    assert_close(normed, expected[1], dtype)


@both_backends
def test_eps_keeps_a_row_of_zeros_finite(backend):
    none, scale = np.zeros((2, 24), np.float32), np.ones(24, np.float32)
    total, normed = run(none, none, scale, eps=1e-5, backend=backend)
    assert (np.asarray(total) == 0).all()
    assert (np.asarray(normed) == 0).all()


@pytest.mark.parametrize("shapes", [((3, 8), (2, 8), (8,)), ((3, 8), (3, 8), (3,))])
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match="expected"):
        add_rms_norm(*map(jnp.zeros, shapes), eps=1e-5)

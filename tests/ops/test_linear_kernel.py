"""The Pallas kernel of linear attention, run by the interpreter, beside the form that XLA compiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.ops.linear_kernel import linear_sums
from fastlm.ops.recurrence import linear_recurrence

STARTS = np.zeros((2, 19), bool)
STARTS[0, [3, 4, 11]] = True  # documents of 3, 1, 7 and 8 tokens; borders inside and between chunks of 4
STARTS[1, 8] = True


@pytest.mark.parametrize("starts", [STARTS, np.zeros((1, 19), bool)], ids=["packed", "one_document"])
def test_sums_states_and_gradients_are_those_of_the_recurrence(starts):
    keys = jax.random.split(jax.random.key(0), 6)
    q, k = (jax.random.normal(key, (2, 3, 19, 5)) for key in keys[:2])
    v, state = jax.random.normal(keys[2], (2, 3, 19, 6)), jax.random.normal(keys[3], (2, 3, 5, 6))
    weights = jax.random.normal(keys[4], v.shape), jax.random.normal(keys[5], state.shape)

    def total(run, *arrays):
        y, last = run(*arrays)
        return jnp.sum(y * weights[0]) + jnp.sum(last * weights[1]), (y, last)

    kernel = lambda q, k, v, state: linear_sums(q, k, v, jnp.asarray(starts), state, chunk=4, interpret=True)
    plain = lambda q, k, v, state: linear_recurrence(q, k, v, jnp.zeros((1, 1, 19)), jnp.asarray(starts), state)
    got, expected = (
        jax.jit(jax.value_and_grad(lambda *a, run=run: total(run, *a), (0, 1, 2, 3), has_aux=True))(q, k, v, state)
        for run in (kernel, plain)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5)

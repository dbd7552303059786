"""Top-k by blocks is top-k, ties and all."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastlm.decoding.likeliest import top_k_by_blocks

ROWS, BLOCKS = 2, 6
by_blocks = jax.jit(top_k_by_blocks, static_argnums=1)


@given(st.integers(0, 2**31), st.integers(1, 400), st.sampled_from([1, 3, 5, 8]))
def test_the_same_as_a_stable_sort(seed, distinct, count):
    x = np.random.default_rng(seed).integers(0, distinct, (ROWS, BLOCKS * 128)).astype(np.float32)
    values, places = by_blocks(jnp.asarray(x), count)
    expected = np.argsort(-x, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(places, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(x, expected, axis=1))

"""What linear attention has beside the contract that all kinds share: its features in few digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.models.attention.linear import features, kernel_sums
from fastlm.ops.masks import MaskSpec


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_features_of_very_negative_numbers_keep_their_digits(dtype):
    x = jnp.array([-16.0, -7.0, -4.0, -1.0, 0.0, 2.0], dtype)
    expected = np.where(np.asarray(x, np.float64) > 0, np.asarray(x, np.float64) + 1, np.exp(np.asarray(x, np.float64)))
    np.testing.assert_allclose(np.asarray(jax.jit(features)(x), np.float64), expected, rtol=1e-2)


@pytest.mark.parametrize("causal", [True, False])
def test_sums_that_float16_could_not_hold(causal):
    """300 tokens of features near 400 add up to more than 65,504."""
    q = k = features(jnp.full((1, 1, 300, 2), 400, jnp.float16))
    y, _ = kernel_sums(q, k, jnp.ones((1, 1, 300, 1), q.dtype), MaskSpec(causal), None)
    count = np.arange(1, 301) if causal else np.full(300, 300)
    np.testing.assert_allclose(y[0, 0, :, 0], 2 * 401.0**2 * count, rtol=1e-3)

"""Divergences: zero where both agree, never negative, with the limits that their papers give them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.ops import divergences

EVERY = {
    "forward_kl": divergences.forward_kl,
    "reverse_kl": divergences.reverse_kl,
    "symmetric_kl": divergences.symmetric_kl,
    "jensen_shannon": divergences.jensen_shannon,
    "skew_kl": divergences.skew_kl,
    "skew_reverse_kl": divergences.skew_reverse_kl,
}


def pair(seed=0, size=7, scale=2.0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return tuple(jax.nn.log_softmax(scale * jax.random.normal(key, (3, size))) for key in keys)


@given(name=st.sampled_from(sorted(EVERY)), seed=st.integers(0, 1000), scale=st.floats(0.01, 30))
def test_never_negative_and_zero_for_the_same(name, seed, scale):
    p, q = pair(seed, scale=scale)
    assert float(jnp.min(EVERY[name](p, q))) > -1e-5
    np.testing.assert_allclose(EVERY[name](p, p), 0, atol=1e-6)


def test_kl_by_its_definition():
    p, q = pair()
    expected = np.sum(np.exp(p) * (np.asarray(p) - np.asarray(q)), axis=-1)
    np.testing.assert_allclose(divergences.forward_kl(p, q), expected, rtol=1e-5)
    np.testing.assert_allclose(divergences.reverse_kl(p, q), divergences.forward_kl(q, p), rtol=1e-6)
    half = (divergences.forward_kl(p, q) + divergences.reverse_kl(p, q)) / 2
    np.testing.assert_allclose(divergences.symmetric_kl(p, q), half, rtol=1e-6)


def test_jensen_shannon_goes_to_both_kls():
    """GKD: divided by beta it goes to forward KL as beta goes to 0, by 1 - beta to reverse KL as beta goes to 1."""
    p, q = pair(scale=0.5)
    small = 1e-3
    np.testing.assert_allclose(divergences.jensen_shannon(p, q, small) / small, divergences.forward_kl(p, q), rtol=0.02)
    np.testing.assert_allclose(
        divergences.jensen_shannon(p, q, 1 - small) / small, divergences.reverse_kl(p, q), rtol=0.02
    )
    np.testing.assert_array_equal(divergences.jensen_shannon(p, q, 0.0), divergences.forward_kl(p, q))
    np.testing.assert_array_equal(divergences.jensen_shannon(p, q, 1.0), divergences.reverse_kl(p, q))
    m = np.log((np.exp(p) + np.exp(q)) / 2)
    middle = 0.5 * divergences.forward_kl(p, m) + 0.5 * divergences.forward_kl(q, m)
    np.testing.assert_allclose(divergences.jensen_shannon(p, q, 0.5), middle, rtol=1e-4)


def test_skew_goes_to_kl_and_is_bounded():
    p, q = pair()
    np.testing.assert_allclose(divergences.skew_kl(p, q, 0.0), divergences.forward_kl(p, q), rtol=1e-5)
    np.testing.assert_allclose(divergences.skew_reverse_kl(p, q, 0.0), divergences.reverse_kl(p, q), rtol=1e-5)
    apart = jax.nn.log_softmax(jnp.array([[100.0, 0.0]])), jax.nn.log_softmax(jnp.array([[0.0, 100.0]]))
    assert float(divergences.skew_kl(*apart, 0.1)[0]) == pytest.approx(-np.log(0.1), rel=1e-4)


@pytest.mark.parametrize("name", sorted(EVERY))
def test_gradients_are_finite_where_something_cannot_be(name):
    """Places that both sides exclude (answers outside of a context) have logits of -1e9."""
    logits = jnp.array([[1.0, 0.5, -1e9, -1e9]])
    teacher = jax.nn.log_softmax(jnp.array([[0.0, 2.0, -1e9, -1e9]]))
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(EVERY[name](teacher, jax.nn.log_softmax(x))))(logits)
    assert float(value) > 0
    assert np.all(np.isfinite(gradient))
    np.testing.assert_allclose(gradient[0, 2:], 0, atol=1e-6)

"""Weights that make up for others: the least squares that a slow solver finds, and never worse than zeros alone."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.compress import importance, surgeon
from fastlm.compress.evidence import Evidence

INPUTS, OUTPUTS = 10, 6
KEYS = jax.random.split(jax.random.key(0), 3)
W = jax.random.normal(KEYS[0], (INPUTS, OUTPUTS))
X = jax.random.normal(KEYS[1], (50, INPUTS)) @ jax.random.normal(KEYS[2], (INPUTS, INPUTS))
PRODUCTS = X.T @ X / 50


def test_it_is_the_least_squares_of_each_output():
    mask = np.asarray(jax.random.uniform(jax.random.key(3), (INPUTS, OUTPUTS)) < 0.6)
    found = np.asarray(surgeon.update(W, PRODUCTS, jnp.asarray(mask)))
    h = np.asarray(surgeon.damped(PRODUCTS), np.float64)
    for output in range(OUTPUTS):
        kept = np.flatnonzero(mask[:, output])
        exact = np.linalg.solve(h[np.ix_(kept, kept)], h[kept] @ np.asarray(W[:, output], np.float64))
        np.testing.assert_allclose(found[kept, output], exact, atol=2e-3)
    assert not found[~mask].any()


@given(st.integers(0, 10**6), st.floats(0, 1), st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_it_never_makes_outputs_worse(seed, share, turns):
    mask = jax.random.uniform(jax.random.key(seed), (INPUTS, OUTPUTS)) < share
    error = lambda w: float(jnp.einsum("io,ij,jo->", w - W, surgeon.damped(PRODUCTS), w - W))
    found = surgeon.update(W, PRODUCTS, mask, turns)
    assert error(found) <= error(jnp.where(mask, W, 0)) * (1 + 1e-4) + 1e-4
    assert not np.asarray(found)[~np.asarray(mask)].any()


def test_nothing_gone_is_nothing_changed():
    np.testing.assert_array_equal(surgeon.update(W, PRODUCTS, jnp.ones_like(W, bool)), W)
    # Inputs that have nothing to do with each other cannot make up for each other.
    mask = jnp.abs(W) > 0.5
    np.testing.assert_allclose(surgeon.update(W, jnp.eye(INPUTS), mask), jnp.where(mask, W, 0), atol=1e-6)


def test_the_score_is_what_is_lost_when_the_others_make_up():
    scores = importance.scores("surgeon", {"w": W}, {"w": Evidence(products=PRODUCTS)}, KEYS[0])["w"]
    h = surgeon.damped(PRODUCTS)
    for place in [(0, 0), (4, 3)]:
        found = surgeon.update(W, PRODUCTS, jnp.ones_like(W, bool).at[place].set(False))
        lost = jnp.einsum("io,ij,jo->", found - W, h, found - W)
        np.testing.assert_allclose(scores[place], lost, rtol=0.02)

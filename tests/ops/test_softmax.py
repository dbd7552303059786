"""Exchangeable softmaxes: their bounds, their gradients, their names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastlm.errors import UserError
from fastlm.ops import softmax

SCORES = hnp.arrays(np.float32, (3, 17), elements=st.floats(-30, 30, width=32))
HIDDEN = -1e30


def exact(scores):
    """In float64."""
    e = np.exp(scores.astype(np.float64) - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@given(SCORES, st.sampled_from(list(softmax.EXP2)))
def test_exp2_keeps_its_relative_error(scores, degree):
    got = np.asarray(softmax.Exp2(degree)(jnp.asarray(scores)), np.float64)
    want = exact(scores)
    # Twice the polynomial's error, and what float32 makes of an exponent of up to 87 in size.
    assert (np.abs(got - want) <= want * (2 * softmax.EXP2_ERROR[degree] + 2e-5) + 1e-30).all()
    np.testing.assert_allclose(got.sum(-1), 1, atol=1e-5)


def test_exp2_is_right_at_the_ends_of_its_range():
    x = jnp.array([0.0, -0.5, -0.4999, -1.0, -125.9, -126.0, -1e30])
    got = softmax.exp2(x, 5)
    np.testing.assert_allclose(got[:6], 2.0 ** np.array(x[:6], np.float64), rtol=1e-6)
    assert got[6] == got[5]


@given(SCORES, st.integers(1, 20))
def test_top_k_is_the_softmax_of_the_k_largest(scores, k):
    got = np.asarray(softmax.TopK(k)(jnp.asarray(scores)))
    smallest = np.sort(scores, -1)[:, -min(k, 17)][:, None]
    np.testing.assert_allclose(got, exact(np.where(scores >= smallest, scores, -np.inf)), atol=1e-6)


@given(SCORES, st.sampled_from([0.3, 1e-2, 1e-4]))
def test_threshold_never_loses_more_than_its_mass(scores, mass):
    for chosen in (softmax.Threshold(mass), softmax.calibrated(jnp.asarray(scores), mass)):
        got = np.asarray(chosen(jnp.asarray(scores)))
        lost = np.where(got > 0, 0, exact(scores)).sum(-1)
        assert (lost <= mass + 1e-6).all()
        np.testing.assert_allclose(got.sum(-1), 1, atol=1e-5)


def test_a_calibrated_threshold_is_sharper_than_the_bound_for_any_input():
    scores = jax.random.normal(jax.random.key(0), (50, 400)) * 3
    found = softmax.calibrated(scores, 1e-2)
    assert found.margin < 0.8 * np.log(400 / 1e-2)
    kept = lambda one: float(jnp.mean(one(scores) > 0))
    assert kept(found) < 0.8 * kept(softmax.Threshold(1e-2))


@pytest.mark.parametrize("spec", ["exact", "exp2", "exp2(degree=5)", "top_k(k=3)", "threshold(mass=0.1)"])
def test_gradients_are_those_of_the_softmax_at_the_same_probabilities(spec):
    one, scores = softmax.make(spec), jax.random.normal(jax.random.key(1), (4, 9)) * 2
    g = jax.random.normal(jax.random.key(2), (4, 9))
    p, back = jax.vjp(one, scores)
    np.testing.assert_allclose(back(g)[0], p * (g - jnp.sum(p * g, -1, keepdims=True)), atol=1e-6)


@pytest.mark.parametrize("spec", ["exact", "exp2", "top_k(k=3)", "threshold(mass=0.1)"])
def test_hidden_scores_get_nothing_and_rows_without_any_stay_finite(spec):
    scores = jnp.array([[1.0, HIDDEN, 2.0, HIDDEN, 0.5], [HIDDEN] * 5])
    p = softmax.make(spec)(scores)
    assert float(p[0, 1] + p[0, 3]) < 1e-30
    assert np.isfinite(p).all()
    by_column = softmax.make(spec)(scores.T, axis=0)
    np.testing.assert_allclose(by_column.T, p, atol=1e-7)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exakt", "did you mean 'exact'"),
        ("top_k(n=3)", "top_k.n: no such key"),
        ("top_k(k=0)", "k must be at least 1"),
        ("top_k(k='a')", "expected int"),
        ("exp2(degree=9)", "degree must be one of 3, 4, 5"),
        ("threshold(mass=2)", "mass must lie between 0 and 1"),
        ("top_k(3)", "write NAME or NAME"),
        ("top k", "write NAME or NAME"),
    ],
)
def test_what_is_misspelt_is_named(spec, message):
    with pytest.raises(UserError, match="config.model.softmax") as caught:
        softmax.make(spec)
    assert message in str(caught.value)

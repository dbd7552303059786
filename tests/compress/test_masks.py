"""Masks: exact counts under every allocation, whatever is equal and whichever share is asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.compress import masks
from fastlm.errors import UserError

SHAPES = {"a": (12, 8), "b": (8, 20), "c": (4, 4)}
share = st.floats(0, 1, width=32)


def drawn(seed, tied=False):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    scores = {path: jax.random.normal(key, SHAPES[path]) for path, key in zip(SHAPES, keys)}
    return {path: jnp.round(score) if tied else score for path, score in scores.items()}


@given(st.integers(0, 9), st.booleans(), share)
def test_counts_are_exact(seed, tied, sparsity):
    scores = drawn(seed, tied)
    for mask in masks.by_matrix(scores, sparsity).values():
        assert int(mask.sum()) == mask.size - round(float(np.float32(sparsity)) * mask.size)
    everything = masks.over_all(scores, sparsity)
    size = sum(mask.size for mask in everything.values())
    assert sum(int(mask.sum()) for mask in everything.values()) == size - round(float(np.float32(sparsity)) * size)
    for path, mask in masks.by_output(scores, sparsity).items():
        inputs = SHAPES[path][0]
        assert set(np.asarray(mask.sum(axis=0)).tolist()) == {inputs - round(float(np.float32(sparsity)) * inputs)}
    some = masks.erdos_renyi(scores, sparsity)
    assert abs(sum(int(mask.sum()) for mask in some.values()) - (1 - sparsity) * size) <= len(SHAPES)


@given(st.integers(0, 9), share)
def test_what_stays_is_no_less_than_what_goes(seed, sparsity):
    scores = drawn(seed)
    worst = lambda score, mask: jnp.where(mask, score, jnp.inf).min()
    best = lambda score, mask: jnp.where(mask, -jnp.inf, score).max()
    for path, mask in masks.by_matrix(scores, sparsity).items():
        assert worst(scores[path], mask) >= best(scores[path], mask)
    everything = masks.over_all(scores, sparsity)
    assert min(worst(scores[p], m) for p, m in everything.items()) >= max(
        best(scores[p], m) for p, m in everything.items()
    )


def test_the_small_matrix_keeps_more_of_itself():
    found = masks.erdos_renyi(drawn(0), 0.6)
    kept = {path: float(mask.mean()) for path, mask in found.items()}
    assert kept["c"] > kept["a"] > kept["b"]
    raw = {path: sum(shape) / np.prod(shape) for path, shape in SHAPES.items()}
    assert kept["a"] / kept["b"] == pytest.approx(raw["a"] / raw["b"], rel=0.05)


@pytest.mark.parametrize("text", ["2:4", "1:3"])
def test_n_of_each_m_inputs(text):
    n, m = map(int, text.split(":"))
    scores = drawn(3)
    for path, mask in masks.allocation(text, "here")(scores, 0.0).items():
        whole = mask.shape[0] // m * m
        groups = np.asarray(mask[:whole]).T.reshape(mask.shape[1], -1, m)
        assert (groups.sum(axis=-1) == n).all() and mask[whole:].all()
        score = np.asarray(scores[path][:whole]).T.reshape(groups.shape)
        assert (np.where(groups, score, np.inf).min(-1) >= np.where(groups, -np.inf, score).max(-1)).all()


def test_how_many_may_depend_on_the_step():
    run = jax.jit(lambda sparsity: {name: one(drawn(0), sparsity) for name, one in masks.ALLOCATIONS.items()})
    for sparsity in (0.0, 0.3, 1.0):
        for name, found in run(sparsity).items():
            want = masks.ALLOCATIONS[name](drawn(0), sparsity)
            jax.tree.map(np.testing.assert_array_equal, found, want)
    assert float(masks.sparsity(found)) == 1.0


@pytest.mark.parametrize(("name", "message"), [("4:4", "keeps 4 of each 4"), ("matrx", "did you mean 'matrix'")])
def test_what_is_none(name, message):
    with pytest.raises(UserError, match=message):
        masks.allocation(name, "here")

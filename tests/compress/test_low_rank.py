"""Thin matrices: the nearest in the sense of each method, exact at full rank; ranks within their budget."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.compress import low_rank
from fastlm.compress.evidence import Evidence
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig
from fastlm.ops import paths
from fastlm.ops.contract import dense

INPUTS, OUTPUTS = 12, 8
KEYS = jax.random.split(jax.random.key(0), 4)
W = jax.random.normal(KEYS[0], (INPUTS, OUTPUTS))
X = (
    jax.random.normal(KEYS[1], (200, INPUTS))
    @ jnp.diag(jnp.linspace(0.1, 3, INPUTS))
    @ jax.random.normal(KEYS[2], (INPUTS, INPUTS))
)
G = jax.random.normal(KEYS[3], (200, OUTPUTS)) * jnp.linspace(0.01, 2, OUTPUTS)
SEEN = Evidence(inputs=jnp.mean(X**2, 0), products=X.T @ X / 200, outputs=G.T @ G)


@pytest.mark.parametrize("name", low_rank.METHODS)
def test_full_rank_is_the_matrix(name):
    full, s = low_rank.factors(W, SEEN, name)
    np.testing.assert_allclose(dense(full), W, atol=1e-4)
    assert full.a.shape == (INPUTS, OUTPUTS) and full.b.shape == (OUTPUTS, OUTPUTS) and np.all(np.diff(s) <= 0)


def test_each_is_the_nearest_in_its_own_sense():
    """And what is lost is the squares of the singular values that are gone."""
    errors = {
        "svd": lambda gap: np.square(gap).sum(),
        "scaled": lambda gap: np.square(np.sqrt(SEEN.inputs)[:, None] * gap).sum(),
        "whitened": lambda gap: np.square(X @ gap).sum() / 200,
        "fisher": lambda gap: np.square((X @ gap) @ G.T).sum() / 200,
    }
    for rank in (2, 5):
        gaps = {}
        for name in errors:
            full, s = low_rank.factors(W, SEEN, name)
            gaps[name] = np.asarray(dense(low_rank.cut(full, rank)) - W, np.float64)
            np.testing.assert_allclose(errors[name](gaps[name]), np.square(s[rank:]).sum(), rtol=2e-3)
        for name, error in errors.items():
            assert all(error(gaps[name]) <= error(gap) * 1.0001 for gap in gaps.values())


def test_inputs_that_never_occur_are_no_trouble():
    seen = Evidence(products=SEEN.products.at[3].set(0).at[:, 3].set(0))
    full, _ = low_rank.factors(W, seen, "whitened")
    assert np.isfinite(dense(low_rank.cut(full, 4))).all()


SIDES = {"a": (16, 16), "b": (16, 64), "c": (64, 16)}
SPECTRA = {path: np.linspace(4, 1, 16) ** power for (path, _), power in zip(SIDES.items(), (1, 2, 4))}


@given(st.floats(0.05, 1.0), st.sampled_from(list(low_rank.ALLOCATIONS)), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_ranks_stay_within_their_budget(share, allocation, multiple):
    total = sum(i * o for i, o in SIDES.values())
    try:
        found = low_rank.ranks(SPECTRA, SIDES, share, allocation, multiple)
    except UserError:
        assert share * total < multiple * sum(i + o for i, o in SIDES.values())
        return
    cost = sum(found[path] * (i + o) if path in found else i * o for path, (i, o) in SIDES.items())
    lowest = sum(multiple * (i + o) for i, o in SIDES.values())
    raised = lowest if allocation == "uniform" else 0  # matrices whose share is less than a multiple have one
    assert cost <= max(share * total, lowest) + raised + 1e-6
    for path, rank in found.items():
        i, o = SIDES[path]
        assert rank % multiple == 0 and 0 < rank * (i + o) <= low_rank.WORTH * i * o


def test_ranks_go_where_they_are_worth_most():
    found = low_rank.ranks(SPECTRA, SIDES, 0.5, "size")
    assert "c" not in found or found["c"] > found["b"]
    alike = low_rank.ranks(SPECTRA, SIDES, 0.5, "uniform")
    assert alike == {"a": 4, "b": 6, "c": 6}
    with pytest.raises(UserError, match=r"--share: 0.01 of 2,304 numbers.*at least 0.084"):
        low_rank.ranks(SPECTRA, SIDES, 0.01, "size")


def test_a_model_with_factors_in_it():
    cfg = ModelConfig(vocab_size=20, width=16, layers=1, heads=2, max_length=8)
    params = Model(cfg).init(jax.random.key(0))
    matrices = [path for path, leaf in paths.flatten(params).items() if path.startswith("layers") and leaf.ndim == 2]
    full = {path: low_rank.factors(paths.flatten(params)[path], Evidence(), "svd")[0] for path in matrices}
    tokens = jnp.arange(8)[None]
    before = Model(cfg).apply(params, tokens)[0]
    small, factors = low_rank.with_ranks(cfg, params, full, dict.fromkeys(matrices, 16))
    np.testing.assert_allclose(Model(small).apply(factors, tokens)[0], before, atol=1e-5)
    assert len(small.formats) == len(matrices)
    fewer, factors = low_rank.with_ranks(cfg, params, full, {"layers/0/feed_forward/up": 3})
    assert fewer.formats == (("layers/0/feed_forward/up", "low_rank(rank=3)"),)
    assert not np.allclose(Model(fewer).apply(factors, tokens)[0], before, atol=1e-4)

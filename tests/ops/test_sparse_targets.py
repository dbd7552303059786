"""Sparse targets: unbiased where they say so, biased where they say so, and a loss that equals the dense one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding, PartitionSpec

from fastlm.errors import UserError
from fastlm.ops import sparse_targets
from fastlm.ops.sparse_cross_entropy import sparse_cross_entropy, sparse_cross_entropy_and_gradient
from fastlm.ops.sparse_targets import Sampled, TopK
from fastlm.parallel import mesh as meshes

LOGITS = hnp.arrays(np.float32, (3, 13), elements=st.floats(-12, 12, width=32))
WEIGHTS = hnp.arrays(np.float32, (3, 5), elements=st.floats(0, 2, width=32))
IDS = hnp.arrays(np.int32, (3, 5), elements=st.integers(0, 12))


def softmax(logits):
    logits = np.asarray(logits, np.float64)
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def dense(ids, weights, vocab):
    """[..., K] twice -> [..., V]: the weight of every token."""
    ids, weights = np.asarray(ids), np.asarray(weights, np.float64)
    full = np.zeros((*ids.shape[:-1], vocab))
    np.add.at(full, (*np.indices(ids.shape)[:-1], ids), weights)
    return full


@functools.partial(jax.jit, static_argnums=(2, 3))
def sampled(logits, seed, draws, exponent=1.0):
    return sparse_targets.sampled(logits, jax.random.key(seed), draws, exponent)


# --- sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [1.0, 0.5, 1.7])
@pytest.mark.parametrize("draws", [1, 3, 8])
def test_the_expectation_over_all_random_numbers_is_the_distribution(draws, exponent):
    """A grid of random numbers fine enough to be an integral: 2^14 for each draw."""
    logits = jnp.log(jnp.array([0.5, 0.25, 0.0, 0.125, 0.0625, 0.0625]))
    grid = (jnp.arange(1 << 14) + 0.5) / (1 << 14)
    uniforms = jnp.repeat(grid[:, None], draws, axis=1)  # expectation is linear: draws need not vary separately
    ids, weights = jax.jit(Sampled(draws, exponent).choose)(jnp.broadcast_to(logits, (len(grid), 6)), uniforms)
    np.testing.assert_allclose(dense(ids, weights, 6).mean(0), softmax(logits), atol=2 / (1 << 14))


@pytest.mark.parametrize(("exponent", "vocab"), [(1.0, 40), (0.6, 40), (1.0, 3000)])
def test_the_mean_of_many_samples_is_the_distribution(exponent, vocab):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=vocab) * 2.5, jnp.float32)
    many = 4000
    ids, weights = sampled(jnp.broadcast_to(logits, (many, vocab)), 1, 10, exponent)
    drawn = dense(ids, weights, vocab)
    p = softmax(logits)
    z = (drawn.mean(0) - p) / np.maximum(drawn.std(0) / np.sqrt(many), 1e-4)
    assert np.abs(z).max() < 5 and z.std() < 1.2
    if exponent == 1:
        assert drawn.var(0).sum() < 0.95 * (p * (1 - p)).sum() / 10  # that of independent draws


@given(LOGITS, st.sampled_from([1, 6, 20]), st.integers(0, 2**31))
def test_counts_are_within_two_of_their_expectation(logits, draws, seed):
    ids, weights = sampled(logits, seed, draws)
    assert ids.shape == weights.shape == (3, min(draws, 13))
    counts = np.asarray(weights) * draws
    np.testing.assert_allclose(counts, np.rint(counts), atol=1e-4)
    np.testing.assert_allclose(counts.sum(-1), draws, rtol=1e-5)
    assert (np.abs(dense(ids, counts, 13) - draws * softmax(logits)) < 2 + 1e-3).all()
    for row, count in zip(np.asarray(ids), counts):
        used = row[count > 0]
        assert (np.diff(used) > 0).all() and (count[: len(used)] > 0).all() and not row[len(used) :].any()


def test_tokens_without_probability_are_never_drawn():
    logits = np.full((20, 601), -np.inf, np.float32)
    logits[:, 1:-1:2] = np.random.default_rng(0).normal(size=(20, 300)) * 4
    ids, weights = sampled(logits, 0, 100)
    assert (np.asarray(ids) % 2 == 1)[np.asarray(weights) > 0].all()
    last = jax.jit(Sampled(4).choose)(logits[:1], jnp.full((1, 4), 1 - 2.0**-24))
    assert (np.asarray(last[0]) % 2 == 1)[np.asarray(last[1]) > 0].all()


def test_a_sure_teacher_takes_one_slot():
    ids, weights = sampled(jnp.array([0.0, 90.0, 0.0]), 0, 50)
    assert ids.tolist() == [1, 0, 0] and weights.tolist() == [1, 0, 0]


def test_random_numbers_follow_rows_and_not_batches():
    method = Sampled(7)
    together = sparse_targets.row_uniforms(method, 3, jnp.array([4, 9, 5]), 6)
    alone = sparse_targets.row_uniforms(method, 3, jnp.array([9]), 6)
    assert together.shape == (3, 6, 7)
    np.testing.assert_array_equal(together[1], alone[0])
    assert not np.array_equal(alone, sparse_targets.row_uniforms(method, 4, jnp.array([9]), 6))
    assert sparse_targets.row_uniforms(TopK(5), 3, jnp.array([9]), 6).shape == (1, 6, 0)


def test_rows_on_several_devices_are_drawn_where_they_are():
    method, logits = Sampled(12), jax.random.normal(jax.random.key(0), (8, 5, 67)) * 3
    choose = jax.jit(lambda logits, rows: method.choose(logits, sparse_targets.row_uniforms(method, 1, rows, 5)))
    alone = choose(logits, jnp.arange(8))
    mesh = meshes.make()
    jax.set_mesh(mesh)
    cut = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    compiled = choose.lower(cut(logits), cut(jnp.arange(8))).compile()
    for whole, part in zip(alone, compiled(cut(logits), cut(jnp.arange(8)))):
        np.testing.assert_array_equal(whole, part)
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-reduce", "collective"))


# --- the k likeliest -----------------------------------------------------------------------------


@given(LOGITS, st.integers(1, 20))
def test_top_k_keeps_probabilities_and_loses_the_tail(logits, k):
    ids, weights = sparse_targets.top_k(jnp.asarray(logits), k)
    p = np.sort(softmax(logits), -1)[:, ::-1][:, :k]
    np.testing.assert_allclose(weights, p, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(np.take_along_axis(softmax(logits), np.asarray(ids), -1), p, rtol=1e-4, atol=1e-7)


def test_top_k_pulls_a_perfect_student_away_and_samples_do_not():
    """The mean gradient at student = teacher, which is zero for the whole distribution."""
    logits = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (100,)), (2000, 100))
    mean = jax.jit(lambda ids, weights: jnp.mean(sparse_cross_entropy_and_gradient(logits, ids, weights)[1], axis=0))
    biased = mean(*sparse_targets.top_k(logits, 10))
    unbiased = mean(*sampled(logits, 2, 10))
    assert jnp.sum(jnp.abs(biased)) > 5 * jnp.sum(jnp.abs(unbiased))


# --- what else is kept ---------------------------------------------------------------------------


@given(LOGITS, hnp.arrays(np.int32, (3,), elements=st.integers(0, 12)))
def test_statistics_of_the_whole_distribution(logits, tokens):
    kept = TopK(2)(jnp.asarray(logits), jnp.zeros((3, 0)), jnp.asarray(tokens))
    p = softmax(logits)
    np.testing.assert_allclose(kept.entropy, -(p * np.log(p)).sum(-1), atol=1e-5)
    np.testing.assert_array_equal(kept.best, logits.argmax(-1))
    np.testing.assert_allclose(kept.log_probability, np.log(p[np.arange(3), tokens]), rtol=1e-5, atol=1e-5)


def test_statistics_where_some_tokens_are_impossible():
    kept = Sampled(4)(jnp.array([[0.0, -jnp.inf, 0.0]]), jnp.full((1, 4), 0.5), jnp.array([1]))
    assert kept.entropy[0] == pytest.approx(np.log(2)) and kept.log_probability[0] == -jnp.inf


def test_cross_entropy_of_samples_less_entropy_is_the_divergence():
    rng = np.random.default_rng(3)
    teacher, student = (jnp.asarray(rng.normal(size=(1, 30)) * 2, jnp.float32) for _ in range(2))
    p, q = softmax(teacher), softmax(student)
    many = lambda x: jnp.broadcast_to(x, (4000, 30))
    uniforms = jax.random.uniform(jax.random.key(0), (4000, 10))
    kept = jax.jit(Sampled(10).__call__)(many(teacher), uniforms, jnp.zeros(4000, jnp.int32))
    found = np.asarray(sparse_cross_entropy(many(student), kept.ids, kept.weights) - kept.entropy)
    assert abs(found.mean() - (p * np.log(p / q)).sum()) < 5 * found.std() / np.sqrt(4000)


# --- the loss ------------------------------------------------------------------------------------


@given(LOGITS, IDS, WEIGHTS)
def test_loss_and_gradient_equal_the_dense_ones(logits, ids, weights):
    logits, aim = jnp.asarray(logits), jnp.asarray(dense(ids, weights, 13), jnp.float32)
    per_row = jnp.array([1.0, -2.0, 0.5])
    sparse = lambda x: jnp.sum(per_row * sparse_cross_entropy(x, jnp.asarray(ids), jnp.asarray(weights)))
    whole = lambda x: -jnp.sum(per_row * jnp.sum(aim * jax.nn.log_softmax(x), -1))
    (value, gradient), (expected, expected_gradient) = (jax.value_and_grad(f)(logits) for f in (sparse, whole))
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradient, expected_gradient, atol=2e-5)
    p, total = softmax(logits), weights.sum(-1, keepdims=True, dtype=np.float64)
    found = sparse_cross_entropy_and_gradient(logits, jnp.asarray(ids), jnp.asarray(weights))[1]
    np.testing.assert_allclose(found, total * p - np.asarray(aim), atol=2e-5)


def test_empty_slots_do_not_look_at_token_0():
    logits = jnp.array([[-jnp.inf, 1.0, 2.0]])
    ids, weights = jnp.array([[2, 0]]), jnp.array([[1.0, 0.0]])
    value, gradient = jax.value_and_grad(lambda x: sparse_cross_entropy(x, ids, weights)[0])(logits)
    assert value == pytest.approx(np.log1p(np.exp(-1.0))) and np.isfinite(gradient).all()


def test_half_precision_logits_give_a_wide_loss_and_a_gradient_of_their_own_type():
    logits = jnp.arange(8, dtype=jnp.bfloat16)[None]
    ids, weights = jnp.array([[3]]), jnp.array([[0.5]])
    value, gradient = jax.value_and_grad(lambda x: sparse_cross_entropy(x, ids, weights)[0])(logits)
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16


# --- names ---------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(st.one_of(st.builds(Sampled, st.integers(1, 99), st.floats(0.1, 2)), st.builds(TopK, st.integers(1, 99))))
def test_a_method_is_made_again_from_its_description(method):
    assert sparse_targets.make(sparse_targets.describe(method)) == method


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sampeld(draws=3)", "unknown method 'sampeld'; did you mean 'sampled'"),
        ("sampled(draw=3)", "no such key; did you mean 'draws'"),
        ("sampled(draws=0)", "draws must lie between 1 and 4096, got 0"),
        ("sampled(proposal_exponent=0.0)", "proposal_exponent must be positive"),
        ("top_k(k=0)", "k must lie between 1 and 4096"),
        ("top_k(", "is no name with options"),
    ],
)
def test_a_method_that_cannot_be_is_refused(spec, message):
    with pytest.raises(UserError, match=message) as raised:
        sparse_targets.make(spec)
    assert "\n" not in str(raised.value)

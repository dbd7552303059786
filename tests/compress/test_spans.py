"""Terms of spans: divergences by law, sums by span, and vocabularies brought to the tokens they share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.compress import spans
from fastlm.compress.mixture import DIVERGENCES
from fastlm.compress.spans import Bins, SharedTokens, SpanLikelihood
from fastlm.data import sources, tokenizers
from fastlm.data.retokenized import Retokenizer
from fastlm.errors import UserError
from fastlm.ops import divergences
from tests.data.pieces import Pieces, packed

NATS = st.floats(0.0, 60.0, width=32)


@given(NATS, NATS, st.sampled_from([1.0, 3.0, 100.0]), st.sampled_from(sorted(DIVERGENCES)))
@settings(deadline=None, max_examples=60)
def test_a_span_is_never_nearer_than_itself(teacher, student, temperature, name):
    term = SpanLikelihood(divergence=name)
    both = jnp.array([teacher, student]), jnp.array([student, student])
    value, gradient = jax.value_and_grad(lambda s: jnp.sum(term(both[0], s, temperature)))(both[1])
    apart, same = term(*both, temperature)
    rounding = 1e-6 * temperature  # of logarithms near 0
    assert apart >= -rounding and abs(same) < rounding
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert abs(gradient[1]) < 1e-4, "no pull where both agree"


def test_one_span_is_a_coin_and_at_high_temperatures_two_surprisals():
    u, v = jnp.array([0.5, 3.0, 20.0]), jnp.array([1.5, 2.0, 5.0])
    p, q = np.exp(-np.asarray(u, np.float64)), np.exp(-np.asarray(v, np.float64))
    coin = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    np.testing.assert_allclose(SpanLikelihood()(u, v, 1.0), coin, rtol=1e-5)
    np.testing.assert_allclose(SpanLikelihood()(u, v, 1e4), u * np.log(u / v) - u + v, rtol=2e-2)


@given(st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=3), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_sums_by_span_are_those_of_its_tokens(steps, seed):
    numbers = np.cumsum(np.array(steps) == 1, axis=1) * (np.array(steps) < 2)  # rising, with holes
    values = np.random.default_rng(seed).normal(size=numbers.shape).astype(np.float32)
    found = spans.totals(jnp.asarray(values), jnp.asarray(numbers), 6)
    places = spans.beginnings(jnp.asarray(numbers), 6)
    assert found.shape == places.shape == (len(steps), 7)
    assert not found[:, 0].any()
    for row, number in np.ndindex(len(steps), 6):
        here = numbers[row] == number + 1
        np.testing.assert_allclose(found[row, number + 1], values[row][here].sum(), atol=1e-5)
        if here.any():
            assert places[row, number + 1] == np.flatnonzero(here)[0]


def test_a_span_begins_where_its_number_is_new():
    numbers = jnp.array([[1, 1, 2, 0, 3, 3], [0, 0, 1, 2, 2, 0]])
    assert spans.begins(numbers).tolist() == [[1, 0, 1, 0, 1, 0], [0, 0, 1, 1, 0, 0]]


def test_tokens_count_as_the_longest_that_both_have():
    fine, coarse = Pieces("in", "ter"), Pieces("in", "ter", "inter", "int", bos=False)
    bins = spans.bins_of(fine, coarse, fine.vocab_size + 2, coarse.vocab_size)
    numbers, others = np.asarray(bins.student), np.asarray(bins.teacher)
    assert bins.count == 256 + 2 + 1 and sorted(numbers[numbers >= 0]) == list(range(bins.count))
    for piece, as_what in (("in", "in"), ("ter", "ter"), ("inter", "in"), ("int", "in"), ("t", "t")):
        assert others[coarse.numbers[piece.encode()]] == numbers[fine.numbers[as_what.encode()]], piece
    assert numbers[fine.eos] == others[coarse.eos] == bins.count - 1
    assert numbers[fine.bos] == -1 and (numbers[fine.vocab_size :] == -1).all()


def test_no_shared_token_is_left_without_one_on_a_side():
    """A piece of both that one of them never writes is its own bin still; an empty one would be infinitely far."""

    class Bytewise(Pieces):
        def encode(self, text):
            return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    bins = spans.bins_of(Pieces("in"), Bytewise("in"), 259, 259)
    assert sorted({*bins.student.tolist()}) == sorted({*bins.teacher.tolist()}) == list(range(-1, bins.count))


def test_bins_are_sums_of_what_is_in_them():
    bins = jnp.array([0, 2, -1, 2, 1])
    logits = jnp.array([[0.3, -1.0, 5.0, 2.0, 0.1], [0.0, 0.0, 0.0, 0.0, -200.0]])
    found = np.exp(spans.binned(logits, bins, 3))
    weights = np.exp(np.asarray(logits, np.float64))
    expected = np.stack([weights[:, 0], weights[:, 4], weights[:, 1] + weights[:, 3]], axis=1)
    np.testing.assert_allclose(found, expected / expected.sum(axis=1, keepdims=True), atol=1e-6)
    assert np.isfinite(jax.grad(lambda x: jnp.sum(spans.binned(x, bins, 3)))(logits)).all()


@given(st.lists(st.integers(-1, 3), min_size=9, max_size=9), st.integers(0, 999))
@settings(deadline=None, max_examples=30)
def test_bins_and_their_gradient_are_those_of_plain_sums(more, seed):
    numbers = np.array([0, 1, 2, 3, *more])
    bins, rng = jnp.asarray(numbers), np.random.default_rng(seed)
    logits, weights = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 13), (2, 4)))
    member = jnp.asarray(numbers[:, None] == np.arange(4), jnp.float32)

    def plain(logits):
        probabilities = jnp.exp(logits) @ member
        return jnp.log(probabilities / jnp.sum(probabilities, axis=-1, keepdims=True))

    np.testing.assert_allclose(spans.binned(logits, bins, 4), plain(logits), atol=1e-5)
    summed = lambda binned: jax.grad(lambda x: jnp.sum(weights * binned(x)))(logits)
    np.testing.assert_allclose(summed(lambda x: spans.binned(x, bins, 4)), summed(plain), atol=1e-5)


@given(st.integers(0, 10_000), st.sampled_from([1.0, 2.0]))
@settings(deadline=None, max_examples=30)
def test_coarser_distributions_are_no_farther_apart(seed, temperature):
    """0 <= KL of sums <= KL (data processing); with a token in each bin they are equal."""
    rng = np.random.default_rng(seed)
    teacher, student = (jnp.asarray(rng.normal(scale=3, size=(2, 7)), jnp.float32) for _ in range(2))
    whole = temperature**2 * divergences.forward_kl(
        *(jax.nn.log_softmax(logits / temperature) for logits in (teacher, student))
    )
    each, some = jnp.arange(7), jnp.asarray(rng.integers(0, 3, 7))
    each, some = Bins(each, each, 7), Bins(some, some, 3)
    term = lambda teacher, student, bins: SharedTokens()(teacher, student, bins, temperature)
    coarse = term(teacher, student, some)
    assert (coarse >= -1e-5).all() and (coarse <= whole + 1e-4).all()
    np.testing.assert_allclose(term(teacher, student, each), whole, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(term(teacher, teacher, some), 0, atol=1e-5)


def test_a_divergence_has_to_be_one():
    with pytest.raises(UserError, match="unknown 'foward_kl'; did you mean 'forward_kl'"):
        SpanLikelihood(divergence="foward_kl")


def test_where_one_bpe_goes_on_from_the_other_both_are_asked_the_same(corpus, tmp_path):
    """Spans are the coarser one's tokens; what the finer one writes next is what the coarser one's token counts as."""
    documents = sources.load(corpus, "train", data_dir=tmp_path)
    fine, coarse = (
        tokenizers.make("bpe", vocab_size=size, documents=documents, data_dir=tmp_path) for size in (290, 360)
    )
    bins = spans.bins_of(fine, coarse, fine.vocab_size, coarse.vocab_size)
    batch = packed(fine, [documents[0], documents[1]], 400)
    added = Retokenizer(fine, coarse, 400)(batch)
    begin = np.asarray(spans.begins(jnp.asarray(added["spans"])))[0] > 0
    there = added["other_spans"][0] > 0
    assert begin.sum() == there.sum() == added["other_loss_mask"].sum() < (added["spans"] > 0).sum()
    ours, theirs = batch["targets"][0, begin], added["other_targets"][0, there]
    np.testing.assert_array_equal(np.asarray(bins.student)[ours], np.asarray(bins.teacher)[theirs])
    assert bins.count == fine.vocab_size

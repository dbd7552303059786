"""Likelihoods of continuations: equal to the plain model, whatever the batch; texts cut as benchmarks expect."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.data.tokenizers import byte_level
from fastlm.decoding.answers import Answers
from fastlm.decoding.likelihood import likelihoods, windows
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig

MODEL = Model(ModelConfig(vocab_size=260, max_length=32, layers=1, width=32, heads=4, init_scale=0.3))


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def slowly(params, context, continuation):
    whole = jnp.asarray([*context, *continuation])[None]
    logits = jax.nn.log_softmax(MODEL.apply(params, whole[:, :-1])[0][0])
    picked = [(logits[len(context) - 1 + i, t], jnp.argmax(logits[len(context) - 1 + i])) for i, t in
              enumerate(continuation)]  # fmt: skip
    return float(sum(p for p, _ in picked)), all(int(best) == t for (_, best), t in zip(picked, continuation))


def test_they_are_those_of_the_plain_model_in_any_batch(params):
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 260, n).tolist(), rng.integers(0, 260, m).tolist()) for n, m in [(1, 1), (9, 3), (4, 7)]]
    greedy = int(jnp.argmax(MODEL.apply(params, jnp.asarray(pairs[0][0])[None])[0][0, -1]))
    pairs.append((pairs[0][0], [greedy]))
    for batch_size in (1, 3):
        found = likelihoods(MODEL, params, pairs, batch_size=batch_size)
        for one, pair in zip(found, pairs, strict=True):
            expected, is_greedy = slowly(params, *pair)
            assert one.log_probability == pytest.approx(expected, abs=1e-3)
            assert one.greedy == is_greedy
    assert found[-1].greedy


def test_a_long_context_keeps_its_end(params):
    context, continuation = list(range(100)), [5, 6]
    (one,) = likelihoods(MODEL, params, [(context, continuation)])
    assert one.log_probability == pytest.approx(slowly(params, context[-31:], continuation)[0], abs=1e-3)


def test_what_cannot_be_scored_is_named(params):
    with pytest.raises(UserError, match="request 1: a context needs at least one token"):
        likelihoods(MODEL, params, [([1], [2]), ([], [2])])
    with pytest.raises(UserError, match="a continuation of 40 tokens does not fit the model's context of 32"):
        likelihoods(MODEL, params, [([1], [2] * 40)])


@given(st.lists(st.integers(0, 9), max_size=50), st.integers(1, 20))
def test_windows_score_each_token_once_after_the_one_before(ids, room):
    pairs = windows(ids, 99, room)
    assert [token for _, part in pairs for token in part] == ids
    flat = [99, *ids]
    place = 0
    for context, part in pairs:
        assert context == [flat[place]]
        assert len(part) <= room
        place += len(part)


def test_the_harness_adapter_answers_in_texts(params):
    tokenizer = byte_level.ByteTokenizer()
    answers = Answers(MODEL, params, tokenizer, batch_size=2)
    ids = lambda text: [int(t) for t in tokenizer.encode(text)]
    start = tokenizer.bos
    (pair, spaced) = answers.loglikelihood([("ab", "cd"), ("ab ", "cd")])
    assert pair[0] == pytest.approx(slowly(params, [start, *ids("ab")], ids("cd"))[0], abs=1e-3)
    assert spaced[0] == pytest.approx(slowly(params, [start, *ids("ab")], ids(" cd"))[0], abs=1e-3)
    (whole,) = answers.rolling(["abcd"])
    assert whole == pytest.approx(slowly(params, [start], ids("abcd"))[0], abs=1e-3)
    text = answers.generate("ab", {"max_gen_toks": 12})
    assert text == answers.generate("ab", {"max_gen_toks": 12})
    stop = text[3:5]
    assert answers.generate("ab", {"max_gen_toks": 12, "until": [stop]}) == text[: text.find(stop)]

"""Likelihoods of continuations: equal to the plain model, whatever the batch; texts cut as benchmarks expect."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.data.tokenizers import byte_level
from fastlm.decoding import sample
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


def test_of_a_kind_that_groups_tokens_too_they_do_not_depend_on_the_batch():
    model = Model(dataclasses.replace(MODEL.cfg, max_length=64, attention="lsh(chunk=4)"))
    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 260, n).tolist(), rng.integers(0, 260, 4).tolist()) for n in (7, 40)]
    together = likelihoods(model, params, pairs, batch_size=2)
    alone = [likelihoods(model, params, [pair], batch_size=2)[0] for pair in pairs]
    assert [one.log_probability for one in together] == pytest.approx([one.log_probability for one in alone], abs=1e-3)


@pytest.fixture
def said(caplog):
    """What was logged, whatever the commands that other tests ran in this process made of the logger."""
    caplog.set_level("WARNING", logger="fastlm")
    return caplog


def test_long_texts_keep_their_end_and_that_is_said(params, said):
    contexts, continuations = [list(range(100)), [1, 2], [3]], [[5, 6], [7], list(range(100, 140))]
    found = likelihoods(MODEL, params, list(zip(contexts, continuations)))
    assert found[0].log_probability == pytest.approx(slowly(params, contexts[0][-31:], [5, 6])[0], abs=1e-3)
    # Of a continuation beyond the context its last tokens, after the one before them.
    expected, greedy = slowly(params, continuations[2][7:8], continuations[2][8:])
    assert found[2].log_probability == pytest.approx(expected, abs=1e-3) and found[2].greedy == greedy
    (message,) = said.messages
    assert message.startswith("2 of 3 texts are cut at their beginning to the model's context of 32 tokens")
    assert "of 1 of them the continuation alone is longer" in message


def test_what_fits_is_not_said_to_be_cut(params, said):
    likelihoods(MODEL, params, [([1], [2] * 32), ([1] * 30, [2] * 3)])
    assert not said.messages


def test_a_context_without_a_token_is_named(params):
    with pytest.raises(UserError, match="request 1: a context needs at least one token"):
        likelihoods(MODEL, params, [([1], [2]), ([], [2])])


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
    generate = lambda **options: answers.generate([("ab", {"max_gen_toks": 12} | options)])[0]
    text = generate()
    assert text == generate() == generate(do_sample=False, temperature=0.7)
    assert generate(until=[text[3:5]]) == text[: text.find(text[3:5])]


def test_answers_are_as_long_as_fits_and_prompts_cut_only_where_they_must(params, said, monkeypatch):
    answers = Answers(MODEL, params, byte_level.ByteTokenizer())
    asked = []
    answered = lambda *a, max_tokens, **b: asked.append((len(a[2][0]), max_tokens)) or iter(())
    monkeypatch.setattr(sample, "generate", answered)
    answers.generate([("a", {"max_gen_toks": 30}), ("a" * 10, {"max_new_tokens": 21})])
    assert asked == [(2, 30), (11, 21)] and not said.messages
    asked.clear()
    answers.generate([("a", {}), ("a" * 100, {"max_gen_toks": 4}), ("a" * 20, {"max_gen_toks": 14}), ("a", {})])
    # A start token and a letter leave 30 of 32; a prompt gives way to half of the context.
    assert asked == [(2, 30), (28, 4), (18, 14), (2, 30)]
    (message,) = said.messages
    assert message.startswith("of 4 prompts 2 are cut at their beginning, and the answers to 2 limited")


def test_what_is_drawn_again_is_drawn_anew_and_an_evaluation_gives_the_same_again(params):
    def evaluation():
        answers = Answers(MODEL, params, byte_level.ByteTokenizer())
        one = ("ab", {"max_gen_toks": 12, "do_sample": True, "temperature": 2.0})
        return answers.generate([one, one]) + answers.generate([one])

    drawn = evaluation()
    assert len(set(drawn)) == 3
    assert drawn == evaluation()


@pytest.mark.parametrize(
    ("family", "head"),
    [("encoder", "masked_language_model"), ("encoder_decoder", "language_model"), ("decoder", "none")],
)
def test_a_model_that_does_not_continue_texts_is_refused(family, head):
    changes = {"family": family, "head": head, "encoder_layers": int(family == "encoder_decoder")}
    model = Model(dataclasses.replace(MODEL.cfg, **changes))
    with pytest.raises(UserError, match=f"family '{family}' with head '{head}', which has no likelihoods"):
        Answers(model, None, byte_level.ByteTokenizer())

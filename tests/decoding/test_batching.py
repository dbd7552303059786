"""Continuous batching: the same texts as a batch of their own, whatever shares the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.decoding import batching, sample
from fastlm.decoding.sample import Sampling
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [2, 2], [9, 8, 7]]
WARM = Sampling(temperature=1.2, top_p=0.95)
KINDS = {
    "full": {},
    "windows and states": {"attention": ("local(window=4)", "gated_linear"), "layers": 2},
    "translator": {"family": "encoder_decoder", "encoder_layers": 1, "positions": "sinusoidal"},
}


def make(**changes):
    cfg = {"vocab_size": 16, "max_length": 64, "layers": 1, "width": 16, "heads": 2, "init_scale": 0.5} | changes
    model = Model(ModelConfig(**cfg))
    return model, model.init(jax.random.key(0))


def served(model, params, prompts, count, **options):
    found = list(batching.serve(model, params, prompts, max_tokens=count, how=WARM, seed=7, chunk=4, **options))
    assert sorted(one.number for one in found) == list(range(len(prompts)))
    return found, [one.tokens for one in sorted(found, key=lambda one: one.number)]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_of_a_batch_of_their_own(kind):
    model, params = make(**KINDS[kind])
    start = {"start": 1} if kind == "translator" else {}
    chunks = sample.generate(model, params, PROMPTS, max_tokens=10, how=WARM, seed=7, chunk=4, **start)
    alone = np.concatenate(list(chunks), axis=1).tolist()
    for rows in (2, 8):
        assert served(model, params, PROMPTS, 10, rows=rows, **start)[1] == alone
    until = [row[: row.index(3)] if 3 in row else row for row in alone]
    assert any(map(len, until)) and until != alone
    assert served(model, params, PROMPTS, 10, rows=2, ends=[3], **start)[1] == until


def test_who_has_finished_leaves(monkeypatch):
    model, params = make()
    decoded, decode = [], sample.decode
    monkeypatch.setattr(sample, "decode", lambda *a: decoded.append(a[2]) or decode(*a))
    _, texts = served(model, params, PROMPTS, 10, rows=1, ends=[4, 6])
    assert min(map(len, texts)) < 4 and len(decoded) == sum(-(-min(len(text) + 1, 10) // 4) for text in texts)


def test_what_all_prompts_begin_with_is_read_once(monkeypatch):
    model, params = make(attention=("full", "gated_delta"), layers=2)
    shared = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3]
    prompts = [shared + row for row in PROMPTS]
    chunks = sample.generate(model, params, prompts, max_tokens=6, how=WARM, seed=7, chunk=4)
    alone = np.concatenate(list(chunks), axis=1).tolist()
    read = []
    whole = sample.prefill
    monkeypatch.setattr(sample, "prefill", lambda *a: read.append(np.asarray(a[3].lengths).tolist()) or whole(*a))
    assert served(model, params, prompts, 6, rows=2)[1] == alone
    assert read == [[len(shared)]]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5))
def test_the_shared_prefix_leaves_each_prompt_a_token(prompts):
    length = batching.shared_prefix(prompts)
    assert all(row[:length] == prompts[0][:length] and len(row) > length for row in prompts)
    longer = [row[: length + 1] for row in prompts]
    assert any(row != longer[0] for row in longer) or min(map(len, prompts)) == length + 1


def test_log_probabilities_are_those_of_training():
    model, params = make()
    for one in served(model, params, PROMPTS, 8, rows=2, forbidden=[5])[0]:
        row = PROMPTS[one.number] + one.tokens
        logits = model.apply(params, jnp.array([row]))[0][0]
        wanted = jax.nn.log_softmax(logits)[jnp.arange(len(row) - 1), jnp.array(row[1:])]
        np.testing.assert_allclose(one.log_probabilities, wanted[len(PROMPTS[one.number]) - 1 :], atol=2e-5)


def test_rules_and_being_told_that_it_is_enough():
    model, params = make()
    _, texts = served(model, params, PROMPTS, 12, rows=2, forced_first=9, enough=lambda tokens: len(tokens) >= 5)
    assert all(text[0] == 9 and len(text) == 8 for text in texts)  # looked at behind each four


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (PROMPTS, {"rows": 0}, "rows: must be at least 1, got 0"),
        ([[1], []], {}, "a prompt has no tokens"),
        ([[1] * 60], {}, "the model's context is 64 tokens"),
        ([[99]], {}, "vocabulary has 16"),
    ],
)
def test_mistakes_are_said_at_the_call(prompts, options, message):
    with pytest.raises(UserError, match=message):
        batching.serve(*make(), prompts, max_tokens=8, **options)

"""Speculative decoding: the model's own text, its own distribution, and what drafts propose."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.decoding import inputs, sample, speculative
from fastlm.decoding.drafts import LookupDraft, ModelDraft, Proposal
from fastlm.decoding.sample import Sampling
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig
from fastlm.models import attention as attention_kinds

GREEDY = Sampling(temperature=0.0)
PROMPTS = [[5, 6, 7, 5, 6, 7, 5], [3], [9, 2, 9, 2]]


def make(seed, **options):
    cfg = {"vocab_size": 12, "layers": 1, "width": 16, "heads": 2, "max_length": 64, "init_scale": 0.5} | options
    model = Model(ModelConfig(**cfg))
    return model, model.init(jax.random.key(seed))


def plain(model, params, rows, count, **options):
    chunks = sample.generate(model, params, rows, max_tokens=count, how=GREEDY, **options)
    return np.concatenate(list(chunks), axis=1).tolist()


def speculated(model, params, draft, weights, rows, count, how=GREEDY, **options):
    found = speculative.generate(model, params, draft, weights, rows, max_tokens=count, how=how, **options)
    written = [[] for _ in rows]
    for chunk in found:
        for row, new in zip(written, chunk, strict=True):
            row.extend(new.tolist())
    return written, found


FAMILIES = {
    "full": {},
    "windows": {"attention": "local(window=4)"},
    "states": {"attention": "gated_linear"},
    "mixed": {"attention": ("full", "gated_delta"), "layers": 2},
    "translator": {"family": "encoder_decoder", "encoder_layers": 1, "positions": "sinusoidal"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_the_model_s_own(family):
    model, params = make(0, **FAMILIES[family])
    options = {"start": 1} if model.cfg.encoder_layers else {}
    wanted = plain(model, params, PROMPTS, 20, **options)
    other, weights = make(1, **FAMILIES[family])
    draft = (ModelDraft(other), weights) if family != "full" else (LookupDraft(2), None)
    found, _ = speculated(model, params, *draft, PROMPTS, 20, span=3, **options)
    assert found == wanted


def test_a_draft_that_is_the_model_is_always_right():
    model, params = make(0)
    found, counts = speculated(model, params, ModelDraft(model), params, PROMPTS, 20, span=4)
    assert found == plain(model, params, PROMPTS, 20)
    assert counts.tokens_per_reading == 5 and counts.rounds == 3 * 4
    drawn, counts = speculated(model, params, ModelDraft(model), params, PROMPTS, 20, Sampling(1.0), span=4)
    assert counts.tokens_per_reading == 5 and len(drawn[0]) == 20


def test_rows_stop_behind_their_end_and_rules_hold():
    model, params = make(0)
    forbidden = [t for t in range(12) if t not in (4, 8)]
    how = Sampling(temperature=1.0)
    written, counts = speculated(
        *(model, params, LookupDraft(), None, PROMPTS * 8, 40, how),
        ends=[8],
        end=8,
        min_tokens=3,
        forbidden=forbidden,
        forced_first=2,
    )
    assert all(row[0] == 2 and set(row[1:]) <= {4, 8} and 8 not in row[:3] for row in written)
    assert all(8 in row for row in written) and counts.rounds < 24 * 20


def test_seeds_and_batches():
    model, params = make(0)
    other, weights = make(1)
    draw = lambda rows, seed: speculated(
        model, params, ModelDraft(other), weights, rows, 12, Sampling(1.0), seed=seed, span=2
    )[0]
    assert draw(PROMPTS, 3) == draw(PROMPTS, 3) != draw(PROMPTS, 4)
    assert draw(PROMPTS[:1], 3) == draw(PROMPTS, 3)[:1]


@pytest.mark.parametrize("certain", [False, True])
def test_what_is_written_is_drawn_from_the_model_s_distribution(certain):
    """Over 60,000 rows: the first token from p_0, and where it was a proposal, the second from p_1."""
    rows, vocabulary, span = 60_000, 5, 2
    key = iter(jax.random.split(jax.random.key(0), 9))
    spread = lambda places: jax.nn.softmax(jax.random.normal(next(key), (places, vocabulary)))
    wanted, likely = spread(span + 1), spread(span)
    tokens = (
        jnp.array([[1, 3]] * rows) if certain else jax.random.categorical(next(key), jnp.log(likely), shape=(rows, 2))
    )
    proposal = Proposal(tokens, None if certain else jnp.broadcast_to(likely, (rows, span, vocabulary)))
    keys = lambda: jax.random.split(next(key), rows)
    everyone = jnp.broadcast_to(wanted, (rows, span + 1, vocabulary))
    accepted, following = speculative.verdict(proposal, everyone, keys(), keys())
    first = np.where(accepted >= 1, tokens[:, 0], following)
    went_on = np.asarray(accepted) >= 1
    second = np.where(accepted >= 2, tokens[:, 1], following)[went_on]
    third = np.asarray(following)[np.asarray(accepted) == 2]
    for drawn, chances in ((first, wanted[0]), (second, wanted[1]), (third, wanted[2])):
        assert len(drawn) > 500
        shares = np.bincount(drawn, minlength=vocabulary) / len(drawn)
        error = np.sqrt(chances * (1 - chances) / len(drawn))
        assert (np.abs(shares - chances) < 4.5 * error).all()


def test_the_first_token_of_whole_texts_has_the_model_s_distribution():
    model, params = make(0, vocab_size=6)
    other, weights = make(1, vocab_size=6)
    rows, how = 4000, Sampling(temperature=0.9, top_p=0.9)
    prompt = [3, 1, 4]
    found, counts = speculated(model, params, ModelDraft(other), weights, [prompt] * rows, 3, how, span=2)
    assert counts.tokens_per_reading > 1
    for count in (0, 1):  # what follows the prompt, and what follows the likeliest beginning
        begun = [row[:count] for row in found]
        common = max(begun, key=begun.count)
        drawn = [row[count] for row in found if row[:count] == common]
        logits = model.apply(params, jnp.array([prompt + common]))[0][0, -1]
        chances = np.asarray(jax.nn.softmax(sample.filtered(logits, how)))
        shares = np.bincount(drawn, minlength=6) / len(drawn)
        assert (np.abs(shares - chances) <= 4.5 * np.sqrt(chances * (1 - chances) / len(drawn)) + 1e-6).all()


def looked_up(tokens, match, span):
    """What `LookupDraft` should propose behind `tokens`, slowly."""
    best = None
    for length, end in itertools.product(range(1, match + 1), range(1, len(tokens))):
        if length <= end and tokens[end - length : end] == tokens[-length:]:
            best = max(best or (0, 0), (length, end))
    begin = best[1]
    return list(itertools.islice(itertools.cycle(tokens[begin:]), span))


@given(st.lists(st.integers(0, 3), min_size=6, max_size=14), st.integers(1, 3))
def test_look_up_proposes_what_came_after_the_longest_and_latest_match(tokens, match):
    tokens = [tokens[-1], *tokens]  # so that there is a match
    draft = LookupDraft(match)
    batch = inputs.Inputs(jnp.array([tokens + [0] * (16 - len(tokens))]), jnp.array([len(tokens)]))
    state = draft.begin(None, batch, 32)
    assert int(state.length[0]) == len(tokens) - 1
    after, proposal = draft.propose(None, state, jnp.array([tokens[-1]]), 4, None)
    assert proposal.tokens[0].tolist() == looked_up(tokens, match, 4)
    kept = draft.keep(None, state, after, jnp.array([[tokens[-1], 9, 8, 7, 6]]), jnp.array([3]))
    assert kept.tokens[0, : int(kept.length[0])].tolist() == [*tokens, 9, 8]


@pytest.mark.parametrize("name", [name for name, kind in attention_kinds.KINDS.items() if kind.rewinds])
def test_caches_that_rewind_forget(name):
    model, params = make(0, attention=name)
    tokens = jnp.array([[1, 2, 3, 4, 5, 6, 7, 8]] * 2)
    read = lambda cache, tokens: model.features(params, tokens, cache=cache)
    _, first = read(model.empty_cache(2, 32), tokens[:, :5])
    _, astray = read(first["cache"], jnp.array([[9, 9, 9, 9], [10, 11, 10, 11]]))
    back = astray["cache"].replace(length=first["cache"].length)
    for cache in (back, first["cache"]):
        hidden, _ = read(cache, tokens[:, 5:])
        np.testing.assert_allclose(hidden, model.features(params, tokens)[0][:, 5:], atol=2e-5)


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"vocab_size": 13}, {}, "draft: has a vocabulary of 13, the model one of 12; a draft needs the model's own"),
        ({"max_length": 16}, {}, "draft: its context is 16 tokens, and 27 are needed"),
        (FAMILIES["translator"], {}, "draft: is of family 'encoder_decoder', the model of 'decoder'"),
        ({"attention": "lsh"}, {}, "kind 'lsh' cannot run step by step"),
        ({}, {"span": 0}, "span: must be at least 1, got 0"),
    ],
)
def test_drafts_that_cannot_be(options, more, message):
    model, params = make(0)
    draft, weights = make(1, **options)
    with pytest.raises(UserError, match=message):
        speculative.generate(model, params, ModelDraft(draft), weights, PROMPTS, max_tokens=20, **more)

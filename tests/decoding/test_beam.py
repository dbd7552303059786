"""Beam search against a slow search over full passes, and against everything that could have been written."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.decoding import beam, sample
from fastlm.decoding.hypotheses import STOPPING
from fastlm.decoding.sample import Sampling
from fastlm.errors import UserError
from fastlm.models import Compute, Model
from fastlm.models import attention as attention_kinds
from fastlm.parallel import mesh as meshes
from tests.decoding.small_models import CONFIGS, END, TINY, build, random_params

START = 1
ROWS = [[3, 4, 5], [6], [7, 8, 9, 10, 3, 4, 5]]


def start_of(model):
    return START if model.cfg.encoder_layers else None


@functools.cache
def reader(model):
    """Returns a compiled full pass without a cache: log-probabilities after each token of one row."""

    def read(params, tokens, source, segments):
        memory = model.encode(params, source, segment_ids=segments)[0] if model.cfg.encoder_layers else None
        logits = model.head(params, model.features(params, tokens, memory=memory)[0])
        return jax.nn.log_softmax(logits[0])

    return jax.jit(read)


def next_log_probs(model, params, row, written):
    """Returns log-probabilities [V] of what follows `written`, from a full pass."""
    before = [START] if model.cfg.encoder_layers else list(row)
    whole = np.zeros((1, 24), np.int32)
    whole[0, : len(before) + len(written)] = [*before, *written]
    source, segments = np.zeros((2, 1, 8), np.int32)
    source[0, : len(row)], segments[0, : len(row)] = row, 1
    found = reader(model)(params, whole, source, segments)
    return np.asarray(found, np.float64)[len(before) + len(written) - 1]


def ruled(log_probs, written, *, end, min_tokens=0, forbidden=(), forced_first=None):
    log_probs = log_probs.copy()
    log_probs[list(forbidden)] = -np.inf
    if len(written) < min_tokens:
        log_probs[end] = -np.inf
    if forced_first is not None and not written:
        log_probs[:] = -np.inf
        log_probs[forced_first] = 0.0
    return log_probs


def hopeless(best, worst, length, max_tokens, length_penalty, stop_when):
    if stop_when == "full":
        return True
    reach = max_tokens if stop_when == "impossible" and length_penalty > 0 else length
    return best / reach**length_penalty <= worst


def slow_search(follow, *, beams, max_tokens, end, length_penalty=1.0, stop_when="unlikely", **rules):
    """The algorithm in plain Python for one input; returns (score, tokens) of what ended, best first."""
    going, ended = [(0.0, ())], []
    for length in range(1, max_tokens + 1):
        every = []
        for total, written in going:
            chances = ruled(follow(written), written, end=end, **rules)
            every += [(total + chances[t], (*written, t)) for t in np.flatnonzero(np.isfinite(chances)).tolist()]
        every = sorted(every, reverse=True)[: 2 * beams]
        over = [text[-1] == end or length == max_tokens for _, text in every]
        now = [(total / length**length_penalty, text) for (total, text), is_over in zip(every, over) if is_over]
        ended = sorted(ended + now[: sum(over[:beams])], reverse=True)[:beams]
        going = [one for one, is_over in zip(every, over) if not is_over][:beams]
        if not going:
            break
        if len(ended) == beams and hopeless(going[0][0], ended[-1][0], length, max_tokens, length_penalty, stop_when):
            break
    return ended


def check(name, rows=ROWS, likes_end=None, n_best=None, beams=3, max_tokens=6, end=END, **options):
    """Compares with the slow search; returns the hypotheses of all rows."""
    model, params = build(name, likes_end)
    options |= {"beams": beams, "max_tokens": max_tokens, "end": end}
    found = beam.search(model, params, rows, start=start_of(model), n_best=n_best or beams, **options)
    for row, hypotheses in zip(rows, found, strict=True):
        expected = slow_search(functools.partial(next_log_probs, model, params, row), **options)[: n_best or beams]
        assert [h.tokens for h in hypotheses] == [t[:-1] if t[-1] == end else t for _, t in expected]
        assert [h.ended for h in hypotheses] == [t[-1] == end for _, t in expected]
        np.testing.assert_allclose([h.score for h in hypotheses], [score for score, _ in expected], rtol=2e-5)
    return [h for hypotheses in found for h in hypotheses]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_slow_search_finds_the_same(name):
    rows = [[3, 1, 2], [1], [3, 0, 3, 3, 1, 1, 0]] if name == "tiny" else ROWS
    found = [check(name, rows, length_penalty=penalty) for penalty in (0.0, 1.0, 2.0)]
    assert len({len(h.tokens) for one in found for h in one if h.ended}) > 3, "early ends should be seen"
    assert len({tuple(h.tokens for h in one) for one in found}) > 1, "the penalty should be seen"


@pytest.mark.parametrize("stop_when", STOPPING)
def test_forms_of_stopping(stop_when):
    for penalty in (-1.0, 0.0, 0.7, 2.0):
        check("decoder", max_tokens=9, length_penalty=penalty, stop_when=stop_when)


def test_the_forms_of_stopping_differ_and_later_ones_find_better():
    found = [check("decoder", stop_when=form, max_tokens=9, length_penalty=2.0) for form in STOPPING]
    for early, late in itertools.pairwise(found):
        assert [h.tokens for h in early] != [h.tokens for h in late]
        assert all(a.score <= b.score + 1e-6 for a, b in zip(early, late))


@pytest.mark.parametrize(
    "options",
    [
        {"forced_first": 7, "min_tokens": 3},
        {"forbidden": (0, 5, 9), "forced_first": 5},
        {"end": None},
        {"n_best": 2, "max_tokens": 1},
    ],
    ids=str,
)
def test_rules_and_bests(options):
    found = check("decoder", **options)
    if "min_tokens" in options:
        assert min(len(h.tokens) for h in found if h.ended) == 3, "the end should be late and just allowed"


def test_arrays_that_double_change_nothing(monkeypatch):
    options = {"likes_end": -4.0, "max_tokens": 16, "length_penalty": 0.5}
    rows = [np.array([3, 1, 0]), [1], [1, 1]]
    whole = check("tiny", rows, **options)
    monkeypatch.setattr(beam, "FIRST_STEPS", 8)
    doubled = check("tiny", rows, **options)
    assert [h.tokens for h in doubled] == [h.tokens for h in whole]
    assert max(len(h.tokens) for h in whole) == 16


@pytest.mark.parametrize("name", ["tiny", "marian"])
def test_one_beam_is_greedy(name):
    model, params = build(name)
    rows = [[3, 1], [1, 0, 3]]
    found = beam.search(model, params, rows, max_tokens=7, beams=1, end=END, start=start_of(model))
    chunks = sample.generate(
        model, params, rows, max_tokens=7, how=Sampling(temperature=0.0), chunk=4, start=start_of(model)
    )
    greedy = sample.until_end(chunks, END)
    assert [list(hypotheses[0].tokens) for hypotheses in found] == greedy
    for row, written in zip(rows, greedy):
        for i, token in enumerate(written):
            assert token == next_log_probs(model, params, row, written[:i]).argmax()


@settings(max_examples=10)
@given(st.integers(0, 2**31), st.sampled_from([-0.5, 0.0, 1.0, 2.0]))
def test_with_room_for_everything_the_best_of_everything_is_found(seed, penalty):
    model, params, row = Model(TINY), random_params(TINY, seed), [3, 1]
    options = {"max_tokens": 3, "beams": 64, "n_best": 5, "end": END, "length_penalty": penalty}
    (found,) = beam.search(model, params, [row], stop_when="impossible", **options)

    going = [w for n in range(3) for w in itertools.product([0, 1, 3], repeat=n)]
    after = {w: next_log_probs(model, params, row, w) for w in going}
    every = [(*w, token) for w in going for token in range(4) if token == END or len(w) == 2]
    score = lambda text: sum(after[text[:i]][token] for i, token in enumerate(text)) / len(text) ** penalty
    np.testing.assert_allclose([h.score for h in found], sorted(map(score, every), reverse=True)[:5], rtol=2e-5)
    for hypothesis in found:
        whole = (*hypothesis.tokens, *([END] if hypothesis.ended else []))
        np.testing.assert_allclose(score(whole), hypothesis.score, rtol=2e-5)


def test_an_input_does_not_depend_on_the_others():
    model, params = build("marian")
    run = functools.partial(beam.search, model, params, start=START, max_tokens=6, beams=3, n_best=3, end=END)
    together, others = run(ROWS), run([[9] * 8, ROWS[1], [3]])
    assert [h.tokens for h in together[1]] == [h.tokens for h in others[1]]
    np.testing.assert_allclose([h.score for h in together[1]], [h.score for h in others[1]], rtol=1e-5)


def test_no_more_is_returned_than_exists():
    model, params = build("decoder")
    found = beam.search(model, params, ROWS, max_tokens=1, beams=3, n_best=3, forbidden=range(2, 11))
    assert [sorted(h.tokens for h in hypotheses) for hypotheses in found] == [[(0,), (1,)]] * 3


def test_scores_of_half_precision_models_are_summed_in_full():
    model, params = build("tiny")
    half = Model(model.cfg, Compute(dtype="bfloat16"))
    run = functools.partial(beam.search, rows=[[3, 1]], max_tokens=12, beams=3, length_penalty=0.0)
    (one,), (other,) = run(half, params)[0], run(model, params)[0]
    np.testing.assert_allclose(one.score, other.score, atol=0.3)
    assert np.float32(one.score) != np.float32(jnp.bfloat16(one.score)), "the score was rounded"


def test_broken_weights_are_said():
    model, params = build("decoder")
    with pytest.raises(UserError, match="scores are no numbers"):
        beam.search(model, jax.tree.map(lambda x: x * np.nan, params), ROWS, max_tokens=6, beams=3)


@pytest.mark.slow
def test_a_mesh_changes_nothing_and_every_process_could_read_the_result(no_mesh, monkeypatch):
    model, params = build("t5")
    run = functools.partial(beam.search, model, params, [*ROWS, [3]], start=START, max_tokens=6, beams=4, end=END)
    alone, read = run(), beam._read

    def read_whole(found, *rest):
        assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(found))
        return read(found, *rest)

    monkeypatch.setattr(beam, "_read", read_whole)
    jax.set_mesh(meshes.make(data=2, fsdp=2, tensor=2))
    assert [h[0].tokens for h in run()] == [h[0].tokens for h in alone]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "beams: must be at least 1"),
        ({"n_best": 5}, "n_best: must lie between 1 and the number of beams"),
        ({"length_penalty": float("nan")}, "length_penalty: must be a number"),
        ({"stop_when": "unlikly"}, "did you mean 'unlikely'"),
        ({"max_tokens": 0}, "max_tokens: must be at least 1"),
        ({"max_tokens": 46}, "the longest prompt has 3 tokens, and 46 more make 49"),
        ({"end": 11}, "end: token 11 is outside the model's vocabulary of 11"),
        ({"start": 1}, "start: a decoder continues its prompts"),
        ({"min_tokens": 6}, "min_tokens: must lie between 0 and max_tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options, message):
    model, params = build("decoder")
    with pytest.raises(UserError, match=message):
        beam.search(model, params, ROWS[:1], **{"max_tokens": 5} | options)


def test_attention_that_cannot_keep_beams_apart_is_refused(monkeypatch):
    other = dataclasses.replace(attention_kinds.KINDS["full"], module=type("Recurrent", (), {}))
    monkeypatch.setitem(attention_kinds.KINDS, "full", other)
    with pytest.raises(UserError, match="beam search needs kind 'full'"):
        beam.search(*build("decoder"), ROWS, max_tokens=3)

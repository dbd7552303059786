"""Sampling: the cache changes nothing, rows do not see each other, filters keep what their definition says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.data.tokenizers.byte_level import ByteTokenizer
from fastlm.decoding import sample
from fastlm.decoding.sample import Sampling
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
GREEDY = Sampling(temperature=0.0)
WARM = Sampling(temperature=1.5, top_p=0.9)


def make(**changes):
    values = {
        "vocab_size": 32,
        "max_length": 64,
        "layers": 2,
        "width": 16,
        "heads": 2,
        "kv_heads": 1,
        "init_scale": 0.5,
    }
    model = Model(ModelConfig(**values | changes))
    return model, model.init(jax.random.key(0))


@pytest.fixture(scope="module")
def small():
    return make()


def tokens(small, prompts, count=8, **options):
    model, params = small
    options = {"chunk": 8} | options
    return np.concatenate(list(sample.generate(model, params, prompts, max_tokens=count, **options)), axis=1)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_greedy_with_a_cache_equals_greedy_by_full_passes(positions):
    small = model, params = make(positions=positions, layers=2)
    found = tokens(small, PROMPTS, 6, how=GREEDY, chunk=3)

    @jax.jit
    def logits(row, length):
        hidden, _ = model.features(params, row)
        return model.head(params, hidden[0, length - 1])

    for prompt, continuation in zip(PROMPTS, found):
        row = list(prompt)
        for _ in range(6):
            padded = jnp.asarray([row + [0] * (16 - len(row))])
            row.append(int(jnp.argmax(logits(padded, len(row)))))
        assert row[len(prompt) :] == continuation.tolist()


def test_a_second_call_compiles_nothing(small):
    """Prompts, continuations and rules of other lengths in the same buckets, another seed, and greedy of a batch."""
    programs = lambda: (sample.prefill._cache_size(), sample.decode._cache_size())
    tokens(small, PROMPTS, 9, how=WARM)
    before = programs()
    tokens(small, [[3, 1], [2] * 12, [9]], 7, how=WARM, seed=5, forbidden=(4,), min_tokens=2, end=1)
    assert programs() == before and min(before) > 0
    tokens(small, PROMPTS[:2], 9, how=WARM)
    assert programs() > before, "another number of rows does"


@pytest.mark.parametrize("how", [GREEDY, WARM], ids=["greedy", "drawn"])
def test_a_row_does_not_depend_on_the_others(small, how):
    together = tokens(small, PROMPTS, how=how, seed=3)
    first = tokens(small, PROMPTS[:1], how=how, seed=3)
    np.testing.assert_array_equal(together[:1], first)
    # A row's key is of its number: other neighbours, the same text in the same row.
    others = tokens(small, [[30] * 7, PROMPTS[1], [2]], how=how, seed=3)
    np.testing.assert_array_equal(together[1], others[1])


def test_equal_prompts_in_one_batch_differ_when_drawn(small):
    rows = tokens(small, [[1, 2, 3]] * 3, how=WARM)
    assert len({tuple(row) for row in rows.tolist()}) == 3
    rows = tokens(small, [[1, 2, 3]] * 3, how=GREEDY)
    assert len({tuple(row) for row in rows.tolist()}) == 1


def test_the_seed_decides(small):
    np.testing.assert_array_equal(tokens(small, PROMPTS, how=WARM, seed=1), tokens(small, PROMPTS, how=WARM, seed=1))
    assert (tokens(small, PROMPTS, how=WARM, seed=1) != tokens(small, PROMPTS, how=WARM, seed=2)).any()


@pytest.mark.parametrize("chunk", [3])
def test_chunks_do_not_change_the_text(small, chunk):
    whole = tokens(small, PROMPTS, 8, how=WARM)
    np.testing.assert_array_equal(whole, tokens(small, PROMPTS, 8, how=WARM, chunk=chunk))


def test_chunks_come_as_they_are_made(small):
    model, params = small
    shapes = [c.shape for c in sample.generate(model, params, PROMPTS, max_tokens=8, how=WARM, chunk=3)]
    assert shapes == [(3, 3), (3, 3), (3, 2)]


def test_the_whole_context_can_be_used(small):
    assert tokens(small, [[1] * 60], 4, how=GREEDY).shape == (1, 4)


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([[1] * 60], 5, "the longest prompt has 60 tokens, and 5 more make 65"),
        ([[1], []], 4, "no tokens"),
        ([], 4, "no tokens"),
        ([[1]], 0, "max_tokens: must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_call(small, prompts, count, message):
    model, params = small
    with pytest.raises(UserError, match=message):
        sample.generate(model, params, prompts, max_tokens=count)


# --- filters against a plain oracle -----------------------------------------------------------------

# Multiples of 1/16: sums are exact enough that no draw sits on the edge of a filter by rounding alone.
logits_rows = st.lists(st.integers(-64, 64), min_size=8, max_size=8, unique=True).map(
    lambda row: np.array(row, np.float32) / 16
)


def kept(logits, how):
    return np.flatnonzero(np.asarray(sample.filtered(jnp.asarray(logits), how)) > sample.NEGATIVE / 2).tolist()


def probabilities(logits):
    exponents = np.exp(logits.astype(np.float64) - logits.max())
    return exponents / exponents.sum()


@given(logits_rows, st.integers(1, 14))
def test_top_k_keeps_the_k_likeliest(row, k):
    assert kept(row, Sampling(top_k=k)) == sorted(np.argsort(-row)[:k].tolist())


@given(logits_rows, st.floats(0.01, 0.99), st.sampled_from([0.5, 1.0, 2.0]))
def test_top_p_keeps_the_smallest_set_with_that_probability(row, p, temperature):
    chances = probabilities(row / temperature)
    order = np.argsort(-chances)
    before = np.cumsum(chances[order]) - chances[order]
    if np.abs(before - p).min() < 1e-5:
        return  # on the edge, rounding decides
    assert kept(row, Sampling(temperature=temperature, top_p=p)) == sorted(order[before < p].tolist())


@given(logits_rows, st.floats(0.01, 0.99))
def test_min_p_keeps_what_is_likely_beside_the_likeliest(row, p):
    chances = probabilities(row)
    if np.abs(chances - p * chances.max()).min() < 1e-6:
        return
    assert kept(row, Sampling(min_p=p)) == np.flatnonzero(chances >= p * chances.max()).tolist()


@given(logits_rows, st.integers(0, 5), st.floats(0.05, 1.0), st.floats(0.0, 0.9), st.sampled_from([0.3, 1.0, 3.0]))
def test_filters_together_keep_the_likeliest_and_the_proportions(row, k, p, m, temperature):
    how = Sampling(temperature, k, p, m)
    left = kept(row, how)
    assert int(np.argmax(row)) in left
    assert set(left) <= set(kept(row, Sampling(temperature, top_k=k)))
    after = np.asarray(sample.filtered(jnp.asarray(row), how))
    np.testing.assert_allclose(after[left], row[left] / temperature, rtol=1e-5)


def test_draws_follow_the_filtered_probabilities():
    row = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = np.asarray(sample.draw(jnp.tile(row, (4000, 1)), keys, Sampling(top_k=2)))
    counts = np.bincount(drawn, minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.625, 0.375, 0, 0], atol=0.03)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"min_p": -0.1},
        {"min_p": float("nan")},
    ],
)
def test_settings_out_of_range_are_refused(values):
    with pytest.raises(UserError):
        Sampling(**values)


# --- from tokens to text ----------------------------------------------------------------------------


def test_until_end_stops_each_row_at_its_end_and_then_asks_for_no_more():
    asked = []

    def chunks():
        for chunk in ([[1, 2], [9, 3]], [[9, 4], [5, 9]], [[6, 6], [6, 6]]):
            asked.append(chunk)
            yield np.array(chunk)

    assert sample.until_end(chunks(), 9) == [[1, 2], []]
    assert len(asked) == 2
    assert sample.until_end(iter([np.array([[1], [2]]), np.array([[3], [4]])]), 9) == [[1, 3], [2, 4]]
    assert sample.until_end(iter([]), 9) == []


TEXTS = ["plain", "naïve café", "日本語 and 🙂", "ends in half a character: 🙂"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("cut", [0, 2])
@pytest.mark.parametrize("chunk", [1, 3])
def test_streaming_prints_what_the_batch_prints_in_whole_characters(text, cut, chunk):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)[: len(text.encode()) - cut].tolist()
    row = np.array([[*ids, tokenizer.eos, 65, 66, 67]])

    parts = [row[:, i : i + chunk] for i in range(0, row.shape[1], chunk)]
    *pieces, last = sample.stream(tokenizer, iter(parts))
    assert "\ufffd" not in "".join(pieces), "half a character was printed"
    (batch_row,) = sample.until_end(iter(parts), tokenizer.eos)
    whole = sample.text_of(tokenizer, batch_row)
    assert "".join(pieces) + last == whole == bytes(ids).decode(errors="replace")


def test_prompts_open_as_documents_do():
    tokenizer = ByteTokenizer()
    assert sample.prompt_ids(tokenizer, "ab") == [tokenizer.bos, 97, 98]
    with pytest.raises(UserError, match="not valid UTF-8 at character 1"):
        sample.prompt_ids(tokenizer, "a\udcff")


@given(st.text(alphabet="ab", max_size=12), st.lists(st.text(alphabet="ab", min_size=1, max_size=3), max_size=2))
def test_a_stream_ends_before_the_first_stop_however_it_is_cut(text, stops):
    tokenizer = ByteTokenizer()
    found = sample.first_stop(text, stops)
    for size in (1, 2, 5):
        tokens = [int(i) for i in tokenizer.encode(text)]
        chunks = [[np.array(tokens[i : i + size])] for i in range(0, len(tokens), size)]
        assert "".join(sample.stream(tokenizer, chunks, stops=stops)) == text[:found]
    assert found is None or any(text[found:].startswith(stop) for stop in stops)
    assert not any(stop in text[: len(text) if found is None else found] for stop in stops)

"""What decoding keeps: written in place, and in eight bits where that is asked for."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from fastlm.decoding import batching, beam, drafts, sample, speculative
from fastlm.decoding import rules as token_rules
from fastlm.errors import UserError
from fastlm.models import Compute, Model, ModelConfig
from fastlm.ops import caches
from fastlm.ops.masks import MaskSpec
from fastlm.ops.rounding import rounded

CFG = ModelConfig(vocab_size=24, max_length=128, layers=2, width=32, heads=4, kv_heads=2, init_scale=0.3)
GREEDY = sample.Sampling(temperature=0.0)
ROWS = [[3, 5, 7], [2, 9, 4, 4, 1], [6]]
SLOTS = 64


def made(cache_dtype="", **changes):
    model = Model(dataclasses.replace(CFG, **changes), Compute(cache_dtype=cache_dtype))
    return model, model.init(jax.random.key(0))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("write", [caches.written, caches.written_by_head])
def test_writing_equals_a_loop(write, rows):
    by_head = write is caches.written_by_head
    rng = np.random.default_rng(0)
    old = rng.normal(size=(rows, 2, 7, 4) if by_head else (rows, 7, 2, 4)).astype(np.float32)
    new, offset = rng.normal(size=(rows, 3, 2, 4)).astype(np.float32), np.array([4, 0, 2])[:rows]
    wanted = old.copy()
    for row, start in enumerate(offset):
        for token in range(3):
            if by_head:
                wanted[row, :, start + token] = new[row, token]
            else:
                wanted[row, start + token] = new[row, token]
    np.testing.assert_array_equal(write(jnp.array(old), jnp.array(new), jnp.array(offset)), wanted)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("attention", ["full", "latent", "dilated", "local(window=64)", "chunk(size=32)"])
def test_a_step_does_not_copy_the_cache(attention, rows):
    model, params = made(attention=attention)
    cache, keys = model.empty_cache(rows, SLOTS), sample.row_keys(0, range(rows))
    given = (token_rules.make(24, 4), cache, jnp.zeros((rows, 24)), keys, np.zeros(rows, np.int32))
    text = sample.decode.lower(model, params, 4, GREEDY, *given).compile().as_text()
    kept = jax.tree.leaves(cache.layers)[0].size
    copied = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", text)
    sizes = [int(np.prod([int(size) for size in shape.split(",")])) for shape in copied]
    assert "dot" in text and max(sizes, default=0) < kept


@given(numpy_strategies.arrays(np.float32, (2, 8), elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False)))
def test_rounding_stays_within_half_a_level(x):
    levels, scale = rounded(jnp.array(x))
    assert levels.dtype == jnp.int8 and scale.shape == (2, 1)
    flushed = 1e-36  # a scale below this may have become 0
    assert (np.abs(levels * scale - x) <= np.asarray(scale) * 0.5001 + flushed).all()


def test_eight_bits_are_a_quarter_and_nearly_the_same():
    rows, (whole, params), (small, _) = jnp.array(ROWS[1:2]), made(head_dim=64), made("int8", head_dim=64)
    bytes_of = lambda model: sum(leaf.nbytes for leaf in jax.tree.leaves(model.empty_cache(3, SLOTS).layers))
    assert bytes_of(small) <= 0.27 * bytes_of(whole)
    logits = []
    for model in (whole, small):
        hidden, aux = model.features(params, rows[:, :3], cache=model.empty_cache(1, SLOTS))
        hidden, _ = model.features(params, rows[:, 3:], cache=aux["cache"])
        logits.append(model.head(params, hidden))
    difference = np.abs(logits[1] - logits[0]).max() / np.abs(logits[0]).max()
    assert 0 < difference < 0.02


@pytest.mark.parametrize(
    "attention", ["full", "local(window=4)", pytest.param("chunk(size=3)", marks=pytest.mark.slow)]
)
def test_every_way_to_write_takes_eight_bits(attention):
    model, params = made("int8", attention=attention)
    texts = list(np.concatenate(list(sample.generate(model, params, ROWS, max_tokens=6, how=GREEDY)), axis=1))
    served = batching.serve(model, params, ROWS, max_tokens=6, rows=2, how=GREEDY)
    drafted = speculative.generate(model, params, drafts.LookupDraft(), None, ROWS, max_tokens=6, how=GREEDY)
    wanted = [row.tolist() for row in texts]
    assert [text.tokens for text in sorted(served, key=lambda text: text.number)] == wanted
    assert sample.until_end(drafted) == wanted


def test_translators_and_mixed_kinds_keep_what_they_can():
    model, params = made("int8", family="encoder_decoder", encoder_layers=1)
    assert all(
        isinstance(cache, caches.RoundedCache)
        for cache in jax.tree.leaves(
            model.empty_cache(1, 4, 4).layers, is_leaf=lambda x: isinstance(x, caches.RoundedCache)
        )
    )
    (tokens,) = sample.generate(model, params, ROWS, start=1, max_tokens=4, how=GREEDY)
    assert tokens.shape == (3, 4)
    mixed, params = made("int8", attention=("full", "linear"))
    kept = mixed.empty_cache(1, 4).layers
    assert isinstance(kept["0"], caches.RoundedCache) and not isinstance(kept["1"], caches.RoundedCache)


def test_a_window_keeps_no_more_than_rows_will_have():
    kept = lambda slots: jax.tree.leaves(made(attention="local(window=16)")[0].empty_cache(2, slots).layers)[0].shape
    assert kept(8) == (2, 2, 8, 8) and kept(64) == (2, 2, 16, 8)
    model, params = made(attention="local(window=100)")
    tokens = jnp.arange(24).reshape(2, 12) % 24
    whole, _ = model.features(params, tokens)
    cache = model.empty_cache(2, 12)
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 11), (11, 12)):
        hidden, aux = model.features(params, tokens[:, start:stop], cache=cache)
        cache = aux["cache"]
    np.testing.assert_allclose(hidden[:, -1], whole[:, -1], atol=1e-5)


@given(st.lists(st.tuples(st.sampled_from((1, 3, 6)), st.lists(st.integers(0, 7), min_size=2, max_size=2)), max_size=5))
@settings(max_examples=15)
def test_a_ring_holds_the_latest_tokens(pieces):
    """Rows of their own lengths, in pieces of any size: beside a list that forgets."""
    size, number = 4, 0
    ring, rows = caches.RingCache.empty(2, size, 0, 1, 2, jnp.float32), [[], []]
    for count, lengths in pieces:
        new = np.arange(number, number + 2 * count, dtype=np.float32).reshape(2, count, 1, 1) + [[[[0, 0.5]]]]
        number += 2 * count
        real = np.minimum(lengths, count)
        ring = ring.append(jnp.array(new), -jnp.array(new), MaskSpec(lengths=jnp.array(real))).cache
        for row, more, length in zip(rows, new, real):
            row += more[:length, 0, 0].tolist()
    for at, row in enumerate(rows):
        order = (int(ring.next[at]) + np.arange(size)) % size
        held = [float(ring.kept.keys[at, 0, slot, 0]) for slot in order if ring.valid[at, slot]]
        assert held == row[-size:]
        assert (ring.kept.values[at] == -ring.kept.keys[at]).all()


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="linear cannot keep what they do in int8"):
        made("int8", attention="linear")[0].empty_cache(1, 4)
    with pytest.raises(UserError, match="a search keeps caches whole"):
        beam.search(*made("int8"), ROWS, max_tokens=3)
    with pytest.raises(UserError, match=r"compute.cache_dtype: unknown 'int4'"):
        Compute(cache_dtype="int4")

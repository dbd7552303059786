"""Every form of attention equals the oracle; the oracle equals a loop over pairs written from the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from fastlm.models.attention.block_sparse import BlockSparseOptions, attend_pattern, pattern_of_slots
from fastlm.models.attention.local import sliding_window
from fastlm.ops import attention
from fastlm.ops.chunked_attention import chunked
from fastlm.ops.masks import MaskSpec
from fastlm.ops.softmax import TopK

SCALE = 0.3


def make_qkv(heads=4, kv_heads=2, queries=6, keys=6, head_dim=8, seed=0):
    a, b, c = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(a, (2, queries, heads, head_dim))
    k = jax.random.normal(b, (2, keys, kv_heads, head_dim))
    return q, k, jax.random.normal(c, (2, keys, kv_heads, head_dim))


def by_definition(q, k, v, visible, bias=None, cap=0.0):
    """Attention as a loop over rows, heads and queries in float64; `visible(b, t, s)` says who sees whom."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = [s for s in range(k.shape[1]) if visible(b, t, s)]
        scores = np.array([q[b, t, n] @ k[b, s, n // group] * SCALE for s in seen])
        scores = np.tanh(scores / cap) * cap if cap else scores
        scores = scores if bias is None else scores + np.array([bias[b, n, t, s] for s in seen])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = (weights / weights.sum()) @ np.array([v[b, s, n // group] for s in seen])
    return out


SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 3, 3]])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_plain_is_attention_by_definition(kv_heads, cap):
    q, k, v = make_qkv(kv_heads=kv_heads)
    bias = jax.random.normal(jax.random.key(9), (2, 4, 6, 6))
    mask = MaskSpec(True, SEGMENTS, SEGMENTS)
    visible = lambda b, t, s: s <= t and SEGMENTS[b, t] == SEGMENTS[b, s]
    expected = by_definition(q, k, v, visible, bias, cap)
    np.testing.assert_allclose(attention.plain(q, k, v, mask, bias, scale=SCALE, cap=cap), expected, atol=2e-6)


@pytest.mark.parametrize("form", ["plain", "key_major", "fused"])
def test_offset_places_queries_in_a_cache(form):
    q, k, v = make_qkv(queries=2, keys=6)
    offset = jnp.array([1, 3])
    expected = by_definition(q, k, v, lambda b, t, s: s <= t + int(offset[b]))
    np.testing.assert_allclose(
        attention.FORMS[form](q, k, v, MaskSpec(offset=offset), scale=SCALE), expected, atol=2e-6
    )


@pytest.mark.parametrize("form", [name for name in attention.FORMS if name not in ("plain", "splash")])
@pytest.mark.parametrize("kind", ["causal", "full", "packed", "bias", "shared_bias", "capped", "odd"])
def test_forms_equal_plain_with_gradients(form, kind):
    q, k, v = make_qkv(queries=5, keys=5, head_dim=7) if kind == "odd" else make_qkv()
    mask = {
        "causal": MaskSpec(),
        "bias": MaskSpec(),
        "shared_bias": MaskSpec(),
        "capped": MaskSpec(),
        "odd": MaskSpec(),
        "full": MaskSpec(causal=False),
        "packed": MaskSpec(True, SEGMENTS, SEGMENTS),
    }[kind]
    rows = {"bias": 2, "shared_bias": 1}.get(kind, 0)
    bias = jax.random.normal(jax.random.key(9), (rows, 4, 6, 6)) if rows else jnp.zeros(())

    def loss(name, q, k, v, bias):
        options = {"scale": SCALE, "cap": 2.0 if kind == "capped" else 0.0, "form": name}
        y = attention.dot_product_attention(q, k, v, mask, bias if rows else None, **options)
        return jnp.sum(jnp.sin(y) * jnp.arange(y.shape[-1])), y

    gradient = jax.value_and_grad(loss, argnums=(1, 2, 3, 4), has_aux=True)
    (_, got), got_grads = gradient(form, q, k, v, bias)
    (_, expected), expected_grads = gradient("plain", q, k, v, bias)
    np.testing.assert_allclose(got, expected, atol=3e-6)
    for a, b in zip(got_grads, expected_grads):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("kind", ["causal", "full", "packed", "capped", "fewer_queries"])
def test_chunked_equals_plain_over_several_blocks_with_gradients(kind):
    queries = 6 if kind == "fewer_queries" else 11
    q, k, v = make_qkv(kv_heads=2, queries=queries, keys=11)
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 2, [1] * 11])
    mask = MaskSpec(kind in ("causal", "packed", "capped"), *([segments] * 2 if kind == "packed" else []))
    options = {"scale": SCALE, "cap": 2.0 if kind == "capped" else 0.0}
    real = (segments != 0)[:, :queries, None, None] if kind == "packed" else 1.0
    weight = real * jnp.arange(1.0, 1 + q.shape[-1])
    runs = {"chunked": functools.partial(chunked, block=4), "plain": attention.plain}
    if kind == "fewer_queries":
        v, weight = v[..., :-1], weight[:-1]  # and narrower values
    loss = lambda run, q, k, v: jnp.sum(jnp.sin(run(q, k, v, mask, **options)) * weight)
    got, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, run), (0, 1, 2)))(q, k, v) for run in runs.values()
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
def test_splash_interpreted_equals_plain(monkeypatch):
    """The TPU kernel, run by the Pallas interpreter."""
    make = splash_attention_kernel.make_splash_mha
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", lambda *a, **k: make(*a, interpret=True, **k))
    q, k, v = make_qkv(heads=2, kv_heads=1, queries=128, keys=128, head_dim=128)
    segments = jnp.tile(jnp.repeat(jnp.array([1, 2]), 64), (2, 1))
    for mask in (MaskSpec(), MaskSpec(True, segments, segments)):
        got = attention.splash(q, k, v, mask, scale=SCALE)
        np.testing.assert_allclose(got, attention.plain(q, k, v, mask, scale=SCALE), atol=2e-5)
    for causal, window in ((True, 20), (False, 7)):
        pattern = attention.splash_window(window - 1, 0 if causal else window - 1)
        got = attention.splash(q, k, v, MaskSpec(causal), scale=SCALE, pattern=pattern)
        expected = sliding_window(q, k, v, None, window=window, causal=causal, scale=SCALE)
        np.testing.assert_allclose(got, expected, atol=2e-5)
    sparse = BlockSparseOptions(block=16, window=1, global_blocks=1, random=1)
    for causal in (True, False):
        pattern = attention.splash_table(pattern_of_slots(sparse, 128, causal))
        got = attention.splash(q, k, v, MaskSpec(causal, segments, segments), scale=SCALE, pattern=pattern)
        expected = attend_pattern(q, k, v, segments, pattern=sparse, causal=causal, scale=SCALE)
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_choice_by_platform():
    mask, shape = MaskSpec(), (2, 256, 4, 128)
    assert attention.choose("tpu", shape, shape, mask, None, 0.0) == "splash"
    assert attention.choose("tpu", (2, 250, 4, 128), (2, 250, 4, 128), mask, None, 0.0) == "plain"
    assert attention.choose("gpu", shape, shape, mask, None, 0.0) == "fused"
    assert attention.choose("gpu", shape, shape, mask, None, 30.0) == "plain"
    assert attention.choose("cpu", shape, shape, mask, None, 30.0) == "key_major"
    assert attention.choose("cpu", (2, 1, 4, 128), shape, mask, None, 0.0) == "plain"
    long = (1, 4096, 4, 64)
    assert attention.choose("cpu", long, long, mask, None, 0.0) == "chunked"
    assert attention.choose("cpu", long, long, mask, jnp.zeros(()), 0.0) == "key_major"
    assert attention.choose("cpu", long, long, mask, None, 0.0, TopK(8)) == "key_major"
    assert attention.choose("gpu", shape, shape, mask, None, 0.0, TopK(8)) == "plain"

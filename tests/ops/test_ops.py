"""Contractions, norms, activations, masks and caches against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.ops import activations, normalization
from fastlm.ops.caches import KVCache
from fastlm.ops.contract import contract, dense, lookup
from fastlm.ops.masks import MaskSpec


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.02), (jnp.float16, 2e-3)])
def test_contract_is_a_matrix_product_with_gradients(dtype, tolerance):
    x = jax.random.normal(jax.random.key(0), (2, 3, 8)).astype(dtype)
    w = jax.random.normal(jax.random.key(1), (8, 5))
    exact = lambda x, w: jnp.sum(jnp.sin(jnp.einsum("bti,io->bto", x.astype(jnp.float32), w)))
    for transpose in (False, True):
        stored = w.T if transpose else w
        y = contract(x, stored, transpose=transpose)
        assert y.dtype == dtype
        reference = np.einsum("bti,io->bto", np.asarray(x, np.float64), np.asarray(w, np.float64))
        np.testing.assert_allclose(np.asarray(y, np.float64), reference, rtol=tolerance, atol=tolerance * 4)
        fast = lambda x, w, t=transpose: jnp.sum(jnp.sin(contract(x, w, transpose=t).astype(jnp.float32)))
        got_x, got_w = jax.grad(fast, argnums=(0, 1))(x, stored)
        want_x, want_w = jax.grad(exact, argnums=(0, 1))(x.astype(jnp.float32), w)
        assert got_w.dtype == jnp.float32
        scale = float(jnp.abs(want_w).max())
        np.testing.assert_allclose(got_w.T if transpose else got_w, want_w, atol=tolerance * 4 * scale)
        np.testing.assert_allclose(np.asarray(got_x, np.float32), want_x, atol=tolerance * 4 * scale)


def test_lookup_takes_rows_and_dense_is_the_array():
    w = jnp.arange(12.0).reshape(4, 3)
    np.testing.assert_array_equal(lookup(w, jnp.array([[3, 0]])), w[jnp.array([[3, 0]])])
    np.testing.assert_array_equal(dense(w), w)


def test_norms_have_the_moments_they_promise():
    x = jax.random.normal(jax.random.key(0), (4, 64)) * 3 + 2
    y = normalization.layer_norm(x, jnp.ones(64), None, 1e-6)
    np.testing.assert_allclose(jnp.mean(y, -1), 0, atol=1e-5)
    np.testing.assert_allclose(jnp.std(y, -1), 1, atol=1e-4)
    z = normalization.rms_norm(x, jnp.full(64, 2.0), 1e-6)
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(z**2, -1)), 2, atol=1e-4)
    np.testing.assert_allclose(normalization.layer_norm(x, jnp.ones(64), jnp.full(64, 5.0), 1e-6), y + 5, atol=1e-5)


@pytest.mark.parametrize("norm", [normalization.layer_norm, normalization.rms_norm])
def test_norm_gradients_equal_finite_differences(norm):
    x = jax.random.normal(jax.random.key(0), (3, 8))
    scale, bias = jax.random.normal(jax.random.key(1), (8,)), jax.random.normal(jax.random.key(2), (8,))
    direction = jax.random.normal(jax.random.key(3), (3, 8))
    arguments = (scale, bias, 1e-5) if norm is normalization.layer_norm else (scale, 1e-5)
    value = lambda x: jnp.sum(jnp.cos(norm(x, *arguments)) * direction)
    step = jax.random.normal(jax.random.key(4), (3, 8))
    numeric = (value(x + 1e-2 * step) - value(x - 1e-2 * step)) / 2e-2
    np.testing.assert_allclose(jnp.vdot(jax.grad(value)(x), step), numeric, rtol=2e-2, atol=2e-2)


def test_activations():
    x = jnp.linspace(-4, 4, 33)
    np.testing.assert_allclose(activations.gelu(x), jax.nn.gelu(x, approximate=True), atol=2e-6)
    np.testing.assert_allclose(activations.silu(x), x / (1 + jnp.exp(-x)), atol=2e-6)
    np.testing.assert_allclose(activations.relu2(x), jnp.where(x > 0, x * x, 0), atol=1e-6)
    for fast, slow in ((activations.gelu, lambda x: jax.nn.gelu(x, approximate=True)), (activations.silu, jax.nn.silu)):
        np.testing.assert_allclose(jax.vmap(jax.grad(fast))(x), jax.vmap(jax.grad(slow))(x), atol=3e-6)


def test_mask_hides_padding_and_other_documents():
    segments = jnp.array([[1, 1, 2, 0]])
    visible = MaskSpec(False, segments, segments).dense(4, 4)[0, 0]
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(visible, np.array(expected, bool))
    assert MaskSpec(causal=False).dense(4, 4) is None


def test_cache_writes_each_row_at_its_own_slot():
    cache = KVCache.empty(2, 5, 1, 2, jnp.float32)
    new = jnp.ones((2, 2, 1, 2))
    cache = cache.write(new, 2 * new, jnp.array([0, 3]))
    np.testing.assert_array_equal(cache.k[:, :, 0, 0], [[1, 1, 0, 0, 0], [0, 0, 0, 1, 1]])
    np.testing.assert_array_equal(cache.v[:, :, 0, 0], [[2, 2, 0, 0, 0], [0, 0, 0, 2, 2]])

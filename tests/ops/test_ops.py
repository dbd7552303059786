"""Contractions, norms, activations, masks and caches against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.ops import activations, layouts, normalization
from fastlm.ops.caches import keys_and_values
from fastlm.ops.contract import add_bias, contract, dense, lookup
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


@pytest.mark.parametrize("centred", [True, False])
def test_norm_gradients_equal_those_of_the_oracle(centred):
    x, scale, bias, direction = (
        jax.random.normal(jax.random.key(i), (3, 8) if i in (0, 3) else (8,)) for i in range(4)
    )

    def value(layer, rms, x, scale, bias):
        y = layer(x, scale, bias, 1e-5) if centred else rms(x, scale, 1e-5) + bias
        return jnp.sum(jnp.cos(y) * direction)

    gradient = jax.grad(value, argnums=(2, 3, 4))
    fast = gradient(normalization.layer_norm, normalization.rms_norm, x, scale, bias)
    slow = gradient(normalization.layer_norm_plain, normalization.rms_norm_plain, x, scale, bias)
    for a, b in zip(fast, slow):
        np.testing.assert_allclose(a, b, atol=2e-5)


ORACLES = {
    activations.gelu: lambda x: jax.nn.gelu(x, approximate=True),
    activations.relu2: lambda x: jnp.where(x > 0, x * x, 0),
}
GATED_ORACLES = {
    activations.swiglu: lambda g, x: jax.nn.silu(g) * x,
    activations.geglu: lambda g, x: jax.nn.gelu(g, approximate=True) * x,
}


@pytest.mark.parametrize("fast", list(ORACLES))
def test_activations_equal_their_oracles_with_gradients(fast):
    x = jnp.linspace(-30, 30, 301)
    np.testing.assert_allclose(fast(x), ORACLES[fast](x), atol=3e-6, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(fast))(x), jax.vmap(jax.grad(ORACLES[fast]))(x), atol=5e-6)
    assert fast(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("fast", list(GATED_ORACLES))
def test_gated_activations_equal_their_oracles_with_gradients(fast):
    g, x = jnp.linspace(-20, 20, 101), jnp.cos(jnp.arange(101.0))
    np.testing.assert_allclose(fast(g, x), GATED_ORACLES[fast](g, x), atol=3e-6, rtol=1e-6)
    for argument in (0, 1):
        got = jax.vmap(jax.grad(fast, argument))(g, x)
        np.testing.assert_allclose(got, jax.vmap(jax.grad(GATED_ORACLES[fast], argument))(g, x), atol=1e-5)


def test_gelu_stays_finite_far_out():
    for x in (jnp.float32(-1e4), jnp.float32(1e4), jnp.bfloat16(1e10)):
        assert np.isfinite(np.asarray(activations.gelu(x), np.float32))
        assert np.isfinite(np.asarray(jax.grad(activations.gelu)(x), np.float32))


@pytest.mark.parametrize("shape", [(7, 6), (1, 5, 6), (3, 4, 6), (2, 3, 5, 4)])
def test_rows_last_merges_leading_axes_and_transposes(shape):
    x = jnp.arange(float(np.prod(shape))).reshape(shape)
    np.testing.assert_array_equal(layouts.rows_last(x), np.asarray(x).reshape(-1, shape[-1]).T)


@pytest.mark.parametrize("axes", [(0, 2, 1, 3), (0, 2, 3, 1), (3, 1, 0, 2)])
def test_transpose_in_memory_is_a_transpose(axes):
    x = jnp.arange(2.0 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    np.testing.assert_array_equal(layouts.transpose_in_memory(x, axes), jnp.transpose(x, axes))


def test_add_bias_sums_its_gradient_over_all_rows():
    x, bias = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.arange(4.0)
    np.testing.assert_array_equal(add_bias(x, bias), x + bias.astype(jnp.bfloat16))
    d_x, d_bias = jax.grad(lambda x, b: jnp.sum(add_bias(x, b).astype(jnp.float32) * 2), argnums=(0, 1))(x, bias)
    np.testing.assert_array_equal(d_bias, np.full(4, 12.0))
    assert (d_x.dtype, d_bias.dtype) == (jnp.bfloat16, jnp.float32)


def test_mask_hides_padding_and_other_documents():
    segments = jnp.array([[1, 1, 2, 0]])
    visible = MaskSpec(False, segments, segments).dense(4, 4)[0, 0]
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(visible, np.array(expected, bool))
    assert MaskSpec(causal=False).dense(4, 4) is None


def test_cache_writes_each_row_at_its_own_slot():
    cache = keys_and_values(2, 5, 1, 2, jnp.float32)
    new = jnp.ones((2, 2, 1, 2))
    cache = cache.write(new, 2 * new, jnp.array([0, 3]))
    np.testing.assert_array_equal(cache.k[:, :, 0, 0], [[1, 1, 0, 0, 0], [0, 0, 0, 1, 1]])
    np.testing.assert_array_equal(cache.v[:, :, 0, 0], [[2, 2, 0, 0, 0], [0, 0, 0, 2, 2]])

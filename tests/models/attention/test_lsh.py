"""Hashed attention beside attention to everything with the same shared queries and keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig
from fastlm.models.attention import lsh


def everything(q, v, causal):
    """Every token to every other one, and only the first of a decoder to itself."""
    see = jnp.tril(jnp.ones((q.shape[1],) * 2, bool)) if causal else True
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, lsh.unit(q))
    own = jnp.eye(q.shape[1], dtype=bool)
    p = jax.nn.softmax(jnp.where(own, -1e5, jnp.where(see, scores, -jnp.inf)), -1)
    return jnp.einsum("BNTS,BSNH->BTNH", p, v)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def hashed(q, v, rounds, buckets, chunk, causal, rng=None):
    found = lsh.buckets(q, lsh.rotations(rng, q.shape[-1], rounds, buckets))
    options = {"segments": None, "causal": causal, "scale": 1.0, "count": buckets}
    return lsh.hashed_attention(q, v, found, chunk=min(chunk, q.shape[1]), **options)


@pytest.mark.slow
def test_more_rounds_come_nearer_to_everything():
    q, v = jax.random.normal(jax.random.key(0), (2, 1, 96, 2, 8))
    want = everything(q, v, False)
    errors = [float(jnp.abs(hashed(q, v, rounds, 8, 12, False) - want).mean()) for rounds in (1, 3, 6)]
    assert errors[1] < 0.8 * errors[0] and errors[2] < 0.8 * errors[1], errors


@pytest.mark.parametrize("causal", [True, False])
def test_one_bucket_in_one_chunk_is_everything(causal):
    q, v = jax.random.normal(jax.random.key(1), (2, 2, 21, 2, 8))
    np.testing.assert_allclose(hashed(q, v, 2, 1, 32, causal), everything(q, v, causal), atol=1e-5)


def test_buckets_are_the_nearest_directions_and_drawn_from_the_key():
    q = jax.random.normal(jax.random.key(2), (2, 50, 3, 8))
    draw = jax.jit(lsh.rotations, static_argnums=(1, 2, 3))
    fixed = np.asarray(draw(None, 8, 2, 6))
    near = np.einsum("BTNH,RHP->BNRTP", q, fixed)
    np.testing.assert_array_equal(jax.jit(lsh.buckets)(q, fixed), np.argmax(np.concatenate([near, -near], -1), -1))
    np.testing.assert_array_equal(fixed, draw(None, 8, 2, 6))
    assert float(np.abs(fixed - draw(jax.random.key(5), 8, 2, 6)).max()) > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [("chunk=0", "at least 1"), ("buckets=3", "even"), ("chunk=1", "cannot be sorted as 32-bit")],
)
def test_impossible_options_are_errors(options, message):
    with pytest.raises(UserError, match=message):
        Model(ModelConfig(vocab_size=9, max_length=2**16, attention=f"lsh({options})"))

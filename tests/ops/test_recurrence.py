"""Recurrences in chunks against the same ones token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.ops import recurrence

B, N, T, P, H = 2, 2, 70, 8, 4
STARTS = np.zeros((B, T), bool)
STARTS[0, [3, 31, 32, 50]] = STARTS[1, 64] = True


def linear(state, k, v, log_decay):
    return jnp.exp(log_decay)[..., None, None] * state + k[..., None] * v[..., None, :]


def gated(state, k, v, log_decay):
    return jnp.exp(log_decay)[..., None] * state + k[..., None] * v[..., None, :]


def delta(state, k, v, log_decay, rate):
    held = jnp.einsum("BNP,BNPH->BNH", k, state)
    left = state - (rate[..., None] * k)[..., None] * held[..., None, :]
    return jnp.exp(log_decay)[..., None, None] * left + (rate[..., None] * k)[..., None] * v[..., None, :]


def token_by_token(step, q, *arrays, state):
    def one(state, now):
        start, q, *arrays = now
        state = step(jnp.where(start[:, None, None, None], 0, state), *arrays)
        return state, jnp.einsum("BNP,BNPH->BNH", q, state)

    last, y = jax.lax.scan(one, state, [STARTS.T, *(jnp.moveaxis(t, 2, 0) for t in (q, *arrays))])
    return jnp.moveaxis(y, 0, 2), last


def random(seed=0, strength=1.0):
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), shape)
    q, k, v = draw(0, B, N, T, P), draw(1, B, N, T, P), draw(2, B, N, T, H)
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    wide = jnp.maximum(-strength * jnp.exp(draw(3, B, N, T, P)), recurrence.LEAST_LOG_DECAY)
    return q, k, v, wide, -strength * jnp.exp(draw(4, B, N, T)), jax.nn.sigmoid(draw(5, B, N, T)), draw(6, B, N, P, H)


FORMS = {
    "linear": (functools.partial(recurrence.linear_recurrence, chunk=16), linear, (0, 1, 2, 4)),
    "gated": (recurrence.gated_recurrence, gated, (0, 1, 2, 3)),
    "delta": (functools.partial(recurrence.delta_recurrence, chunk=32), delta, (0, 1, 2, 4, 5)),
}


@pytest.mark.parametrize("name", FORMS)
def test_chunks_equal_token_by_token_with_gradients(name, monkeypatch):
    """Also with decays far below what their exponentials, or the inverses of these, can hold over a chunk."""
    if name == "delta":
        monkeypatch.setattr(recurrence, "PIECE", 40)  # a row of two pieces, the second one shorter
    fast, step, chosen = FORMS[name]

    def loss(run, arrays, state):
        y, last = run(arrays, state)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(last)), (y, last)

    @jax.jit
    def both(arrays, state):
        grad = jax.grad(loss, argnums=(1, 2), has_aux=True)
        chunks = lambda arrays, state: fast(*arrays, jnp.asarray(STARTS), state)
        return grad(chunks, arrays, state), grad(lambda a, s: token_by_token(step, *a, state=s), arrays, state)

    for strength in (0.1, 30.0):
        inputs = random(strength=strength)
        got, want = both([inputs[i] for i in chosen], inputs[-1])
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            np.testing.assert_allclose(a, b, atol=2e-5 * max(1, float(jnp.abs(b).max())))


def test_what_follows_a_token_that_forgets_everything_keeps_its_decay():
    log_decay = jnp.full((1, 1, 40), -0.1).at[..., 20].set(-1e9)
    left = recurrence.decays(log_decay, jnp.zeros((1, 40), bool), 40)
    np.testing.assert_allclose(left.pairs[0, 0, 0, 39, 20:], np.exp(-0.1 * np.arange(19, -1, -1)), rtol=1e-5)
    assert float(left.pairs[0, 0, 0, 39, 19]) < 1e-8


def test_the_inverse_stays_exact_where_all_keys_are_equal():
    """A series over the whole chunk would lose every digit here: the inverse is 1 and -1 beside the diagonal."""
    size = 64
    inverse = recurrence.unit_lower_inverse(jnp.tril(jnp.ones((size, size)), -1))
    np.testing.assert_allclose(inverse, np.eye(size) - np.eye(size, k=-1), atol=1e-6)


@pytest.mark.parametrize("size", [3, 20])
def test_the_inverse_of_any_size_and_its_gradient(size):
    below = jnp.tril(jax.random.normal(jax.random.key(size), (2, size, size)) * 0.3, -1)
    loss = lambda inverse: lambda below: jnp.sum(jnp.sin(inverse(below)))
    exact = lambda below: jnp.linalg.inv(jnp.eye(size) + jnp.tril(below, -1))
    got, want = (jax.jit(jax.value_and_grad(loss(f)))(below) for f in (recurrence.unit_lower_inverse, exact))
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, atol=1e-4)

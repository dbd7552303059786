"""The chunked loss equals the loss on the whole array of logits, in value and gradient, for any chunk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.ops.cross_entropy import chunked_cross_entropy, chunked_scores, token_losses


def head(params, hidden):
    return hidden @ params["w"]


def make(batch=2, length=12, width=5, vocab=11):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"w": jax.random.normal(keys[0], (width, vocab))}
    hidden = jax.random.normal(keys[1], (batch, length, width))
    targets = jax.random.randint(keys[2], (batch, length), 0, vocab)
    return params, hidden, targets, jax.random.bernoulli(keys[3], 0.7, (batch, length)).astype(jnp.float32)


def whole(params, hidden, targets, mask, z_loss, label_smoothing):
    """From the definitions, with explicit probabilities."""
    logits = head(params, hidden)
    p = jax.nn.log_softmax(logits)
    aim = jax.nn.one_hot(targets, logits.shape[-1]) * (1 - label_smoothing) + label_smoothing / logits.shape[-1]
    loss = -jnp.sum(aim * p, axis=-1) + z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.sum(loss * mask)


@settings(max_examples=8)  # each compiles
@given(chunk=st.integers(1, 40), length=st.sampled_from([11, 12]))
def test_any_chunk_gives_the_whole_loss_and_gradient(chunk, length):
    params, hidden, targets, mask = make(length=length)

    def loss(params, hidden):
        options = {"chunk": chunk, "z_loss": 0.1, "label_smoothing": 0.2}
        return 3.0 * chunked_cross_entropy(head, params, hidden, targets, mask, **options)[0]

    expected = lambda p, h: 3.0 * whole(p, h, targets, mask, 0.1, 0.2)
    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(params, hidden)
    expected_value, expected_grads = jax.value_and_grad(expected, argnums=(0, 1))(params, hidden)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads)):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_scores_are_per_token():
    params, hidden, targets, _ = make()
    scores = chunked_scores(head, params, hidden, targets, chunk=5)
    p = jax.nn.log_softmax(head(params, hidden))
    np.testing.assert_allclose(scores.nll, -jnp.take_along_axis(p, targets[..., None], -1)[..., 0], atol=1e-5)
    np.testing.assert_array_equal(scores.correct, (jnp.argmax(p, -1) == targets).astype(np.float32))


def test_float16_keeps_the_gradient_of_unlikely_tokens():
    """Probabilities of 1e-7 to 1e-6 are a few steps of float16's least number: without a scale they are lost."""
    vocab = 256
    hidden = jnp.ones((1, 4, 8), jnp.float16)
    params = {"w": jnp.tile(jnp.linspace(0, -2, vocab), (8, 1))}  # logits from 0 down to -16
    targets, mask = jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4))
    half_head = lambda p, h: (h @ p["w"].astype(h.dtype)).astype(jnp.float32)
    got = jax.grad(lambda p: chunked_cross_entropy(half_head, p, hidden, targets, mask)[0])(params)["w"]
    want = jax.grad(lambda p: whole(p, hidden.astype(jnp.float32), targets, mask, 0.0, 0.0))(params)["w"]
    unlikely = (want > 4e-7) & (want < 4e-6)
    assert int(unlikely.sum()) > 100
    assert float(jnp.mean(jnp.abs(got - want)[unlikely] / want[unlikely])) < 0.02


def test_z_loss_and_smoothing_do_not_touch_the_reported_nll():
    logits, targets = jnp.array([[2.0, 0.0, -1.0]]), jnp.array([0])
    loss, nll = token_losses(logits, targets, z_loss=0.5, label_smoothing=0.3)
    assert float(nll[0]) == pytest.approx(-float(jax.nn.log_softmax(logits)[0, 0]))
    assert float(loss[0]) > float(nll[0])


def test_memory_does_not_grow_with_the_vocabulary():
    """The compiled gradient needs no array of tokens x vocabulary (beside the weight and its gradient)."""

    def temporary_bytes(chunk):
        params = {"w": jax.ShapeDtypeStruct((16, 4096), jnp.float32)}
        hidden = jax.ShapeDtypeStruct((4, 256, 16), jnp.float32)
        targets, mask = jax.ShapeDtypeStruct((4, 256), jnp.int32), jax.ShapeDtypeStruct((4, 256), jnp.float32)
        loss = lambda p, h, t, m: chunked_cross_entropy(head, p, h, t, m, chunk=chunk)[0]
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, hidden, targets, mask).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * 256 * 4096 * 4
    assert temporary_bytes(1024) > logits
    assert temporary_bytes(64) < logits / 4

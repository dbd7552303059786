"""The objective of distillation on logits: chunked = whole, temperatures, several teachers, padded vocabularies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.compress import mixture
from fastlm.compress.mixture import DIVERGENCES, Mixture
from fastlm.ops import divergences
from fastlm.ops.chunked_loss import chunked_loss
from fastlm.ops.cross_entropy import CrossEntropy, TokenScores

ROWS, LENGTH, VOCAB = 2, 9, 11


def head(params, hidden):
    return hidden @ params["w"]


def arrays(teachers=1, teacher_vocab=VOCAB):
    keys = jax.random.split(jax.random.key(0), 8)
    params = {"w": jax.random.normal(keys[0], (5, VOCAB))}
    hidden = jax.random.normal(keys[1], (ROWS, LENGTH, 5))
    shared = {
        "weights": {"cross_entropy": jnp.float32(0.3), "forward_kl": jnp.float32(0.7)},
        "options": {"forward_kl": {"temperature": jnp.float32(2.0)}},
        "heads": tuple({"w": 2 * jax.random.normal(keys[2 + i], (6, teacher_vocab))} for i in range(teachers)),
    }
    pieces = {
        "targets": jax.random.randint(keys[5], (ROWS, LENGTH), 0, min(VOCAB, teacher_vocab)),
        "mask": jax.random.bernoulli(keys[6], 0.7, (ROWS, LENGTH)).astype(jnp.float32),
        "true": jnp.ones((ROWS, LENGTH)),
        "teachers": tuple(jax.random.normal(keys[7], (ROWS, LENGTH, 6)) for _ in range(teachers)),
    }
    return params, hidden, shared, pieces


def objective(teachers=1, name="forward_kl", **more):
    return Mixture(CrossEntropy(), (("forward_kl", DIVERGENCES[name][0]),), (head,) * teachers, **more)


def whole(params, hidden, shared, pieces):
    """From the definitions, on all logits at once."""
    logits = head(params, hidden)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), pieces["targets"][..., None], -1)[..., 0]
    p = [jax.nn.softmax(head(w, h) / 2.0) for w, h in zip(shared["heads"], pieces["teachers"])]
    p = sum(p) / len(p)
    kl = jnp.sum(p * (jnp.log(p) - jax.nn.log_softmax(logits[..., : p.shape[-1]] / 2.0)), axis=-1)
    return jnp.sum((0.3 * nll + 0.7 * 4.0 * kl) * pieces["mask"])


@settings(max_examples=6)  # each compiles
@given(chunk=st.integers(1, 30), teachers=st.sampled_from([1, 3]))
def test_any_chunk_gives_the_whole_loss_and_gradient(chunk, teachers):
    params, hidden, shared, pieces = arrays(teachers)
    loss = lambda p, h: chunked_loss(objective(teachers), head, p, h, shared, pieces, chunk=chunk)[0]
    got, grads = jax.value_and_grad(loss, argnums=(0, 1))(params, hidden)
    expected, expected_grads = jax.value_and_grad(whole, argnums=(0, 1))(params, hidden, shared, pieces)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads)):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_the_gradient_that_is_stored_is_the_gradient(name):
    params, hidden, shared, pieces = arrays()
    kind, one = DIVERGENCES[name][1], objective(name=name)
    shared["options"]["forward_kl"] = {key: jnp.float32(value) for key, value in vars(kind()).items()}
    logits = head(params, hidden)
    _, _, gradient = one.with_gradient(logits, shared, pieces)
    expected = jax.grad(lambda x: jnp.sum(one(x, shared, pieces)[0]))(logits)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_nothing_is_differentiated_but_the_student():
    params, hidden, shared, pieces = arrays()

    def loss(shared, taught):
        given = pieces | {"teachers": taught}
        return chunked_loss(objective(), head, params, hidden, shared, given, chunk=4)[0]

    for leaf in jax.tree.leaves(jax.grad(loss, argnums=(0, 1))(shared, pieces["teachers"])):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("vocab", [VOCAB - 3, VOCAB + 5])
def test_vocabularies_padded_differently_compare_on_what_they_share(vocab):
    params, hidden, shared, pieces = arrays(teacher_vocab=vocab)
    shared["heads"] = ({"w": shared["heads"][0]["w"]},)
    got = chunked_loss(objective(), head, params, hidden, shared, pieces, chunk=6)[0]
    cut = shared | {"heads": ({"w": shared["heads"][0]["w"][:, :VOCAB]},)}
    np.testing.assert_allclose(got, whole(params, hidden, cut, pieces), rtol=1e-5)


def test_what_evaluation_reports():
    params, hidden, shared, pieces = arrays()
    one = objective(diagnoses=True)
    _, scores = chunked_loss(one, head, params, hidden, shared, pieces, chunk=5)
    student, teacher = (
        jax.nn.log_softmax(head(w, h)) for w, h in ((params, hidden), (shared["heads"][0], pieces["teachers"][0]))
    )
    np.testing.assert_allclose(scores["kl"], divergences.forward_kl(teacher, student), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(scores["agreement"], jnp.argmax(student, -1) == jnp.argmax(teacher, -1))
    nll = -jnp.take_along_axis(teacher, pieces["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(scores["teacher_nll"], nll, rtol=1e-5)
    assert isinstance(scores["own"], TokenScores)
    assert scores["calibration"].shape == (ROWS, LENGTH, 3, mixture.BINS)
    np.testing.assert_array_equal(jnp.sum(scores["calibration"][..., 0, :], -1), 1)


def test_calibration_error_by_hand():
    bins = np.zeros((3, mixture.BINS))
    bins[:, 9] = 10, 9.5, 5  # ten answers, 95% sure on average, half of them right
    bins[:, 5] = 10, 5.5, 6
    assert mixture.calibration_error(bins) == pytest.approx((4.5 + 0.5) / 20)


def test_memory_does_not_grow_with_the_vocabulary():
    """Neither the student's nor the teacher's logits of all tokens ever exist."""

    def temporary_bytes(chunk):
        shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
        params, hidden = {"w": shape(16, 4096)}, shape(4, 256, 16)
        shared = {
            "weights": {"cross_entropy": shape(), "forward_kl": shape()},
            "options": {"forward_kl": {"temperature": shape()}},
            "heads": ({"w": shape(16, 4096)},),
        }
        pieces = {
            "targets": jax.ShapeDtypeStruct((4, 256), jnp.int32),
            "mask": shape(4, 256),
            "true": shape(4, 256),
            "teachers": (shape(4, 256, 16),),
        }
        loss = lambda p, h, s, x: chunked_loss(objective(), head, p, h, s, x, chunk=chunk)[0]
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, hidden, shared, pieces).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * 256 * 4096 * 4
    assert temporary_bytes(1024) > 2 * logits
    assert temporary_bytes(64) < logits / 2

"""What is seen of matrices: inputs as the model has them, gradients as autodiff does; padding not counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.compress import evidence, importance
from fastlm.compress.evidence import Evidence
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig
from fastlm.ops.paths import flatten
from fastlm.tasks import language_modeling

CFG = ModelConfig(vocab_size=32, max_length=16, layers=1, width=16, heads=2, feed_forward="swiglu")
MODEL = Model(CFG)
TASK = language_modeling.make(MODEL, np.ones(32, np.int32))
PARAMS = {"model": MODEL.init(jax.random.key(0))}
UP, DOWN = "layers/0/feed_forward/up", "layers/0/feed_forward/down"
EVERYTHING = ("gradient", "absolute", "square", "products", "outputs")


def batch(seed, padding=0):
    tokens = np.random.default_rng(seed).integers(1, 32, (2, 16), dtype=np.int32)
    mask = np.ones((2, 16), np.float32)
    mask[:, 16 - padding :] = 0
    return {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "loss_mask": mask}


def mean_loss(params, given):
    total, count, _ = TASK.loss({"model": params}, TASK.constants, (), given, 0, None)
    return total / count


def test_gradients_are_those_of_the_mean_loss():
    batches = [batch(0), batch(1)]
    found = evidence.gather(TASK, PARAMS, batches, [UP, DOWN], EVERYTHING)
    each = [flatten(jax.grad(mean_loss)(PARAMS["model"], given)) for given in batches]
    for path in (UP, DOWN):
        a, b = (np.asarray(one[path]) for one in each)
        np.testing.assert_allclose(found[path].gradient, (a + b) / 2, atol=1e-6)
        np.testing.assert_allclose(found[path].absolute, (abs(a) + abs(b)) / 2, atol=1e-6)
        np.testing.assert_allclose(found[path].square, 32 * (a**2 + b**2) / 2, atol=1e-6)


def test_inputs_are_what_the_product_reads():
    """The first layer's queries read the normalized embeddings; what `down` reads is known to be as wide as it is."""
    given, reads = batch(2), "layers/0/attention/q"
    found = evidence.gather(TASK, PARAMS, [given], [reads, DOWN], ["products"])
    x = np.asarray(MODEL.embed(PARAMS["model"], given["tokens"], jnp.arange(16)[None], None), np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + CFG.norm_epsilon)
    rows = x.reshape(-1, 16)
    np.testing.assert_allclose(found[reads].products, rows.T @ rows / len(rows), atol=1e-5)
    np.testing.assert_allclose(found[reads].inputs, np.square(rows).mean(axis=0), atol=1e-5)
    probe = evidence.gather(TASK, PARAMS, [given], [DOWN], ["inputs"])[DOWN]
    np.testing.assert_allclose(probe.inputs, jnp.diagonal(found[DOWN].products), rtol=1e-5)


def test_outputs_are_how_the_loss_depends_on_what_comes_out():
    """Of the last product of the stack: what is added to the stream there has the same gradient."""
    given = batch(4)
    found = evidence.gather(TASK, PARAMS, [given], [UP, DOWN], ["outputs"])
    assert (
        found[UP].inputs is None
        and found[UP].outputs.shape == (PARAMS["model"]["layers"]["0"]["feed_forward"]["up"].shape[1],) * 2
    )
    capture = MODEL.features(PARAMS["model"], given["tokens"], capture={"hidden"})[1]["hidden"][-1]

    def rest(stream):
        hidden = MODEL.final_norm(PARAMS["model"], stream)
        logits = MODEL.head(PARAMS["model"], hidden)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), given["targets"][..., None], -1))

    g = jax.grad(rest)(capture).reshape(-1, 16)
    np.testing.assert_allclose(found[DOWN].outputs, 32 * g.T @ g, atol=1e-6)


def test_what_the_loss_does_not_depend_on_is_not_counted():
    """Causal rows whose ends have no loss: what stands there may be anything."""
    one, other = batch(3, padding=5), batch(3, padding=5)
    other["tokens"] = other["tokens"].copy()
    other["tokens"][:, 11:] = 7
    a, b = (evidence.gather(TASK, PARAMS, [given], [UP, DOWN], ["inputs"]) for given in (one, other))
    whole = evidence.gather(TASK, PARAMS, [batch(3)], [UP, DOWN], ["inputs"])
    for path in (UP, DOWN):
        np.testing.assert_allclose(a[path].inputs, b[path].inputs, rtol=1e-5)
        assert not np.allclose(a[path].inputs, whole[path].inputs, rtol=1e-3)


def test_data_without_a_word_is_refused():
    with pytest.raises(UserError, match="nothing that the loss counts"):
        evidence.gather(TASK, PARAMS, [batch(0, padding=16)], [UP], ["inputs"])
    with pytest.raises(UserError, match="nothing that the loss counts"):
        evidence.gather(TASK, PARAMS, [], [UP], ["inputs"])


def test_second_order_is_what_removing_does_to_a_quadratic_loss_at_its_least():
    w, x = jnp.array([[2.0], [-1.0]]), jnp.array([1.0, 0.5])
    loss = lambda w: 0.5 * jnp.sum((x @ w - 1.5) ** 2)
    seen = Evidence(square=jnp.square(x)[:, None])  # the curvature of squared errors
    found = importance.WEIGHTS["taylor_second_order"].score(w, seen, jax.random.key(0))
    want = [loss(w.at[i].set(0.0)) - loss(w) for i in range(2)]
    np.testing.assert_allclose(found[:, 0], want, rtol=1e-5)


def test_every_score_reads_what_it_needs_and_nothing_else():
    weights, filled = jnp.ones((3, 2)), Evidence(*(jnp.full((3, 2), 0.5),) * 3, jnp.arange(3.0), jnp.eye(3), jnp.eye(2))
    for name, known in importance.WEIGHTS.items():
        parts = {need: getattr(filled, need) for need in known.needs}
        score = known.score(weights, Evidence(**parts), jax.random.key(1))
        assert score.shape == weights.shape, name
    with pytest.raises(UserError, match="no score 'wand'; did you mean 'wanda'"):
        importance.of_weights("wand", "here")

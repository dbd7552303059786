"""What random features of the softmax kernel promise: error, variance, drawing, range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.models import attention as kinds
from fastlm.models.attention.performer import directions, fixed_directions, positive_features
from fastlm.ops.masks import MaskSpec
from tests.models.attention import bench
from tests.models.attention.bench import Case

HEAD_DIM, SCALE = 16, 0.25


def errors(counts, orthogonal, seeds=32):
    """Root mean square of estimated less exact softmax attention, by number of features."""
    q, k, v = jax.random.normal(jax.random.key(1), (3, 1, 1, 24, HEAD_DIM))
    q, k = q / 2, k / 2  # the variance grows with exp |q + k|^2
    exact = jax.nn.softmax(q @ jnp.swapaxes(k, 2, 3) * SCALE, axis=-1) @ v

    def estimate(w):
        feature_q, feature_k = positive_features(q, k, w, SCALE)
        weights = feature_q @ jnp.swapaxes(feature_k, 2, 3)
        return weights / jnp.sum(weights, -1, keepdims=True) @ v

    keys, most = jax.random.split(jax.random.key(2), seeds), max(counts)
    drawn = jax.vmap(lambda key: directions(key, most, HEAD_DIM, orthogonal))(keys)
    rms = lambda w: float(jnp.sqrt(jnp.mean((jax.vmap(estimate)(w) - exact) ** 2)))
    return [rms(drawn[:, :count]) for count in counts]


@pytest.mark.slow
def test_more_features_are_nearer_to_softmax_and_orthogonal_ones_nearer_than_independent():
    orthogonal, independent = (errors((16, 64, 256), kind) for kind in (True, False))
    for found in (orthogonal, independent):
        assert found[0] > 1.4 * found[1] > 1.4**2 * found[2]
    assert all(np.less_equal(orthogonal, independent))


def test_orthogonal_directions_are_orthogonal_in_groups_and_as_long_as_normal_draws():
    for w in (directions(jax.random.key(0), 40, HEAD_DIM), fixed_directions(0, 40, HEAD_DIM, True)):
        for group in (w[:16], w[16:32], w[32:]):
            np.testing.assert_allclose(group @ group.T, np.diag(np.sum(group**2, axis=1)), atol=1e-4)
        assert 0.8 < float(np.mean(np.sum(w**2, axis=1))) / HEAD_DIM < 1.2


def test_training_draws_features_evaluation_and_memories_do_not():
    x, positions = bench.inputs(6), jnp.broadcast_to(jnp.arange(6), (2, 6))

    def run(options, rng, memory=False):
        case = Case(f"performer({options})", None)
        cfg = bench.layer(case, True)
        cache = kinds.empty_cache(case.spec, cfg, 2, 6, jnp.float32) if memory else None
        look = {"positions": positions, "mask": MaskSpec(), "rng": rng, "cache": cache}
        return bench.module(case, cfg).apply({"params": bench.params_of(Case("performer", None))}, x, x, **look)[0]

    near = lambda a, b: bool(jnp.allclose(a, b, atol=1e-5))
    one, two, fixed = run("", jax.random.key(1)), run("", jax.random.key(2)), run("", None)
    assert not near(one, two) and not near(one, fixed)
    assert near(run("redraw=False", jax.random.key(1)), fixed)
    assert near(run("", jax.random.key(1), memory=True), fixed)
    assert not near(run("seed=1", None), fixed)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim, size", [(256, 1.0), (256, 16.0), (64, 3.5), (64, 100.0)])
def test_features_stay_in_range_for_wide_heads_and_long_keys(head_dim, size):
    scale = head_dim**-0.5
    w = directions(jax.random.key(0), 2 * head_dim, head_dim)
    # The keys with the largest features are those that stand on a direction.
    keys = jnp.concatenate([size * jax.random.normal(jax.random.key(1), (8, head_dim)), w[:8] / scale**0.5])
    feature_q, feature_k = positive_features(keys[None, None], keys[None, None], w, scale)
    assert np.isfinite(feature_q).all() and np.isfinite(jnp.sum(feature_k) * 1e10)
    assert (jnp.max(feature_q, axis=-1) == 1).all()
    if size < 16:
        assert (jnp.max(feature_k, axis=-1) > 0).all()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_long_keys_and_half_precision_give_finite_gradients(dtype):
    case = Case("performer", None, {"qk_norm": False})
    cfg, params = bench.layer(case, True, init_scale=1.0), bench.params_of(case)
    params = {**params, "q": 6 * params["q"], "k": 6 * params["k"]}
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
    layer = bench.module(case, cfg, dtype=dtype)
    x = bench.inputs(9).astype(dtype)
    loss = lambda p, x: jnp.sum(layer.apply({"params": p}, x, x, positions=positions, mask=MaskSpec())[0] ** 2)
    for value in jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)):
        assert np.isfinite(value).all()

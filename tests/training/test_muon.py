import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fastlm.training import muon


def matrix(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24)])
def test_singular_values_come_close_to_one(shape):
    x = matrix(0, *shape)
    before = np.linalg.svd(x, compute_uv=False)
    after = np.linalg.svd(muon.orthogonalize(x), compute_uv=False)
    assert before.max() / before.min() > 1.5
    assert after.min() > 0.6
    assert after.max() < 1.3


def test_bfloat16_products_are_within_a_few_percent():
    exact, rounded = (muon.orthogonalize(matrix(2, 32, 64), dtype=dtype) for dtype in ("float32", "bfloat16"))
    error = float(jnp.linalg.norm(exact - rounded) / jnp.linalg.norm(exact))
    assert 1e-4 < error < 0.05


def test_keeps_the_singular_vectors():
    u, _, vt = np.linalg.svd(matrix(1, 12, 30), full_matrices=False)
    y = np.asarray(muon.orthogonalize(matrix(1, 12, 30)))
    inner = u.T @ y @ vt.T
    np.testing.assert_allclose(inner - np.diag(np.diag(inner)), 0, atol=1e-4)


def test_direction_equals_optax():
    dims = lambda tree: jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), tree)
    oracle = optax.contrib.scale_by_muon(nesterov=False, weight_dimension_numbers=dims)
    ours = muon.scale_by_muon(nesterov=False)
    tree = lambda seed: {"0": {"q": matrix(seed, 8, 20)}, "1": {"q": matrix(seed + 1, 8, 20)}}
    ours_state, oracle_state = ours.init(tree(0)), oracle.init(tree(0))
    for seed in (3, 7):
        got, ours_state = ours.update(tree(seed), ours_state)
        expected, oracle_state = oracle.update(tree(seed), oracle_state)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)


def test_a_tree_is_its_matrices_one_by_one():
    first = {"q": matrix(0, 8, 12), "out": matrix(1, 12, 8)}
    tree = {"0": first, "1": {"q": matrix(2, 8, 12)}, "10": {"q": matrix(3, 8, 8)}}
    together = muon.orthogonalize_tree(tree)
    alone = jax.tree.map(muon.orthogonalize, tree)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), together, alone)


def test_depth_adds_no_products_to_the_program():
    def products(layers):
        tree = {str(i): {"q": jax.ShapeDtypeStruct((8, 8), jnp.float32)} for i in range(layers)}
        return str(jax.make_jaxpr(muon.orthogonalize_tree)(tree)).count("dot_general")

    assert products(6) == products(2) == 15


def test_a_zero_gradient_gives_zeros_and_not_nan():
    np.testing.assert_array_equal(muon.orthogonalize(jnp.zeros((4, 6))), 0)

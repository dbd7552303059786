"""Weights in eight bits: what they stand for, that products are those of it, and that nothing is widened whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.models import Compute, Model, ModelConfig, rounding
from fastlm.ops import leaves, paths
from fastlm.ops.contract import contract, dense, lookup
from fastlm.ops.leaf import Leaf


def weight(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@settings(max_examples=12)  # each shape compiles
@given(st.integers(1, 70), st.integers(1, 70), st.booleans())
def test_any_shape_comes_back_within_half_a_level(inputs, outputs, table):
    w = weight(*((outputs, inputs) if table else (inputs, outputs)))
    leaf = leaves.Rounded.of(w, table)
    assert leaf.shape == w.shape and leaf.levels.dtype == jnp.int8
    scales = np.asarray(leaf.scales)[:, None] if table else np.asarray(leaf.scales)
    assert (np.abs(leaf.dense() - w) <= 0.5001 * scales).all()


@pytest.mark.parametrize(("table", "transpose"), [(False, False), (True, True), (False, True), (True, False)])
def test_products_are_those_of_what_it_stands_for(table, transpose, monkeypatch):
    monkeypatch.setattr(leaves, "WIDTH", 16)
    monkeypatch.setattr(leaves, "TILE", 800)
    leaf = leaves.Rounded.of(weight(48, 72), table)
    assert leaf.levels.shape[0] > 2
    for rows in (3, leaves.FEW):
        x = weight(2, rows, 72 if transpose else 48, seed=1)
        wanted = contract(x, leaf.dense(), transpose=transpose)
        np.testing.assert_allclose(contract(x, leaf, transpose=transpose), wanted, rtol=1e-5, atol=1e-4)
    assert contract(x.astype(jnp.bfloat16), leaf, transpose=transpose).dtype == jnp.bfloat16
    ids = jnp.array([[0, 5], [47, 99]])  # one beyond the end
    np.testing.assert_array_equal(lookup(leaf, ids), lookup(leaf.dense(), ids))


def test_zeros_are_zeros():
    leaf = leaves.Rounded.of(jnp.zeros((20, 40)))
    assert (leaf.dense() == 0).all() and (contract(jnp.ones((1, 20)), leaf) == 0).all()


def test_a_loop_widens_nothing_whole():
    """Which XLA would do once for all turns with a product of one piece."""
    shape = (512, 1536)
    w, x = weight(*shape), jnp.ones((1, shape[0]))

    def loop(w, x):
        turn = lambda x, _: (jnp.tanh(contract(x, w)[:, : shape[0]]), None)
        return jax.lax.scan(turn, x, None, length=5)[0]

    room = lambda w: jax.jit(loop).lower(w, x).compile().memory_analysis().temp_size_in_bytes
    assert room(leaves.Rounded.of(w)) < w.nbytes / 2
    in_one = leaves.Rounded.of(w)
    in_one = in_one.replace(levels=jnp.swapaxes(in_one.levels, 0, 1).reshape(1, *shape))
    assert room(in_one) >= w.nbytes  # so that the line above can fail


@pytest.mark.parametrize(
    "options",
    [
        {"positions": "learned", "tied_embeddings": False, "bias": True},
        {"attention": ("full", "latent"), "feed_forward": "swiglu"},
        pytest.param({"attention": ("gated_delta", "transformer_xl")}, marks=pytest.mark.slow),
        {"family": "encoder_decoder", "encoder_layers": 1, "positions": "relative"},
        {"family": "encoder", "head": "sequence", "classes": 3, "attention": "linformer(rank=8)"},
    ],
    ids=str,
)
def test_models_compute_what_their_rounded_weights_say(options):
    cfg = ModelConfig(vocab_size=50, layers=2, width=64, heads=2, max_length=32, **options)
    model = Model(cfg, Compute(dtype="float32"))
    small = rounding.round_weights(model.init(jax.random.key(0)), least=1000)
    found = paths.flatten(small, is_leaf=lambda leaf: isinstance(leaf, Leaf))
    kinds = {path: isinstance(leaf, leaves.Rounded) for path, leaf in found.items()}
    assert kinds["layers/0/attention/out"] and kinds["embedding/table"] and not kinds.get("embedding/positions", False)
    plain = jax.tree.map(dense, small, is_leaf=lambda leaf: isinstance(leaf, Leaf))
    tokens = jnp.arange(16).reshape(2, 8)
    given = (tokens, tokens) if cfg.family == "encoder_decoder" else (tokens,)
    np.testing.assert_allclose(model.apply(small, *given)[0], model.apply(plain, *given)[0], atol=2e-5)

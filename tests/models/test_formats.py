"""Forms of weights: what they stand for, how they multiply, and that whatever follows shapes follows them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.compress import prune
from fastlm.compress.lora import Lora
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig, abstract, formats, fusion, slicing
from fastlm.models.units import Kept
from fastlm.ops import leaves, paths
from fastlm.ops.contract import contract, dense, lookup
from fastlm.tasks import language_modeling

BASE = {"vocab_size": 50, "width": 32, "layers": 2, "heads": 2, "max_length": 16, "feed_forward": "swiglu"}
FACTORS = (("layers/1/.*/(q|up|down)", "low_rank(rank=4)"), ("layers/0/attention/.*", "low_rank(rank=8)"))
CFG = ModelConfig(**BASE, formats=FACTORS)
TOKENS = jnp.arange(16).reshape(2, 8)


@pytest.fixture(scope="module")
def params():
    return Model(CFG).init(jax.random.key(0))


def logits(cfg, params):
    return Model(cfg).apply(params, TOKENS)[0]


@given(
    st.integers(1, 7),
    st.integers(1, 7),
    st.floats(0, 1),
    st.integers(0, 2**31 - 1),
    st.sampled_from(["float32", "bfloat16"]),
)
@settings(max_examples=25, deadline=None)
def test_packing_loses_nothing(rows, columns, share, seed, dtype):
    rng = np.random.default_rng(seed)
    w = jnp.asarray(np.where(rng.random((rows, columns)) < share, 0, rng.normal(size=(rows, columns))), dtype)
    leaf = formats.OfSparse(int(jnp.count_nonzero(w))).of(w)
    np.testing.assert_array_equal(leaf.dense(), w)
    assert leaf.shape == w.shape and leaf.bits.nbytes == -(-w.size // 8) and leaf.values.size == jnp.count_nonzero(w)


def test_leaves_multiply_as_what_they_stand_for():
    keys = jax.random.split(jax.random.key(1), 4)
    w = jax.random.normal(keys[0], (12, 6)) * (jax.random.uniform(keys[1], (12, 6)) < 0.5)
    low = formats.OfLowRank(4).of(w)
    for leaf in (low, leaves.Sparse.of(w, 72), leaves.Columns((low, w))):
        plain = dense(leaf)
        x, back = jax.random.normal(keys[2], (3, 12)), jax.random.normal(keys[3], (3, plain.shape[1]))
        np.testing.assert_allclose(contract(x, leaf), x @ plain, atol=1e-5)
        np.testing.assert_allclose(contract(back, leaf, transpose=True), back @ plain.T, atol=1e-5)
        np.testing.assert_allclose(lookup(leaf, jnp.array([3, 0])), plain[jnp.array([3, 0])], atol=1e-5)
    np.testing.assert_allclose(dense(formats.OfLowRank(6).of(w)), w, atol=1e-5)
    u, s, v = np.linalg.svd(w)
    np.testing.assert_allclose(dense(low), (u[:, :4] * s[:4]) @ v[:4], atol=1e-5)


def test_shapes_and_axes_are_those_of_the_parts(params):
    shapes, axes = abstract(CFG)
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(lambda leaf: leaf.shape, params)
    assert axes["layers/1/attention/q/a"] == ("embed", None) and axes["layers/1/attention/q/b"] == (None, "heads")
    assert "layers/1/attention/q" not in axes and axes["layers/1/attention/k"] == ("embed", "kv_heads")
    assert set(axes) == set(paths.flatten(params))
    assert ModelConfig.from_json(CFG.to_json()) == CFG


def test_rewrites_of_a_model_follow(params):
    before = logits(CFG, params)
    np.testing.assert_allclose(logits(CFG.plain(), formats.merged(params)), before, atol=1e-5)
    np.testing.assert_allclose(logits(*fusion.fuse(CFG, params)), before, atol=1e-5)
    small, cut = slicing.keep_layers(CFG, params, [1])
    assert dict(small.formats).keys() == {
        f"layers/0/{name}" for name in ("attention/q", "feed_forward/up", "feed_forward/down")
    }
    plain = slicing.keep_layers(CFG.plain(), formats.merged(params), [1])
    np.testing.assert_allclose(logits(small, cut), logits(*plain), atol=1e-5)
    kept = Kept(heads={0: [0], 1: [1]}, feed_forward={1: range(9, 41)})
    small, cut = slicing.keep_width(CFG, params, kept)
    plain = slicing.keep_width(CFG.plain(), formats.merged(params), kept)
    np.testing.assert_allclose(logits(small, cut), logits(*plain), atol=1e-5)
    assert cut["layers"]["1"]["feed_forward"]["up"].b.shape == (4, 32)


def test_factors_are_weights_of_their_own_to_wrappers(params):
    """LoRA beside each of them; zeros in each of them."""
    task = language_modeling.make(Model(CFG), np.ones(50, np.int32))
    lora = Lora(rank=2)(task, None)
    own = lora.init(jax.random.key(2), params)
    assert {"a", "b"} == set(own["lora"]["layers"]["1"]["attention"]["q"]["a"])
    for path, leaf in paths.flatten(own).items():
        assert len(lora.axes[path]) == leaf.ndim
    seen = lora.compression.view(own, {}, (), 0, None)["model"]
    np.testing.assert_allclose(logits(CFG, seen), logits(CFG, params), atol=1e-5)
    exported = lora.export(own, {}, ())
    assert isinstance(exported["layers"]["1"]["attention"]["q"], leaves.LowRank)
    selected = prune.matrices(task.axes, prune.MATRICES, "here")
    assert "model/layers/1/attention/q/a" in selected and "model/layers/1/attention/k" in selected


def test_zeros_are_packed_where_that_is_smaller():
    cfg = ModelConfig(**BASE)
    params = Model(cfg).init(jax.random.key(3))
    path, half = "layers/1/feed_forward/up", params["layers"]["1"]["feed_forward"]["up"]
    params["layers"]["1"]["feed_forward"]["up"] = half.at[:16].set(0)
    stored, packed = prune.packed(cfg, params)
    assert dict(stored.formats) == {path: f"sparse(ones={half.size // 2})"} and stored.in_use() == cfg
    assert jax.tree.map(lambda a: a.shape, packed) == jax.tree.map(lambda a: a.shape, abstract(stored)[0])
    jax.tree.map(np.testing.assert_array_equal, formats.opened(packed), params)
    with pytest.raises(UserError, match="for disk alone"):
        Model(stored)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ((("layers/0/attention/q", "low_rnak(rank=4)"),), "no format 'low_rnak'"),
        ((("layers/0/attention/q", "low_rank(rank=0)"),), "rank must be at least 1"),
        ((("layers/0/attention/q", "low_rank(size=2)"),), "model.formats: low_rank.size: no such key"),
        ((("layers/7/attention/q", "low_rank(rank=2)"),), "matches no parameter path"),
        ((("final_norm/scale", "low_rank(rank=2)"),), "matches no parameter path"),
    ],
)
def test_what_is_wrong_with_a_format_is_said(wrong, message):
    with pytest.raises(UserError, match=message):
        abstract(ModelConfig(**BASE, formats=wrong))

"""The decoder: causality, no leaks across documents, decoding equals the parallel form, every choice builds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.errors import UserError
from fastlm.models import Compute, Model, ModelConfig, abstract

BASE = ModelConfig(vocab_size=40, max_length=32, layers=2, width=32, heads=4, kv_heads=2)
VARIANTS = {
    "base": {},
    "gpt2": {"layers": 1, "positions": "learned", "bias": True, "norm": "layer_norm", "feed_forward": "gelu",
             "kv_heads": 0},
    "llama": {"norm": "rms_norm", "feed_forward": "swiglu", "tied_embeddings": False},
    "post_norm_sinusoidal": {"layers": 1, "norm_place": "post", "positions": "sinusoidal", "feed_forward": "relu2"},
    "alibi_capped": {"layers": 1, "positions": "alibi", "attention_softcap": 20.0, "logit_softcap": 10.0, "heads": 3,
                     "kv_heads": 1, "head_dim": 8},
    "qk_norm_geglu_no_positions": {"layers": 1, "qk_norm": True, "feed_forward": "geglu", "positions": "none"},
    "per_layer": {"heads": (4, 2), "kv_heads": (2, 1), "head_dim": (8, 16), "feed_forward_width": (48, 64),
                  "feed_forward": ("gelu", "swiglu")},
}  # fmt: skip


def build(name):
    model = Model(dataclasses.replace(BASE, **VARIANTS[name]))
    return model, jax.jit(model.init)(jax.random.key(1))


def tokens(seed=0, batch=2, length=10):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, BASE.vocab_size)


@pytest.fixture(scope="module", params=list(VARIANTS))
def variant(request):
    return build(request.param)


def test_later_tokens_do_not_change_earlier_logits(variant):
    model, params = variant
    x = tokens()
    changed = x.at[:, 6:].set((x[:, 6:] + 1) % BASE.vocab_size)
    run = jax.jit(lambda t: model.apply(params, t)[0])
    a, b = run(x), run(changed)
    np.testing.assert_allclose(a[:, :6], b[:, :6], atol=1e-6)
    assert float(jnp.abs(a[:, 6:] - b[:, 6:]).max()) > 1e-4


def test_packed_documents_do_not_see_each_other(variant):
    model, params = variant
    a, b = tokens(1, 1, 6), tokens(2, 1, 4)
    packed = jnp.concatenate([a, b], 1)
    segments = jnp.array([[1] * 6 + [2] * 4])
    positions = jnp.array([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])
    together = model.apply(params, packed, segment_ids=segments, positions=positions)[0]
    np.testing.assert_allclose(together[:, :6], model.apply(params, a)[0], atol=3e-6)
    np.testing.assert_allclose(together[:, 6:], model.apply(params, b)[0], atol=3e-6)


def test_step_by_step_equals_all_at_once(variant):
    model, params = variant
    x = tokens()
    expected = model.apply(params, x)[0]
    cache = model.empty_cache(2, 16)
    first, aux = model.apply(params, x[:, :4], cache=cache)
    got, cache, step = [first], aux["cache"], jax.jit(lambda t, c: model.apply(params, t, cache=c))
    for i in range(4, 10):
        logits, aux = step(x[:, i : i + 1], cache)
        cache = aux["cache"]
        got.append(logits)
    np.testing.assert_allclose(jnp.concatenate(got, 1), expected, atol=2e-5)
    np.testing.assert_array_equal(cache.length, [10, 10])


def test_parts_compose_to_the_whole():
    model, params = build("llama")
    x = tokens()
    positions = jnp.broadcast_to(jnp.arange(10), (2, 10))
    from fastlm.ops.masks import MaskSpec

    hidden = model.embed(params, x, positions)
    for i in range(2):
        hidden, _, _ = model.block(params, i, hidden, positions=positions, mask=MaskSpec())
    logits = model.head(params, model.final_norm(params, hidden))
    np.testing.assert_allclose(logits, model.apply(params, x)[0], atol=1e-6)


def test_capture_returns_what_it_names_and_changes_nothing():
    model, params = build("base")
    x = tokens()
    plain, nothing = model.apply(params, x)
    seen, aux = model.apply(params, x, capture=("hidden", "attention", "qkv"))
    assert nothing == {}
    np.testing.assert_allclose(seen, plain, atol=1e-6)
    assert {k: len(v) for k, v in aux.items()} == {"hidden": 3, "attention": 2, "qkv": 2}
    np.testing.assert_allclose(jnp.sum(aux["attention"][0], -1), 1, atol=1e-5)
    assert float(jnp.abs(jnp.triu(aux["attention"][0], 1)).max()) == 0
    with pytest.raises(UserError, match="unknown"):
        model.apply(params, x, capture=("hiden",))


def test_positions_matter_only_through_distance_for_rotary_and_alibi():
    x = tokens()
    for name in ("base", "alibi_capped"):
        model, params = build(name)
        positions = jnp.broadcast_to(jnp.arange(10), (2, 10))
        shifted = model.apply(params, x, positions=positions + 7)[0]
        np.testing.assert_allclose(shifted, model.apply(params, x, positions=positions)[0], atol=1e-4)


def test_abstract_matches_what_init_makes(variant):
    model, params = variant
    shapes, axes = abstract(model.cfg)
    assert jax.tree.map(lambda a: a.shape, params) == jax.tree.map(lambda a: a.shape, shapes)
    paths = {"/".join(k.key for k in path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]}
    assert set(axes) == paths


def test_zero_residual_init_makes_every_block_the_identity():
    model = Model(dataclasses.replace(BASE, residual_init="zero"))
    params = model.init(jax.random.key(0))
    _, aux = model.features(params, tokens(), capture=("hidden",))
    np.testing.assert_array_equal(aux["hidden"][0], aux["hidden"][-1])


def test_dropout_needs_a_key_and_differs_between_keys():
    model = Model(dataclasses.replace(BASE, dropout=0.3))
    params = model.init(jax.random.key(0))
    run = lambda rng: model.features(params, tokens(), rng=rng)[0]
    np.testing.assert_array_equal(run(None), run(None))
    np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
    assert not np.allclose(run(jax.random.key(1)), run(jax.random.key(2)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_stays_close(dtype):
    model, params = build("base")
    low = Model(model.cfg, Compute(dtype=dtype))
    exact, rough = model.apply(params, tokens())[0], low.apply(params, tokens())[0]
    assert rough.dtype == jnp.float32
    assert float(jnp.abs(exact - rough).max()) < 0.03 * float(jnp.abs(exact).max()) + 0.01


def test_remat_recomputes_and_changes_no_gradient():
    model, params = build("base")
    loss = lambda m: lambda p: jnp.sum(m.apply(p, tokens())[0] ** 2)
    expected, products = jax.tree.leaves(jax.grad(loss(model))(params)), {}
    for remat in ("none", "products", "full"):
        again = Model(model.cfg, Compute(remat=remat))
        program = str(jax.make_jaxpr(jax.grad(loss(again)))(params))
        products[remat] = program.count("dot_general")
        for a, b in zip(expected, jax.tree.leaves(jax.grad(loss(again))(params))):
            np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4)
    assert products["none"] < products["products"] < products["full"]


def test_foreign_weights_are_named():
    model, params = build("base")
    wrong = jax.tree.map(lambda a: a, params)
    wrong["layers"]["1"]["attention"]["q"] = jnp.zeros((32, 16))
    with pytest.raises(UserError, match=r"stored shape \(32, 16\)"):
        model.apply(wrong, tokens())
    del wrong["layers"]["1"]["attention"]["q"]
    with pytest.raises(UserError, match="missing"):
        model.apply(wrong, tokens())


def test_unknown_attention_kind_is_named_at_once():
    with pytest.raises(UserError, match="unknown kind 'fulll'; did you mean 'full'"):
        Model(dataclasses.replace(BASE, attention="fulll"))

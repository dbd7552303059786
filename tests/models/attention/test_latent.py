"""What latent attention promises: a small cache, and steps that read it as it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig
from fastlm.models import attention as kinds
from fastlm.models.attention import latent
from fastlm.ops import attention
from fastlm.ops.masks import MaskSpec
from tests.models.attention import bench
from tests.models.attention.bench import Case

CASE = Case("latent(rank=12, rotary_dim=4)", None, {"qk_norm": False, "heads": 4, "kv_heads": 4, "head_dim": 8})
BASE = {"vocab_size": 11, "layers": 1, "width": 512, "heads": 8}


def cache_bytes(**config):
    cache = Model(ModelConfig(**BASE, **config)).empty_cache(2, 100)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))


def test_the_cache_is_as_small_as_rank_and_rotary_dim():
    full, own = cache_bytes(), cache_bytes(attention="latent")
    assert own / full == (4 * 64 + 32) / (2 * 8 * 64)  # 2.25 heads' keys and values instead of 8
    assert cache_bytes(attention="latent(rank=32)", positions="none") / full == 32 / (2 * 8 * 64)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_queries_moved_into_the_latent_give_what_expanded_keys_and_values_give(kv_heads):
    keys = jax.random.split(jax.random.key(0), 4)
    q, rows = jax.random.normal(keys[0], (2, 3, 4, 12)), jax.random.normal(keys[1], (2, 7, 20))
    make_k, make_v = jax.random.normal(keys[2], (2, 16, kv_heads * 8)) / 4
    attend = lambda *qkv: attention.plain(*qkv, MaskSpec(False), scale=0.3)
    want = attend(q, *latent.expanded(rows, make_k, make_v, kv_heads))
    inner = attend(latent.into_latent(q, make_k, kv_heads), rows[:, :, None], rows[:, :, None])
    np.testing.assert_allclose(latent.from_latent(inner, make_v, kv_heads), want, atol=1e-5)


def shapes(jaxpr):
    """Returns the shapes of everything that a computation makes."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {tuple(v.aval.shape) for v in equation.outvars}
        for inner in jaxprs_in_params(equation.params):
            found |= shapes(inner)
    return found


def test_a_step_makes_nothing_per_head_of_what_is_cached_and_a_long_prompt_does():
    cfg, params, slots = bench.layer(CASE, True), bench.params_of(CASE), 23
    cache = kinds.empty_cache(CASE.spec, cfg, 2, slots, jnp.float32)

    def largest(tokens):
        x, at = bench.inputs(tokens), jnp.full((2, tokens), 5)
        step = lambda x, cache: bench.module(CASE, cfg).apply(
            {"params": params}, x, x, positions=at, mask=MaskSpec(offset=at[:, 0]), cache=cache
        )
        made = shapes(jax.make_jaxpr(step)(x, cache).jaxpr)
        return max(int(np.prod(shape)) for shape in made if slots in shape)

    assert largest(1) <= 2 * slots * (12 + 4) < 2 * slots * 4 * 8 <= largest(16)


@pytest.mark.slow
def test_every_form_of_attention_takes_keys_wider_than_values():
    q, k = jax.random.normal(jax.random.key(0), (2, 2, 6, 2, 12))
    v, mask = jax.random.normal(jax.random.key(1), (2, 6, 2, 8)), MaskSpec()
    want = attention.plain(q, k, v, mask, scale=0.3)
    for form in ("key_major", "fused"):
        got = attention.dot_product_attention(q, k, v, mask, scale=0.3, form=form)
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.slow
def test_a_relative_bias_is_added_in_both_forms_and_softcaps_agree():
    case = dataclasses.replace(CASE, layer=CASE.layer | {"positions": "alibi", "attention_softcap": 3.0})
    cfg, params, x = bench.layer(case, True), bench.params_of(case), bench.inputs(6)
    bias = jax.random.normal(jax.random.key(5), (1, 4, 6, 6))
    run = lambda x, **look: bench.module(case, cfg).apply({"params": params}, x, x, **look)
    at = jnp.broadcast_to(jnp.arange(6), (2, 6))
    want, plain = (run(x, positions=at, mask=MaskSpec(), bias=b)[0] for b in (bias, None))
    assert float(jnp.abs(want - plain).max()) > 0.01
    cache, zero = kinds.empty_cache(case.spec, cfg, 2, 6, jnp.float32), jnp.zeros((2,), jnp.int32)
    for t in range(6):
        look = {"positions": at[:, t : t + 1], "mask": MaskSpec(offset=zero + t), "bias": bias[:, :, t : t + 1]}
        y, cache, _ = run(x[:, t : t + 1], cache=cache, **look)
        np.testing.assert_allclose(y, want[:, t : t + 1], atol=2e-5)


def test_norms_per_head_and_odd_rotations_are_refused():
    with pytest.raises(UserError, match="config.model.attention: latent: .* set qk_norm to False"):
        Model(ModelConfig(**BASE, attention="latent", qk_norm=True))
    with pytest.raises(UserError, match="rotary_dim must be even, got 3"):
        Model(ModelConfig(**BASE, attention="latent(rotary_dim=3)"))

"""Chunked attention beyond the contract of all kinds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.errors import UserError
from fastlm.models import attention as kinds
from fastlm.models.attention.chunk import ChunkOptions, attend_chunks
from fastlm.ops.attention import plain
from fastlm.ops.masks import MaskSpec
from tests.models.attention import bench
from tests.models.attention.cases import Case


def random(length, seed):
    return jax.random.normal(jax.random.key(seed), (1, length, 2, 4))


def test_a_chunk_without_others_is_attention_of_its_own():
    q, k, v = (random(10, seed) for seed in range(3))
    for causal in (True, False):
        chunks = functools.partial(attend_chunks, size=4, back=0, causal=causal, scale=0.5)
        y = jax.jit(chunks)(q, k, v, None, jnp.zeros((1,), int))
        for start in (0, 4, 8):
            part = slice(start, min(start + 4, 10))
            want = plain(q[:, part], k[:, part], v[:, part], MaskSpec(causal), scale=0.5)
            np.testing.assert_allclose(y[:, part], want, atol=1e-5)


def test_a_prompt_may_come_in_parts_that_end_anywhere():
    """Chunks of the second part then begin at another token in each row."""
    case, first = Case("chunk(size=3)", None), jnp.array([5, 1])
    cfg, x = bench.layer(case, True), bench.inputs(14)
    layer, params = bench.module(case, cfg), bench.params_of(case)

    @jax.jit
    def run(start, lengths, cache):
        at = start[:, None] + jnp.arange(8)
        part = jnp.take_along_axis(x, at[..., None], axis=1)
        mask = MaskSpec(offset=start, lengths=lengths)
        return layer.apply({"params": params}, part, part, positions=at, mask=mask, cache=cache)[:2]

    @jax.jit
    def whole():
        at = jnp.broadcast_to(jnp.arange(14), (2, 14))
        y = layer.apply({"params": params}, x, x, positions=at, mask=MaskSpec())[0]
        return jnp.take_along_axis(y, (first[:, None] + jnp.arange(8))[..., None], axis=1)

    _, cache = run(jnp.zeros((2,), int), first, kinds.empty_cache(case.spec, cfg, 2, 14, jnp.float32))
    y, _ = run(first, jnp.array([8, 8]), cache)
    np.testing.assert_allclose(y, whole(), atol=2e-5)


def test_an_empty_cache_may_be_donated():
    cfg = bench.layer(Case("chunk(size=3)", None), True)
    cache = kinds.empty_cache("chunk(size=3)", cfg, 2, 14, jnp.float32)
    jax.jit(lambda cache: jax.tree.map(jnp.copy, cache), donate_argnums=0)(cache)


def test_options_that_cannot_be():
    with pytest.raises(UserError, match="chunk: size must be at least 1"):
        ChunkOptions(size=0)
    with pytest.raises(UserError, match="back not negative"):
        ChunkOptions(back=-1)
